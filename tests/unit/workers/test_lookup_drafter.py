"""Drafts by lookup continue the last place where the longest suffix occurred before."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.lookup_drafter import LookupDrafter
from workers.messages import DRAFTER

REPEATABLE = settings(derandomize=True, deadline=None)

TOKENS = st.lists(st.integers(0, 2), max_size=40)


def drafter_with(prompt: list[int], *, one_hot: bool = False) -> LookupDrafter:
    drafter = LookupDrafter(10, one_hot=one_hot)
    drafter.prefill(prompt)
    return drafter


def lookup(tokens: list[int], after: list[int], count: int) -> list[int]:
    """The same by searching, without an index: a match ends before the last committed token."""
    suffix = (tokens + after)[-LookupDrafter.MAX_MATCH :]
    for length in range(min(len(suffix), LookupDrafter.MAX_MATCH), LookupDrafter.MIN_MATCH - 1, -1):
        for end in range(len(tokens) - 1, length - 1, -1):
            if tokens[end - length : end] == suffix[-length:]:
                return tokens[end : end + count]
    return []


@REPEATABLE
@given(prompt=TOKENS, commits=st.lists(TOKENS, max_size=4), after=st.lists(st.integers(0, 2), max_size=8))
def test_drafts_are_those_of_a_plain_search(prompt, commits, after):
    drafter, tokens = drafter_with(prompt), list(prompt)
    for commit in commits:
        drafter.commit(commit)
        tokens += commit
        assert drafter.propose(after, 5).tokens == lookup(tokens, after, 5)
    assert drafter.propose(after, 5).tokens == lookup(tokens, after, 5)


def test_the_latest_of_equal_matches_is_continued():
    assert drafter_with([1, 2, 3, 1, 2, 4, 1, 2]).propose([], 2).tokens == [4, 1]


def test_a_longer_match_goes_before_a_later_one():
    assert drafter_with([9, 1, 2, 3, 8, 1, 2, 4, 9, 1, 2]).propose([], 1).tokens == [3]


def test_at_most_count_tokens_are_drafted_and_fewer_at_the_end():
    drafter = drafter_with([1, 2, 3, 4, 5, 1, 2])
    assert drafter.propose([], 3).tokens == [3, 4, 5]
    assert drafter.propose([], 50).tokens == [3, 4, 5, 1, 2]


def test_nothing_is_drafted_where_nothing_matches():
    for prompt in ([], [1], [1, 2], [1, 2, 3]):
        drafter = drafter_with(prompt, one_hot=True)
        assert len(drafter.propose([], 4)) == 0


def test_tentative_tokens_are_matched_but_not_kept():
    drafter = drafter_with([1, 2, 3, 4, 1])
    assert drafter.propose([2], 2).tokens == [3, 4]
    assert drafter.propose([], 2).tokens == []


def test_prefill_forgets_the_session_before():
    drafter = drafter_with([1, 2, 3, 1, 2])
    drafter.prefill([5, 1, 2])
    assert drafter.propose([], 3).tokens == []


def test_a_draft_carries_all_its_probability_on_its_tokens_where_wanted():
    draft = drafter_with([1, 2, 3, 4, 1, 2], one_hot=True).propose([], 2)
    assert torch.equal(torch.stack(draft.probs), torch.eye(10)[[3, 4]])
    assert draft.origins == [DRAFTER, DRAFTER]
    assert drafter_with([1, 2, 3, 4, 1, 2]).propose([], 2).probs is None
