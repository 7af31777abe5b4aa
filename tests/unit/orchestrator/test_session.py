"""A session takes final tokens up to the one that ends it, and says why it ended."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.session import Session
from orchestrator.text_stream import TextStream

REPEATABLE = settings(derandomize=True, deadline=None)

EOS_ID = 0


def letters(ids: list[int]) -> str:
    """Token 1 is a, 2 is b, ...; the end-of-sequence token has no text."""
    return "".join(chr(ord("a") + token - 1) for token in ids if token != EOS_ID)


def make_session(max_new_tokens: int = 10, stop: tuple[str, ...] = (), **changes) -> Session:
    stream = TextStream(letters, stop)
    eos_ids = changes.pop("eos_ids", frozenset({EOS_ID}))
    return Session(prompt=[5], max_new_tokens=max_new_tokens, text_stream=stream, eos_ids=eos_ids, **changes)


@pytest.mark.parametrize(
    ("block", "taken"),
    [
        ([1, EOS_ID, 2, 3], [1, EOS_ID]),
        ([1, 2, EOS_ID], [1, 2, EOS_ID]),
        ([EOS_ID], [EOS_ID]),
        ([EOS_ID] * 3, [EOS_ID]),
    ],
    ids=["inside", "last", "alone", "many"],
)
def test_generation_ends_with_the_first_end_of_sequence_token(block, taken):
    session = make_session()
    session.commit([3])
    assert session.commit(block) == taken
    assert (session.generated, session.finish_reason) == ([3, *taken], "eos")
    assert session.text == letters([3, *taken])


def test_any_of_several_end_of_sequence_tokens_ends_generation():
    session = make_session(eos_ids=frozenset({7, 9}))
    assert session.commit([1, 9, 7]) == [1, 9]


def test_without_end_of_sequence_tokens_generation_goes_on():
    session = make_session(eos_ids=frozenset())
    assert session.commit([1, EOS_ID, 2]) == [1, EOS_ID, 2]
    assert not session.is_finished


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3])
def test_no_more_tokens_are_taken_than_wanted(max_new_tokens):
    session = make_session(max_new_tokens)
    assert session.commit([1, 2, 3, 4]) == [1, 2, 3, 4][:max_new_tokens]
    assert (session.finish_reason, session.remaining) == ("length", 0)


def test_the_end_of_sequence_as_the_last_token_wanted_is_the_reason():
    session = make_session(2)
    session.commit([1, EOS_ID])
    assert session.finish_reason == "eos"


def test_a_stop_string_inside_a_block_ends_generation_and_cuts_the_text():
    session = make_session(stop=("cd",))
    assert session.commit([1, 2, 3, 4, 5]) == [1, 2, 3, 4]
    assert (session.finish_reason, session.text) == ("stop", "ab")


def test_a_stop_string_across_two_blocks_ends_generation_without_a_trace_of_it():
    session = make_session(stop=("bcd",))
    session.commit([1, 2])
    assert session.text == "a"
    session.commit([3, 4, 5])
    assert (session.finish_reason, session.text, session.generated) == ("stop", "a", [1, 2, 3, 4])


def test_the_beginning_of_a_stop_string_at_the_end_is_text():
    session = make_session(3, stop=("cd",))
    session.commit([1, 2])
    session.commit([3, 4])
    assert (session.finish_reason, session.text) == ("length", "abc")


def test_a_stop_string_that_ends_with_the_last_token_wanted_is_the_reason():
    session = make_session(3, stop=("bc",))
    session.commit([1, 2, 3])
    assert (session.finish_reason, session.text) == ("stop", "a")


def test_a_character_left_unfinished_is_shown_at_the_end():
    stream = TextStream(lambda ids: bytes(ids).decode(errors="replace"))
    session = Session(prompt=[1], max_new_tokens=2, text_stream=stream)
    session.commit([ord("x")])
    session.commit([0xE2])
    assert session.text == "x\ufffd"


def test_a_stop_string_before_a_character_left_unfinished_is_the_reason():
    stream = TextStream(
        lambda ids: b"".join([b"ab", b"c\xe2"][token] for token in ids).decode(errors="replace"), ["bc"]
    )
    session = Session(prompt=[1], max_new_tokens=2, text_stream=stream)
    session.commit([0, 1])
    assert (session.finish_reason, session.text) == ("stop", "a")


def test_a_stop_token_ends_generation_before_it_and_comes_before_the_end_of_sequence():
    stream = TextStream(letters, ["xyz"], stop_ids={3})
    session = Session(prompt=[5], max_new_tokens=9, text_stream=stream, eos_ids=frozenset({3}))
    assert session.commit([1, 2, 3, 4]) == [1, 2, 3]
    assert (session.finish_reason, session.text) == ("stop", "ab")


def test_a_commit_after_the_end_is_refused():
    session = make_session(1)
    session.commit([1])
    with pytest.raises(AssertionError, match="length"):
        session.commit([2])


@REPEATABLE
@given(
    tokens=st.lists(st.integers(0, 4), min_size=1, max_size=30),
    cuts=st.lists(st.integers(1, 6), min_size=30, max_size=30),
    max_new_tokens=st.integers(1, 20),
    stop=st.lists(st.text(alphabet="abc", min_size=1, max_size=3), max_size=2),
)
def test_the_result_does_not_depend_on_how_tokens_are_cut_into_blocks(tokens, cuts, max_new_tokens, stop):
    one_by_one, in_blocks = make_session(max_new_tokens, tuple(stop)), make_session(max_new_tokens, tuple(stop))
    for token in tokens:
        if not one_by_one.is_finished:
            one_by_one.commit([token])
    at = 0
    for cut in cuts:
        if not in_blocks.is_finished and at < len(tokens):
            in_blocks.commit(tokens[at : at + cut])
            at += cut
    assert (in_blocks.generated, in_blocks.text) == (one_by_one.generated, one_by_one.text)
    assert in_blocks.finish_reason == one_by_one.finish_reason
