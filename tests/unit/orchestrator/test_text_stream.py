"""Text appears once it is certain, is never taken back, and ends before the first stop string."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.text_stream import TextStream

REPEATABLE = settings(derandomize=True, deadline=None)

REPLACEMENT = "\ufffd"


def decode_bytes(ids: list[int]) -> str:
    """One token a byte, as in byte-level vocabularies."""
    return bytes(ids).decode("utf-8", errors="replace")


WORDS = ["a", "b", "ab", "ba", "aab", " ", "é", "€", "end", "."]


def decode_words(ids: list[int]) -> str:
    return "".join(WORDS[token] for token in ids)


def decode_with_leading_space(ids: list[int]) -> str:
    """As SentencePiece: the space before a first word is dropped."""
    return "".join(f" word{token}" for token in ids).removeprefix(" ")


def texts_while_pushing(stream: TextStream, ids: list[int]) -> list[str]:
    """The text after each token, and after the end; as a session does, stops at a stop string."""
    texts = []
    for token in ids:
        stream.push(token)
        texts.append(stream.text)
        if stream.is_stopped:
            break
    stream.close()
    return [*texts, stream.text]


def text_by_searching(decode, ids: list[int], stops: list[str]) -> str:
    """The rule, token by token, from scratch."""
    for count in range(1, len(ids) + 1):
        text = decode(ids[:count])
        found = [text.find(stop) for stop in stops if stop in text]
        if found and not text.endswith(REPLACEMENT):
            return text[: min(found)]
    return decode(ids)


def assert_nothing_is_taken_back(texts: list[str]) -> None:
    for earlier, later in zip(texts, texts[1:], strict=False):
        assert later.startswith(earlier)


@REPEATABLE
@given(text=st.text(max_size=30))
def test_any_text_arrives_whole_byte_by_byte(text):
    text = text.replace(REPLACEMENT, "")
    texts = texts_while_pushing(TextStream(decode_bytes), list(text.encode()))
    assert texts[-1] == text
    assert_nothing_is_taken_back(texts)


@REPEATABLE
@given(
    ids=st.lists(st.integers(0, len(WORDS) - 1), max_size=25),
    stops=st.lists(st.text(alphabet="ab .éend", min_size=1, max_size=4), max_size=3),
)
def test_text_ends_before_the_first_stop_string_and_never_shows_any_of_it(ids, stops):
    texts = texts_while_pushing(TextStream(decode_words, stops), ids)
    assert texts[-1] == text_by_searching(decode_words, ids, stops)
    assert_nothing_is_taken_back(texts)


@REPEATABLE
@given(
    text=st.text(alphabet="aé€😀b", max_size=15),
    stops=st.lists(st.text(alphabet="aé€😀b", min_size=1, max_size=3), max_size=3),
)
def test_stop_strings_of_many_bytes_are_found_byte_by_byte(text, stops):
    ids = list(text.encode())
    texts = texts_while_pushing(TextStream(decode_bytes, stops), ids)
    assert texts[-1] == text_by_searching(decode_bytes, ids, stops)
    assert_nothing_is_taken_back(texts)


@pytest.mark.parametrize("character", ["é", "€", "😀"])
def test_a_character_is_held_back_until_its_last_byte(character):
    stream = TextStream(decode_bytes)
    stream.push(ord("x"))
    for byte in character.encode()[:-1]:
        stream.push(byte)
        assert stream.text == "x"
    stream.push(character.encode()[-1])
    assert stream.text == "x" + character


def test_a_character_left_unfinished_becomes_a_replacement_character_at_the_end():
    assert texts_while_pushing(TextStream(decode_bytes), list("x€".encode()[:-1])) == ["x", "x", "x", "x" + REPLACEMENT]


def test_a_replacement_character_inside_the_text_is_shown():
    assert texts_while_pushing(TextStream(decode_bytes), [0xFF, ord("a")])[-1] == REPLACEMENT + "a"


def test_spaces_that_depend_on_the_neighbour_are_kept():
    texts = texts_while_pushing(TextStream(decode_with_leading_space), [1, 2, 3])
    assert texts == ["word1", "word1 word2", "word1 word2 word3", "word1 word2 word3"]


def test_a_possible_beginning_of_a_stop_string_is_held_back_and_given_out_when_it_is_none():
    stream = TextStream(decode_bytes, ["STOP"])
    shown = []
    for byte in b"aSTSTOx":
        stream.push(byte)
        shown.append(stream.text)
    assert shown == ["a", "a", "a", "aST", "aST", "aST", "aSTSTOx"]


def test_a_beginning_of_a_stop_string_at_the_end_is_text():
    assert texts_while_pushing(TextStream(decode_bytes, ["STOP"]), list(b"aSTO"))[-2:] == ["a", "aSTO"]


def test_a_stop_string_inside_a_token_cuts_the_token():
    stream = TextStream(lambda ids: "".join(["one ", "tw", "o three"][token] for token in ids), ["wo t"])
    assert texts_while_pushing(stream, [0, 1, 2])[-1] == "one t"
    assert stream.is_stopped


def test_of_stop_strings_that_end_in_one_token_the_first_to_begin_counts():
    assert texts_while_pushing(TextStream(lambda ids: "abcdef" * len(ids), ["cd", "bcde"]), [0])[-1] == "a"


def test_what_is_pushed_after_a_stop_string_is_no_text():
    stream = TextStream(decode_bytes, ["b"])
    for byte in b"abc":
        stream.push(byte)
    stream.close()
    assert stream.text == "a"


def test_each_token_is_decoded_a_few_times_however_long_the_text():
    """Linear time."""
    lengths = []

    def decode(ids: list[int]) -> str:
        lengths.append(len(ids))
        return decode_bytes(ids)

    stream = TextStream(decode)
    for _ in range(500):
        stream.push(ord("a"))
    assert max(lengths) <= 2
