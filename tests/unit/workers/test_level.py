"""A level's cache follows the sequence it is asked about, reads nothing twice, and rolls back what was not kept."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.toy_models import EXACT, MarkovModel
from workers.acceptance import KeyedRandom, MaximalCoupling
from workers.level import ReadingLevel
from workers.messages import Draft
from workers.retrieval_drafter import RetrievalDrafter
from workers.target_verifier import TargetVerifier

REPEATABLE = settings(derandomize=True, deadline=None)

SYMBOLS = 3


class WholePrefixModel(MarkovModel):
    """Its one logit is different for every sequence of tokens held."""

    def __init__(self):
        super().__init__(torch.zeros(SYMBOLS, 1), num_symbols=SYMBOLS)

    def append(self, tokens: list[int], num_logits: int) -> torch.Tensor:
        super().append(tokens, num_logits)
        ends = range(len(self.tokens) - num_logits + 1, len(self.tokens) + 1)
        return torch.tensor([[fingerprint(self.tokens[:end])] for end in ends])


def fingerprint(tokens: list[int]) -> int:
    number = 1
    for token in tokens:
        number = number * SYMBOLS + token
    return number


def level_with_prompt(prompt: list[int]) -> ReadingLevel:
    level = ReadingLevel(WholePrefixModel())
    level.prefill(prompt)
    return level


TOKENS = st.lists(st.integers(0, SYMBOLS - 1), max_size=4)


@REPEATABLE
@given(
    prompt=st.lists(st.integers(0, SYMBOLS - 1), min_size=1, max_size=5),
    steps=st.lists(st.tuples(st.booleans(), TOKENS, TOKENS), max_size=12),
)
def test_logits_are_those_of_the_sequence_asked_about_whatever_came_before(prompt, steps):
    level, committed = level_with_prompt(prompt), list(prompt)
    for is_commit, after, draft in steps:
        if is_commit and after:
            level.commit(after)
            committed += after
            assert level.model.tokens == committed[: level.model.length]
        else:
            logits = level.logits_after(after, draft)
            whole = committed + after + draft
            ends = range(len(whole) - len(draft), len(whole) + 1)
            assert logits[:, 0].tolist() == [fingerprint(whole[:end]) for end in ends]
            assert level.model.tokens == whole
    assert level.committed == committed


def test_prefill_reads_all_but_the_prompts_last_token():
    level = level_with_prompt([1, 2, 0])
    assert level.model.tokens == [1, 2]
    assert level_with_prompt([1]).model.tokens == []


def test_prefill_forgets_the_session_before():
    level = level_with_prompt([1, 2, 0])
    level.logits_after([], [1, 1])
    level.commit([1, 1, 2])
    level.prefill([0, 0])
    assert (level.model.tokens, level.committed, level.num_commits) == ([0], [0, 0], 0)
    assert level.logits_after([1], []).tolist() == [[fingerprint([0, 0, 1])]]


def test_drafting_token_by_token_reads_each_token_once():
    level = level_with_prompt([0, 1])
    for drafted in ([], [2], [2, 1], [2, 1, 0]):
        level.logits_after(drafted, [])
    assert level.model.num_read == 4


@pytest.mark.parametrize(
    ("final", "num_read"), [([2, 1, 0], 1), ([2, 1, 1], 1), ([2, 0], 1), ([1], 1), ([2, 1, 0, 2], 1)]
)
def test_after_a_commit_only_the_token_of_the_verifiers_own_is_read(final, num_read):
    """Committed: some of the draft [2, 1, 0] and one more token."""
    level = level_with_prompt([0, 1])
    level.logits_after([], [2, 1, 0])
    before = level.model.num_read
    level.commit(final)
    level.logits_after([], [])
    assert level.model.num_read - before == num_read


def test_a_commit_rolls_back_what_was_rejected():
    level = level_with_prompt([0, 1])
    level.logits_after([], [2, 1, 0])
    level.commit([2, 2])
    assert level.model.tokens == [0, 1, 2]


def test_asking_again_reads_only_the_last_token_again():
    level = level_with_prompt([0, 1])
    first = level.logits_after([2], [1])
    before = level.model.num_read
    assert torch.equal(level.logits_after([2], [1]), first)
    assert level.model.num_read - before == 2


def retrieval_level() -> tuple[TargetVerifier, RetrievalDrafter]:
    table = torch.zeros(SYMBOLS, SYMBOLS, dtype=torch.float64)
    verifier = TargetVerifier(MarkovModel(table), MaximalCoupling(EXACT, KeyedRandom(0), 3))
    retriever = RetrievalDrafter(MarkovModel(table), MaximalCoupling(EXACT, KeyedRandom(0), 2))
    for role in (verifier, retriever):
        role.prefill([0, 1, 2])
    return verifier, retriever


def test_the_retrieval_draft_reads_no_prompt_and_takes_it_from_the_verifier():
    verifier, retriever = retrieval_level()
    assert retriever.model.tokens == []
    token = verifier.verify(Draft()).next_token
    for role in (verifier, retriever):
        role.commit([token])
    retriever.refresh(verifier.retrieval_update(rebuild=True))
    assert retriever.model.tokens == [0, 1, 2]
    retriever.extend([], Draft())
    assert retriever.model.num_read == 1


@pytest.mark.parametrize("rebuild", [False, True])
def test_after_a_refresh_the_retrieval_draft_reads_only_what_the_verifier_did_not(rebuild):
    verifier, retriever = retrieval_level()
    token = verifier.verify(Draft()).next_token
    for role in (verifier, retriever):
        role.commit([token])
    retriever.refresh(verifier.retrieval_update(rebuild=True))
    for _ in range(20):
        block = Draft()
        while len(block) < 3:
            block.extend(retriever.extend(block.tokens, Draft()).draft)
        verdict = verifier.verify(block)
        tokens = [*block.tokens[: verdict.num_accepted], verdict.next_token]
        for role in (verifier, retriever):
            role.commit(tokens)
        retriever.refresh(verifier.retrieval_update(rebuild=rebuild))
        assert retriever.model.tokens == verifier.model.tokens == verifier.committed[:-1]
        before = retriever.model.num_read
        retriever.logits_after([], [])
        assert retriever.model.num_read - before == 1


def verifier_with(prompt: list[int], num_commits: int = 0) -> TargetVerifier:
    verifier = TargetVerifier(WholePrefixModel(), coupling=None)
    verifier.prefill(prompt, num_commits)
    return verifier


def test_state_is_that_of_a_level_that_came_there_another_way():
    one, other = verifier_with([1, 2]), verifier_with([1, 2, 0, 1], num_commits=2)
    first = one.state()
    one.commit([0])
    one.state()
    one.commit([1])
    one.logits_after([], [])
    other.logits_after([], [])
    assert one.state() == other.state() != first
    one.prefill([1, 2])
    assert one.state() == first


def differs_in_tokens(level: ReadingLevel) -> None:
    level.prefill([1, 0, 0])


def differs_in_commits(level: ReadingLevel) -> None:
    level.num_commits += 1


def differs_in_cache(level: ReadingLevel) -> None:
    level.logits_after([], [2])


@pytest.mark.parametrize("change", [differs_in_tokens, differs_in_commits, differs_in_cache])
def test_states_differ_with_what_ranks_must_agree_on(change):
    level, same = verifier_with([1, 2, 0]), verifier_with([1, 2, 0])
    assert level.state() == same.state()
    change(level)
    assert level.state() != same.state()
