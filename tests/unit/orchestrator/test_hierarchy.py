"""What a round asks of its roles, with roles that follow a script; what comes out is in tests/lossless."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from orchestrator.hierarchy import Hierarchy
from orchestrator.rebuild_policy import RebuildPolicy
from orchestrator.round import Round
from orchestrator.session import Session
from tests.support.toy_models import no_text
from workers.messages import DRAFTER, RETRIEVAL, Draft, InnerStep, Verdict

EOS_ID = 99


@dataclass
class Script:
    """Every call of a role in order, and how roles answer: how many tokens they keep."""

    inner_accepts: int = 1
    target_accepts: int = 1
    is_full: bool = False
    target_token: int = 7
    calls: list[tuple[Any, ...]] = field(default_factory=list)

    def named(self, *names: str) -> list[tuple[Any, ...]]:
        return [call for call in self.calls if call[1] in names]


class Role:
    """Writes down each call."""

    def __init__(self, name: str, script: Script):
        self.name, self.script = name, script

    def note(self, *call: Any) -> None:
        self.script.calls.append((self.name, *call))

    def prefill(self, prompt: list[int]) -> None:
        self.note("prefill", tuple(prompt))

    def commit(self, tokens: list[int]) -> None:
        self.note("commit", tuple(tokens))


class ScriptedDrafter(Role):
    """Drafts 10, 11, 12, ... by the number of tentative tokens before."""

    def propose(self, after: list[int], count: int, branch: int = 0) -> Draft:
        self.note("propose", tuple(after), count)
        return Draft(tokens=[10 + len(after) + index for index in range(count)], origins=[DRAFTER] * count)


class ScriptedRetriever(Role):
    """Adds a 20 to what it keeps."""

    def extend(self, after: list[int], draft: Draft, branch: int = 0) -> InnerStep:
        self.note("extend", tuple(after), tuple(draft.tokens))
        kept = draft.cut(min(self.script.inner_accepts, len(draft)))
        handed_up = Draft(tokens=[*kept.tokens, 20], origins=[*kept.origins, RETRIEVAL])
        return InnerStep(draft=handed_up, num_proposed=len(draft), num_accepted=len(kept))

    def refresh(self, update: Any) -> None:
        self.note("refresh", update)

    def needs_rebuild(self) -> bool:
        return self.script.is_full


class ScriptedVerifier(Role):
    def verify(self, draft: Draft) -> Verdict:
        self.note("verify", tuple(draft.tokens))
        return Verdict(num_accepted=min(self.script.target_accepts, len(draft)), next_token=self.script.target_token)

    def reread(self) -> None:
        self.note("reread")

    def retrieval_update(self, *, rebuild: bool, budget: int | None = None) -> Any:
        self.note("retrieval_update", rebuild, *([] if budget is None else [budget]))
        return f"update, rebuild={rebuild}"


def make_hierarchy(
    script: Script,
    *,
    max_new_tokens: int = 100,
    drafter: bool = True,
    retriever: bool = True,
    rebuild: int | str = "never",
    eos_ids: tuple[int, ...] = (EOS_ID,),
    **changes,
) -> Hierarchy:
    session = Session(prompt=[1, 2], max_new_tokens=max_new_tokens, text_stream=no_text(), eos_ids=frozenset(eos_ids))
    return Hierarchy(
        session=session,
        verifier=ScriptedVerifier("target", script),
        retriever=ScriptedRetriever("retrieval", script) if retriever else None,
        drafter=ScriptedDrafter("drafter", script) if drafter else None,
        rebuild_policy=RebuildPolicy(rebuild),
        **{"gamma1": 1, "gamma2": 2, **changes},
    )


def started(script: Script, **changes) -> Hierarchy:
    hierarchy = make_hierarchy(script, **changes)
    hierarchy.start()
    script.calls.clear()
    return hierarchy


def test_the_target_alone_gives_the_first_token():
    script = Script()
    first = make_hierarchy(script).start()
    assert (first.index, first.tokens, first.proposed, first.inner_steps) == (0, [7], [], [])
    assert script.calls == [
        ("drafter", "prefill", (1, 2)),
        ("retrieval", "prefill", (1, 2)),
        ("target", "prefill", (1, 2)),
        ("target", "verify", ()),
        ("target", "commit", (7,)),
        ("retrieval", "commit", (7,)),
        ("drafter", "commit", (7,)),
        ("target", "retrieval_update", True),
        ("retrieval", "refresh", "update, rebuild=True"),
    ]


def test_a_round_drafts_then_drafts_by_retrieval_then_verifies_then_commits_then_refreshes():
    script = Script(target_accepts=3)
    record = started(script, gamma2=3).round()
    assert script.calls == [
        ("drafter", "propose", (), 1),
        ("retrieval", "extend", (), (10,)),
        ("drafter", "propose", (10, 20), 1),
        ("retrieval", "extend", (10, 20), (12,)),
        ("target", "verify", (10, 20, 12, 20)),
        ("target", "commit", (10, 20, 12, 7)),
        ("retrieval", "commit", (10, 20, 12, 7)),
        ("drafter", "commit", (10, 20, 12, 7)),
        ("target", "retrieval_update", False),
        ("retrieval", "refresh", "update, rebuild=False"),
    ]
    assert (record.proposed, record.num_accepted, record.tokens) == ([10, 20, 12, 20], 3, [10, 20, 12, 7])
    assert record.origins == [DRAFTER, RETRIEVAL, DRAFTER, RETRIEVAL]
    assert record.inner_steps == [(1, 1), (1, 1)]
    assert set(record.seconds) == {"draft", "retrieval", "verify", "refresh"}


def test_a_block_has_what_its_last_inner_step_brings_on_top_of_gamma2():
    script = Script(inner_accepts=2)
    record = started(script, gamma1=2, gamma2=2).round()
    assert script.named("verify") == [("target", "verify", (10, 11, 20))]
    assert record.proposed == [10, 11, 20]
    assert len(record.origins) == 3


def test_without_a_retriever_the_drafter_drafts_gamma2_tokens_for_the_target():
    script = Script(target_accepts=0)
    record = started(script, retriever=False, gamma1=1, gamma2=5).round()
    assert script.named("propose") == [("drafter", "propose", (), 5)]
    assert (record.tokens, record.inner_steps, record.rebuilt) == ([7], [], False)
    assert not script.named("extend", "refresh", "retrieval_update")


@pytest.mark.parametrize("changes", [{"drafter": False}, {"gamma1": 0}])
def test_without_drafter_or_gamma1_the_retrieval_draft_goes_token_by_token(changes):
    script = Script()
    record = started(script, gamma2=3, **changes).round()
    assert script.named("propose") == []
    assert record.proposed == [20, 20, 20]
    assert record.inner_steps == [(0, 0)] * 3


@pytest.mark.parametrize("changes", [{"gamma2": 0}, {"drafter": False, "retriever": False}])
def test_without_gamma2_or_drafts_the_target_decodes_alone(changes):
    script = Script()
    hierarchy = started(script, **changes)
    assert [hierarchy.round().tokens for _ in range(3)] == [[7]] * 3
    assert not script.named("propose", "extend")


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("target_accepts", [0, 1, 100])
@pytest.mark.parametrize("retriever", [True, False])
def test_exactly_the_wanted_number_of_tokens_is_generated(retriever, target_accepts, max_new_tokens):
    script = Script(target_accepts=target_accepts, target_token=7)
    hierarchy = make_hierarchy(script, max_new_tokens=max_new_tokens, retriever=retriever, gamma1=0, gamma2=3)
    rounds = [hierarchy.start()]
    while not hierarchy.session.is_finished:
        rounds.append(hierarchy.round())
    assert len(hierarchy.session.generated) == max_new_tokens
    assert [token for record in rounds for token in record.tokens] == hierarchy.session.generated
    assert [record.index for record in rounds] == list(range(len(rounds)))


@pytest.mark.parametrize(("max_new_tokens", "count"), [(2, 0), (3, 1), (4, 2), (9, 5)])
def test_no_more_is_drafted_than_may_still_be_generated_beside_the_targets_own_token(max_new_tokens, count):
    script = Script()
    started(script, retriever=False, gamma2=5, max_new_tokens=max_new_tokens).round()
    assert [call[-1] for call in script.named("propose")] == ([count] if count else [])


def test_the_end_of_sequence_inside_the_accepted_part_is_what_roles_and_records_see_last():
    script = Script(inner_accepts=2, target_accepts=3)
    hierarchy = started(script, gamma1=2, gamma2=3, eos_ids=(11,))
    record = hierarchy.round()
    assert (record.tokens, hierarchy.session.finish_reason) == ([10, 11], "eos")
    assert {call[2] for call in script.named("commit")} == {(10, 11)}


@pytest.mark.parametrize("target_accepts", [0, 3], ids=["residual", "bonus"])
def test_the_end_of_sequence_as_the_targets_own_token_ends_generation(target_accepts):
    script = Script(target_accepts=target_accepts)
    hierarchy = started(script, gamma2=3)
    script.target_token = EOS_ID
    record = hierarchy.round()
    assert record.tokens == [*record.proposed[:target_accepts], EOS_ID]
    assert hierarchy.session.finish_reason == "eos"


def test_after_the_last_token_nothing_is_refreshed():
    script = Script()
    record = started(script, max_new_tokens=2).round()
    assert not script.named("retrieval_update", "refresh")
    assert not record.rebuilt


def test_a_full_retrieval_cache_is_rebuilt_at_once():
    script = Script()
    hierarchy = started(script)
    assert not hierarchy.round().rebuilt
    script.is_full = True
    assert hierarchy.round().rebuilt
    assert [call[2] for call in script.named("retrieval_update")] == [False, True]


def test_the_policy_rebuilds_and_is_told_of_every_rebuild():
    script = Script()
    hierarchy = started(script, rebuild=3)
    assert [hierarchy.round().rebuilt for _ in range(7)] == [False, False, True, False, False, True, False]
    script.is_full = True
    hierarchy.round()
    script.is_full = False
    assert [hierarchy.round().rebuilt for _ in range(3)] == [False, False, True]


def test_seconds_of_a_round_are_its_own():
    script = Script()
    hierarchy = started(script)
    first, second = hierarchy.round(), hierarchy.round()
    assert first.seconds is not second.seconds
    assert all(seconds >= 0 for seconds in second.seconds.values())
    assert isinstance(second, Round)


class Pace:
    """Chooses what it is told to; see orchestrator.pace.AdaptivePace."""

    def __init__(self, *choices: tuple[int, int], budget: int, next_budget: int):
        self._choices, self.learnt = iter(choices), []
        self.gamma1, self.gamma2, self.budget, self._next_budget = 9, 9, budget, next_budget

    def choose(self) -> None:
        self.gamma1, self.gamma2 = next(self._choices)

    def wants_rebuild(self) -> bool:
        changes, self.budget = len(self.learnt) == 2, self._next_budget if len(self.learnt) >= 2 else self.budget
        return changes

    def learn(self, round_) -> None:
        self.learnt.append(round_)


def test_a_pace_chooses_gammas_and_budget_and_learns_from_each_round():
    script = Script(target_accepts=100, inner_accepts=100)
    pace = Pace((0, 1), (2, 3), (1, 0), budget=64, next_budget=128)
    hierarchy = make_hierarchy(script, gamma1=9, gamma2=9, pace=pace)
    rounds = [hierarchy.start(), *(hierarchy.round() for _ in range(3))]
    assert pace.learnt == rounds
    assert [(each.gamma1, each.gamma2, each.budget) for each in rounds[1:]] == [(0, 1, 64), (2, 3, 64), (1, 0, 128)]
    assert [len(each.proposed) for each in rounds] == [0, 1, 3, 0]
    assert [each.rebuilt for each in rounds] == [True, False, True, False]
    updates = [call[2:] for call in script.calls if call[1] == "retrieval_update"]
    assert updates == [(True, 64), (False, 64), (True, 128), (False, 128)]


def test_no_block_goes_past_the_original_length_and_there_all_is_read_again():
    script = Script(target_accepts=9)
    hierarchy = started(script, original_length=6, gamma1=0, gamma2=9, rebuild="never")
    rounds = [hierarchy.round() for _ in range(3)]
    # The prompt has 2 tokens, the first round generated one: 3 more are judged in the way of a short text, and one
    # comes behind them, with which the text is a long one.
    assert [len(call[2]) for call in script.named("verify")] == [3, 9, 9]
    assert [record.passes_original_length for record in rounds] == [True, False, False]
    assert [record.rebuilt for record in rounds] == [True, False, False]
    calls = [call[:2] for call in script.calls]
    assert calls.count(("target", "reread")) == 1
    first = calls.index(("target", "reread"))
    assert calls[first - 1] == ("drafter", "commit") and calls[first + 1] == ("target", "retrieval_update")


def test_a_text_that_ends_at_its_original_length_is_not_read_again():
    script = Script(target_accepts=9)
    hierarchy = started(script, original_length=6, gamma1=0, gamma2=9, max_new_tokens=5)
    assert hierarchy.round().tokens and hierarchy.session.is_finished
    assert not script.named("reread")
