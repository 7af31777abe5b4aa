"""Generated text is what decoding all its tokens at once gives, whatever the tokenizer; stops are found in it."""

from __future__ import annotations

import re
from functools import cache
from os.path import commonprefix

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.assembly.generated_text import make_stops, make_text_stream
from orchestrator.text_stream import TextStream
from tests.support import tiny_tokenizers
from tests.support.fake_task import task_of

REPEATABLE = settings(derandomize=True, deadline=None, max_examples=50)
every_kind = pytest.mark.parametrize("kind", tiny_tokenizers.KINDS, ids=lambda kind: kind.__name__)
UNFINISHED = "\ufffd"


@cache
def tokenizer_of(kind):
    return kind()


def some_ids(data, tokenizer, **sizes) -> list[int]:
    """Special tokens and single bytes are as frequent as words; an embedding has some rows that are no token."""
    known = tokenizer.get_vocab()
    special = [*tokenizer.added_tokens_decoder, len(known) + 1]
    texts = [known[piece] for piece in known if len(piece) > 1 and not piece.startswith("<0x")]
    choices = st.one_of(st.sampled_from(special), st.sampled_from(texts), st.integers(0, len(known) - 1))
    return data.draw(st.lists(choices, **{"max_size": 12} | sizes))


def at_once(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def streamed(stream: TextStream, ids: list[int]) -> str:
    """The text at the end; nothing that was shown before is taken back."""
    shown = ""
    for token in ids:
        stream.push(token)
        shown += "".join(text for _, text in stream.take_pieces())
        assert shown == stream.text
        if stream.is_stopped:
            break
    stream.close()
    shown += "".join(text for _, text in stream.take_pieces())
    assert shown == stream.text
    return shown


@every_kind
@REPEATABLE
@given(data=st.data())
def test_an_answer_is_what_its_tokens_are_decoded_to_at_once(kind, data):
    tokenizer = tokenizer_of(kind)
    ids = some_ids(data, tokenizer)
    assert streamed(make_text_stream(task_of(tokenizer, is_continuation=False)), ids) == at_once(tokenizer, ids)


@every_kind
@REPEATABLE
@given(data=st.data())
def test_a_continuation_is_what_comes_after_the_prompt(kind, data):
    tokenizer = tokenizer_of(kind)
    prompt, ids = some_ids(data, tokenizer, max_size=40), some_ids(data, tokenizer)
    before, whole = at_once(tokenizer, prompt), at_once(tokenizer, prompt + ids)
    text = streamed(make_text_stream(task_of(tokenizer, prompt)), ids)
    # A character that the prompt began belongs to the continuation.
    assert text == whole[len(commonprefix([before, whole])) :]


@every_kind
@REPEATABLE
@given(data=st.data())
def test_stop_strings_are_found_as_in_the_text_at_once(kind, data):
    tokenizer = tokenizer_of(kind)
    ids = some_ids(data, tokenizer)
    stops = data.draw(st.lists(st.sampled_from([" run", " r", "s", " ", "  ", "cat", "s run", "é"]), max_size=3))
    expected = at_once(tokenizer, ids)
    for count in range(1, len(ids) + 1):
        text = at_once(tokenizer, ids[:count])
        found = [text.find(stop) for stop in stops if stop in text]
        if found and not text.endswith(UNFINISHED):
            expected = text[: min(found)]
            break
    assert streamed(make_text_stream(task_of(tokenizer, stop=stops, is_continuation=False)), ids) == expected


def ids_of(tokenizer, *pieces: str) -> list[int]:
    return [tokenizer.get_vocab()[piece] for piece in pieces]


@pytest.mark.parametrize("kind", [tiny_tokenizers.llama_2, tiny_tokenizers.metaspace])
def test_a_special_token_between_words_takes_no_space(kind):
    tokenizer = tokenizer_of(kind)
    ids = ids_of(tokenizer, "s", "<s>", "▁run")
    assert streamed(make_text_stream(task_of(tokenizer, is_continuation=False)), ids) == "s run"
    stream = make_text_stream(task_of(tokenizer, stop=[" run"], is_continuation=False))
    assert streamed(stream, ids) == "s" and stream.is_stopped


@pytest.mark.parametrize("kind", [tiny_tokenizers.llama_2, tiny_tokenizers.metaspace])
def test_a_continuation_keeps_its_first_space_and_a_stop_with_it_is_found(kind):
    tokenizer = tokenizer_of(kind)
    prompt, ids = ids_of(tokenizer, "<s>", "▁the", "▁cat", "</s>"), ids_of(tokenizer, "▁run", "s")
    assert streamed(make_text_stream(task_of(tokenizer, prompt)), ids) == " runs"
    stream = make_text_stream(task_of(tokenizer, prompt, stop=[" run"]))
    assert streamed(stream, ids) == "" and stream.is_stopped


def test_a_character_that_the_prompt_began_is_the_continuations():
    tokenizer = tokenizer_of(tiny_tokenizers.llama_2)
    prompt, ids = ids_of(tokenizer, "▁the", "<0xC3>"), ids_of(tokenizer, "<0xA9>", "s")
    assert streamed(make_text_stream(task_of(tokenizer, prompt)), ids) == "és"


def test_a_newline_of_one_byte_stops_at_once():
    tokenizer = tokenizer_of(tiny_tokenizers.llama_2)
    stream = make_text_stream(task_of(tokenizer, stop=[r"\n"], is_continuation=False))
    for token in ids_of(tokenizer, "▁run", "<0x0A>"):
        stream.push(token)
    assert stream.is_stopped and stream.text == "run"


def test_bytes_that_a_later_one_spoils_are_not_shown_before():
    tokenizer = tokenizer_of(tiny_tokenizers.llama_2)
    ids = ids_of(tokenizer, "s", "<0x41>", "<0xE2>", "cat")
    assert streamed(make_text_stream(task_of(tokenizer, is_continuation=False)), ids) == "s\ufffd\ufffdcat"


@pytest.mark.parametrize("piece", ["</s>", "<0x0A>", "▁"])
def test_a_token_repeated_for_ever_costs_linear_time(piece):
    tokenizer = tokenizer_of(tiny_tokenizers.llama_2)
    (token,), lengths = ids_of(tokenizer, piece), []
    task = task_of(tokenizer, is_continuation=False)
    whole = make_text_stream(task)
    decode = whole._decode
    whole._decode = lambda ids: lengths.append(len(ids)) or decode(ids)
    assert streamed(whole, [token] * 2000) == at_once(tokenizer, [token] * 2000)
    assert max(lengths, default=0) <= 600


@pytest.mark.parametrize("kind", [tiny_tokenizers.llama_2, tiny_tokenizers.byte_level])
def test_a_stop_string_that_is_a_special_token_ends_before_it(kind):
    tokenizer = tokenizer_of(kind)
    text, call = tokenizer.encode("the cat", add_special_tokens=False), tokenizer.get_vocab()["[CALL]"]
    stream = make_text_stream(task_of(tokenizer, stop=["[CALL]", "the cats"], is_continuation=False))
    assert streamed(stream, [*text, call, *text]) == "the cat" and stream.is_stopped


def test_what_is_held_back_before_a_special_stop_is_text():
    tokenizer = tokenizer_of(tiny_tokenizers.byte_level)
    letter, euro = (tokenizer.encode(text, add_special_tokens=False) for text in ("r", "€"))
    stream = make_text_stream(task_of(tokenizer, stop=["[CALL]", "r€"], is_continuation=False))
    assert streamed(stream, [*letter, euro[0], tokenizer.get_vocab()["[CALL]"]]) == "r\ufffd" and stream.is_stopped


def notes_of(kind, *stops: str) -> dict[str, str]:
    return make_stops(list(stops), tokenizer_of(kind)).notes


def test_stops_are_told_with_their_token():
    tokenizer = tokenizer_of(tiny_tokenizers.llama_2)
    stops = make_stops(["the cat", "[CALL]"], tokenizer)
    assert stops.to_plain() == [
        {"text": "the cat", "token_id": None, "note": None},
        {"text": "[CALL]", "token_id": tokenizer.get_vocab()["[CALL]"], "note": None},
    ]


@every_kind
def test_usual_stops_raise_no_doubt(kind):
    assert notes_of(kind, "run", "the cat", "?", ": ", "[CALL]", "</s>") == {}


@pytest.mark.parametrize("kind", [tiny_tokenizers.llama_2, tiny_tokenizers.byte_level])
def test_with_all_bytes_any_text_can_be_written(kind):
    assert notes_of(kind, "\n\n", "é", "\U0001f600", "STOP", "\u0301", "</answer>", "[END]", "<think>") == {}


@pytest.mark.parametrize(
    ("kind", "stop", "words"),
    [
        (tiny_tokenizers.word_piece, "\n\n", r"never be found: no token of model.target has '\\n'"),
        (tiny_tokenizers.word_piece, "STOP", "never be found: no token of model.target has 'T'"),
        (tiny_tokenizers.suffixes, "cat!", "never be found: no token of model.target has '!'"),
        (tiny_tokenizers.llama_2, "<|im_end|>", "no token of model.target"),
        (tiny_tokenizers.llama_2, "[TOOL_CALLS]", "no token of model.target"),
        (tiny_tokenizers.llama_2, "<｜User｜>", "no token of model.target"),
        (tiny_tokenizers.llama_2, "the cat</s>", "special token '</s>' leaves no trace"),
        (tiny_tokenizers.byte_level, "[CALL][", r"special token '\[CALL\]' leaves no trace"),
    ],
)
def test_a_stop_that_may_never_be_found_is_noted_in_one_line(kind, stop, words):
    (note,) = notes_of(kind, stop, "run").values()
    assert re.search(words, note) and "\n" not in note
