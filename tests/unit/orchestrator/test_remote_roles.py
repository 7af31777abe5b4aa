"""orchestrator/remote_roles.py: a role out of order drafts nothing; the ranks of a verifier agree, or the run ends."""

from __future__ import annotations

import pytest

from conf.schema import PlacementKind
from orchestrator import crew as crew_module
from orchestrator.calls import RunFailedError
from orchestrator.remote_roles import RemoteDrafter, RemoteRetriever, RemoteVerifier
from tests.support.fake_crew import fake_crew
from workers.messages import (
    Built,
    Commit,
    Draft,
    Ended,
    Extend,
    InnerStep,
    MakeUpdate,
    NeedsRebuild,
    Plain,
    Prefill,
    Propose,
    Reply,
    TakeUpdate,
    UpdateNotice,
    Verdict,
    Verify,
)
from workers.process.peers import GUARD

DRAFT = Draft(tokens=[5, 6], origins=["drafter"] * 2)
STEP = InnerStep(draft=DRAFT, num_proposed=2, num_accepted=1)
VERDICT = Verdict(num_accepted=1, next_token=9)
RESULTS = {
    Propose: DRAFT,
    Extend: STEP,
    Verify: VERDICT,
    NeedsRebuild: Plain(True),
    MakeUpdate: UpdateNotice(is_rebuild=True, length=3),
}


@pytest.fixture(autouse=True)
def no_sleep(monkeypatch):
    monkeypatch.setattr(crew_module.time, "sleep", lambda seconds: None)


def answer(peer, request):
    return RESULTS.get(type(request), Plain())


def made(role: str, kind: PlacementKind = PlacementKind.pipeline, world_size: int = 5):
    crew, hub, notes = fake_crew(kind, world_size)
    hub.answer = answer
    placement, connected = crew.placement, []

    def connect(built: Built) -> bool:
        connected.append(built)
        return True

    roles = {
        "drafter": lambda: RemoteDrafter(crew, placement.drafter_rank),
        "retriever": lambda: RemoteRetriever(
            crew, placement.retriever_ranks, lambda built: not connected.append(built)
        ),
        "verifier": lambda: RemoteVerifier(crew, placement.verifier_ranks),
    }
    return roles[role](), crew, hub, connected


def lose(crew, hub, rank: int) -> None:
    hub.tell(f"{rank}.{GUARD}", Ended(-9, rank))
    crew.pump(0)


def come_back(crew, hub, rank: int) -> None:
    hub.answer = lambda peer, request: Built([], {"memory": 1}) if peer.endswith("process") else answer(peer, request)
    for line in ("beat", *crew.members[rank].roles, "process"):
        hub.greet(f"{rank}.{line}", pid=70 + rank)
    for _ in range(3):
        crew.pump(0)


def test_a_drafter_is_told_in_order_and_asked():
    drafter, crew, hub, _ = made("drafter")
    drafter.prefill([1, 2])
    drafter.commit([3])
    assert drafter.propose([4], 2, 1) == DRAFT
    assert hub.requests_to("1.drafter") == [Prefill([1, 2], 0), Commit([3]), Propose([4], 2, 1)]


def test_without_its_process_a_drafter_drafts_nothing():
    drafter, crew, hub, _ = made("drafter")
    drafter.prefill([1, 2])
    lose(crew, hub, 1)
    assert drafter.propose([], 2) == Draft()
    drafter.commit([3])
    assert hub.requests_to("1.drafter") == [Prefill([1, 2], 0)]


def test_a_drafter_that_is_back_reads_all_there_is_and_goes_on_with_the_same_random_numbers():
    drafter, crew, hub, _ = made("drafter")
    drafter.prefill([1, 2])
    drafter.commit([3])
    lose(crew, hub, 1)
    drafter.commit([4, 5])
    come_back(crew, hub, 1)
    assert hub.requests_to("1.drafter")[-1] == Prefill([1, 2, 3, 4, 5], 2)
    assert drafter.propose([], 2) == DRAFT


def test_one_that_dies_while_it_is_asked_drafts_nothing():
    drafter, crew, hub, _ = made("drafter")
    hub.answer = lambda peer, request: hub.tell(f"1.{GUARD}", Ended(-9, 1))
    assert drafter.propose([], 2) == Draft()


def test_without_its_process_a_retriever_keeps_nothing():
    retriever, crew, hub, _ = made("retriever")
    retriever.prefill([1])
    assert retriever.extend([], DRAFT) == STEP and retriever.needs_rebuild()
    lose(crew, hub, 2)
    assert retriever.extend([], DRAFT) == InnerStep(draft=Draft(), num_proposed=2, num_accepted=0)
    assert retriever.needs_rebuild() is False
    retriever.refresh([])
    assert not any(isinstance(request, TakeUpdate) for request in hub.requests_to("2.retriever"))


def test_a_retriever_that_is_back_is_connected_and_rebuilt_before_it_drafts():
    retriever, crew, hub, connected = made("retriever")
    retriever.prefill([1])
    lose(crew, hub, 2)
    come_back(crew, hub, 2)
    retriever.refresh([UpdateNotice(is_rebuild=False, length=1)])  # made for the memory of the process before
    assert len(retriever.extend([], DRAFT).draft) == 0, "its cache is empty"
    assert retriever.needs_rebuild() is True
    assert connected == [Built([], {"memory": 1})]
    retriever.refresh([UpdateNotice(is_rebuild=True, length=1)])
    assert retriever.extend([], DRAFT) == STEP
    taken = [request for request in hub.requests_to("2.retriever") if isinstance(request, TakeUpdate)]
    assert taken == [TakeUpdate([UpdateNotice(is_rebuild=True, length=1)])]


def test_all_ranks_of_a_verifier_are_asked_and_one_answers():
    verifier, crew, hub, _ = made("verifier")
    verifier.prefill([1, 2])
    verifier.commit([3])
    assert verifier.verify(DRAFT) == VERDICT
    for peer in ("3.verifier", "4.verifier"):
        assert hub.requests_to(peer) == [Prefill([1, 2], 0), Commit([3]), Verify(DRAFT)]
    assert verifier.retrieval_update(rebuild=True) == [RESULTS[MakeUpdate]] * 2


def test_a_verification_in_three_parts():
    verifier, crew, hub, _ = made("verifier")
    hub.answer = lambda peer, request: None
    verifier.begin_verify(DRAFT)
    assert verifier.is_verifying()
    for peer in ("3.verifier", "4.verifier"):
        hub.tell(peer, Reply(hub.last_call_id - (peer == "3.verifier"), VERDICT, "s"))
    assert not verifier.is_verifying() and verifier.finish_verify() == VERDICT


@pytest.mark.parametrize(
    "other",
    [
        Reply(0, VERDICT, "9 tokens aa"),
        Reply(0, Verdict(num_accepted=0, next_token=9), "9 tokens bb"),
        Reply(0, Verdict(num_accepted=1, next_token=8), "9 tokens bb"),
    ],
    ids=["state", "accepted", "token"],
)
@pytest.mark.parametrize("in_parts", [False, True])
def test_ranks_that_disagree_end_the_run_and_both_are_told(other, in_parts):
    verifier, crew, hub, _ = made("verifier")

    def disagree(peer, request):
        if peer == "4.verifier":
            return Reply(hub.last_call_id, other.result, other.state)
        return Reply(hub.last_call_id, VERDICT, "9 tokens bb")

    hub.answer = disagree
    with pytest.raises(
        RunFailedError, match="ranks disagree after Verify: 3.verifier has .*, 4.verifier has "
    ) as failure:
        if in_parts:
            verifier.begin_verify(DRAFT)
            verifier.finish_verify()
        else:
            verifier.verify(DRAFT)
    assert (failure.value.role, failure.value.rank) == ("verifier", 4)
    assert "bb" in str(failure.value) and other.state in str(failure.value)


def test_ranks_of_a_retriever_must_draft_alike_but_only_the_first_sends_distributions():
    retriever, crew, hub, _ = made("retriever", PlacementKind.colocated, 2)
    with_probs = InnerStep(
        draft=Draft(tokens=[5, 6], origins=["drafter"] * 2, probs=["p", "q"]), num_proposed=2, num_accepted=1
    )
    hub.answer = lambda peer, request: with_probs if peer == "0.retriever" else STEP
    assert retriever.extend([], DRAFT) is with_probs
    other = InnerStep(draft=Draft(tokens=[5, 7]), num_proposed=2, num_accepted=1)
    hub.answer = lambda peer, request: STEP if peer == "0.retriever" else other
    with pytest.raises(RunFailedError, match="ranks disagree after Extend"):
        retriever.extend([], DRAFT)
