"""orchestrator/crew.py: what is seen of a process, and what becomes of it; with a hub and a clock of the test's."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from conf.schema import ConfigError, PlacementConfig, PlacementKind
from orchestrator import crew as crew_module
from orchestrator.calls import RoleLostError, RunFailedError
from orchestrator.crew import Crew
from orchestrator.placement import place
from tests.support.fake_crew import LIMITS, Clock, FakeHub, fake_crew
from tiers.errors import DamagedBlockError
from workers.messages import (
    Beat,
    Build,
    Built,
    Close,
    Commit,
    DumpStacks,
    Ended,
    Hello,
    Plain,
    Prefill,
    Propose,
    Reply,
    Restart,
)
from workers.process.peers import BEAT, GUARD, PROCESS

DRAFTER, RETRIEVER, VERIFIERS = "1.drafter", "2.retriever", ("3.verifier", "4.verifier")
PROPOSE = Propose([], 2)
SILENT = None


@pytest.fixture(autouse=True)
def no_sleep(monkeypatch):
    monkeypatch.setattr(crew_module.time, "sleep", lambda seconds: None)


def asked_in_vain(crew, peer: str, request, timeout_s: float | None = None):
    return crew.wait(crew.post(peer, request), timeout_s)


def nothing(peer, request):
    return None


def raising(**errors):
    """An answer that raises what is given for a peer, `p3_verifier` for 3.verifier."""

    def answer(peer, request):
        if error := errors.get("p" + peer.replace(".", "_")):
            raise error
        return Plain()

    return answer


# ---- Coming together. ----


def test_gathers_all_lines_of_all_processes():
    crew, hub, _ = fake_crew()
    assert {rank: member.pid for rank, member in crew.members.items()} == {1: 1, 2: 2, 3: 3, 4: 4}
    assert not any(member.is_lost for member in crew.members.values())


def test_who_does_not_come_in_time_is_named():
    clock = Clock()
    crew = Crew(hub := FakeHub(clock), place(PlacementConfig(kind=PlacementKind.pipeline), 4), LIMITS, clock=clock)
    for rank in (1, 3):
        for line in (PROCESS, BEAT, GUARD):
            hub.greet(f"{rank}.{line}")
    hub.greet(f"2.{GUARD}")
    hub.beats = {1: Beat(0, ""), 2: SILENT, 3: Beat(0, "")}
    with pytest.raises(
        RunFailedError, match="2.process, 2.beat did not come to tcp://10.0.0.1:5555 within 60 s"
    ) as failure:
        crew.gather()
    assert (failure.value.role, failure.value.rank) == ("retriever", 2)


def test_builds_all_at_once_then_waits():
    crew, hub, _ = fake_crew()
    order = []
    hub.answer = lambda peer, request: order.append(peer) or Built([], {})
    crew.build({"a": 1}, {rank: {"roles": []} for rank in (3, 4)})
    assert order == ["3.process", "4.process"]
    assert hub.requests_to("3.process") == [Build({"a": 1}, {"roles": []})]


def test_a_second_build_waits_for_the_new_lines_of_the_roles():
    crew, hub, _ = fake_crew()
    hub.answer = lambda peer, request: Built([], {})
    crew.limits = replace(LIMITS, start_s=1.0)
    with pytest.raises(RunFailedError, match="3.verifier did not come"):
        crew.build({}, {3: {"roles": ["verifier"]}})


def test_what_a_process_raises_while_it_builds_ends_the_run():
    crew, hub, _ = fake_crew()
    hub.answer = raising(p3_process=MemoryError("no room"))
    with pytest.raises(RunFailedError, match="MemoryError: no room") as failure:
        crew.build({}, {3: {"roles": ["verifier"]}})
    assert failure.value.rank == 3


# ---- Asking. ----


def test_asks_all_before_it_waits_for_one():
    crew, hub, _ = fake_crew()
    hub.answer = lambda peer, request: Plain(peer)
    replies = crew.ask(VERIFIERS, Commit([1]))
    assert [reply.result.value for reply in replies] == list(VERIFIERS)


def test_results_come_in_whatever_order_to_whom_they_are_for():
    crew, hub, _ = fake_crew()
    hub.answer = nothing
    first, second = crew.post(DRAFTER, PROPOSE), crew.post(RETRIEVER, PROPOSE)
    assert not crew.are_answered([first, second])
    hub.tell(RETRIEVER, Reply(second, Plain(2)))
    hub.tell(DRAFTER, Reply(first, Plain(1)))
    assert crew.are_answered([first, second])
    assert (crew.wait(first).value, crew.wait(second).value) == (1, 2)


def test_a_reply_that_nobody_waits_for_any_more_is_dropped():
    crew, hub, _ = fake_crew()
    hub.tell(DRAFTER, Reply(999, Plain("of another time")))
    crew.pump(0)
    assert crew.wait(crew.post(DRAFTER, PROPOSE)) == Plain()


def test_what_is_posted_calls_back():
    crew, hub, _ = fake_crew()
    taken = []
    crew.post(DRAFTER, Commit([1]), then=taken.append)
    assert not taken
    crew.pump(0)
    assert taken == [Plain()]


def test_damage_of_one_rank_is_raised_before_what_it_did_to_another():
    crew, hub, _ = fake_crew()
    hub.answer = raising(p3_verifier=ValueError("odd"), p4_verifier=DamagedBlockError("block 7"))
    with pytest.raises(DamagedBlockError, match="block 7"):
        crew.ask(VERIFIERS, Commit([1]))


def test_what_a_verifier_raises_ends_the_run():
    crew, hub, _ = fake_crew()
    hub.answer = raising(p4_verifier=ValueError("broken"))
    with pytest.raises(RunFailedError, match="ValueError: broken") as failure:
        crew.ask(VERIFIERS, Commit([1]))
    assert (failure.value.role, failure.value.rank) == ("verifier", 4)


def test_progress_of_the_verifier_is_passed_on():
    crew, hub, _ = fake_crew()
    seen = []
    crew.on_progress = lambda done, total: seen.append((done, total))
    hub.tell(f"3.{BEAT}", Beat(1, "Prefill", 10, 40))
    hub.tell(f"1.{BEAT}", Beat(1, "Prefill", 5, 5))
    crew.pump(0)
    assert seen == [(10, 40)]


# ---- A role that the run can do without. ----

LOSSES = {
    "its process ended": lambda hub: hub.tell(f"1.{GUARD}", Ended(-9, 1)),
    "it is silent": lambda hub: hub.beats.update({1: SILENT}),
    "it makes no progress": lambda hub: hub.beats.update({1: Beat(7, "Propose")}),
}
REASONS = {
    "its process ended": "its process 1 was killed by signal 9",
    "it is silent": "no heartbeat for ",
    "it makes no progress": "no progress for 20 s in Propose",
}


@pytest.mark.parametrize("way", LOSSES)
def test_a_lost_drafter_is_restarted_and_the_run_goes_on(way):
    crew, hub, notes = fake_crew()
    hub.answer = nothing
    LOSSES[way](hub)
    with pytest.raises(RoleLostError, match=REASONS[way]):
        asked_in_vain(crew, DRAFTER, PROPOSE)
    assert crew.members[1].is_lost and not hub.knows(DRAFTER)
    assert (f"1.{GUARD}", Restart()) in hub.sent
    assert len(notes) == 1 and notes[0].startswith("drafter (rank 1) is out of order: " + REASONS[way])
    assert crew.members[1].num_restarts == 1 and REASONS[way] in crew.members[1].why_lost


def test_a_call_that_takes_too_long_is_a_loss_though_the_process_lives():
    crew, hub, notes = fake_crew()
    hub.answer, hub.beats[1] = nothing, Beat(1, "Propose")
    began = hub.clock.now
    with pytest.raises(RoleLostError, match="Propose took more than 4 s"):
        asked_in_vain(crew, DRAFTER, PROPOSE, LIMITS.draft_s)
    assert hub.clock.now - began < 5


def test_what_a_drafter_raises_is_a_loss():
    crew, hub, notes = fake_crew()
    hub.answer = raising(p1_drafter=RuntimeError("odd"))
    with pytest.raises(RoleLostError, match="RuntimeError: odd"):
        asked_in_vain(crew, DRAFTER, PROPOSE)
    assert crew.members[1].num_restarts == 1


def test_a_posted_call_that_failed_is_a_loss_too():
    crew, hub, notes = fake_crew()
    hub.answer = raising(p2_retriever=RuntimeError("odd"))
    crew.post(RETRIEVER, Commit([1]), then=lambda result: None)
    crew.pump(0)
    assert crew.members[2].is_lost and "RuntimeError: odd" in notes[0]


def test_a_drafter_that_came_back_is_built_again_and_told():
    crew, hub, notes = fake_crew()
    back = []
    crew.on_return["drafter"] = back.append
    hub.tell(f"1.{GUARD}", Ended(1, 1))
    crew.pump(0)
    hub.answer = lambda peer, request: Built(["again"], {})
    for line in (BEAT, PROCESS):
        hub.greet(f"1.{line}", pid=77)
    for _ in range(3):
        crew.pump(0)
    assert crew.members[1].is_lost and not back, "its role does not listen yet"
    hub.greet(DRAFTER, pid=77)
    crew.pump(0)
    assert back == [Built(["again"], {})] and not crew.members[1].is_lost and crew.members[1].pid == 77
    assert [type(request) for request in hub.requests_to("1.process")] == [Build]


def test_the_end_of_a_process_that_was_given_up_before_is_old_news():
    crew, hub, _ = fake_crew()
    hub.tell(f"1.{GUARD}", Ended(-9, 1))
    hub.tell(f"1.{GUARD}", Ended(-9, 1))
    crew.pump(0)
    assert crew.members[1].num_restarts == 1


def test_a_restarted_process_may_die_before_it_says_a_word():
    crew, hub, _ = fake_crew()
    hub.tell(f"1.{GUARD}", Ended(-9, 1))
    hub.tell(f"1.{GUARD}", Ended(-9, 77))
    crew.pump(0)
    assert crew.members[1].num_restarts == 2


def test_a_restarted_process_that_does_not_come_back_is_restarted_again():
    crew, hub, notes = fake_crew()
    hub.tell(f"1.{GUARD}", Ended(-9, 1))
    crew.pump(0)
    for _ in range(int(LIMITS.start_s) + 1):
        crew.pump(1.0)
    assert crew.members[1].num_restarts == 2 and "not back after 60 s" in notes[-1]


def test_what_cannot_be_built_again_does_not_end_the_run():
    crew, hub, notes = fake_crew()
    hub.tell(f"1.{GUARD}", Ended(-9, 1))
    crew.pump(0)
    hub.answer = raising(p1_process=ConfigError("model.drafter is gone"))
    hub.greet("1.process", pid=77)
    for _ in range(3):
        crew.pump(0)
    assert crew.members[1].num_restarts == 2 and "model.drafter is gone" in notes[-1]


def test_reading_again_is_no_slow_draft():
    crew, hub, _ = fake_crew()
    hub.answer = nothing
    read, call = crew.post(DRAFTER, Prefill([1], 0)), crew.post(DRAFTER, PROPOSE)
    for step in range(10):
        hub.beats[1] = Beat(step, "Prefill")
        crew.pump(1.0)
    hub.tell(DRAFTER, Reply(read, Plain()))
    hub.tell(DRAFTER, Reply(call, Plain("draft")))
    assert crew.wait(call, LIMITS.draft_s) == Plain("draft")


def test_without_its_guard_a_drafter_is_not_restarted():
    crew, hub, notes = fake_crew()
    hub.dead_guards.add(1)
    hub.beats[1] = SILENT
    for _ in range(10):
        crew.pump(1.0)
    assert crew.members[1].is_lost and crew.members[1].num_restarts == 0
    assert len(notes) == 1 and notes[0].endswith("cannot be restarted and stays so, and the run goes on without it")


def test_after_so_many_restarts_the_run_goes_on_without():
    crew, hub, notes = fake_crew()
    pids = itertools.count(1)
    for _ in range(crew_module.MAX_RESTARTS + 1):
        hub.tell(f"1.{GUARD}", Ended(1, next(pids)))
        crew.pump(0)
    assert sum(message == Restart() for _, message in hub.sent) == crew_module.MAX_RESTARTS
    assert notes[-1].endswith("it stays so, and the run goes on without it")
    assert hub.sent[-1] == (f"1.{GUARD}", Close(at_once=True)), "what is stuck keeps its memory as long as it lives"


# ---- A role without which there is no run. ----


@pytest.mark.parametrize(
    ("happens", "reason"),
    [
        (lambda hub: hub.tell(f"4.{GUARD}", Ended(-9, 4)), "its process 4 was killed by signal 9"),
        (lambda hub: hub.tell(f"4.{GUARD}", Ended(3, 4)), "its process 4 ended with exit code 3"),
        (lambda hub: hub.beats.update({4: SILENT}), "no heartbeat for 20 s"),
        (lambda hub: hub.beats.update({4: Beat(7, "Verify")}), "no progress for 20 s in Verify"),
    ],
    ids=["killed", "ended", "silent", "stalled"],
)
def test_a_lost_verifier_ends_the_run_and_all_write_their_stacks(happens, reason):
    crew, hub, _ = fake_crew()
    hub.answer, hub.beats[3] = nothing, Beat(7, "Verify", waits_for_others=True)
    happens(hub)
    with pytest.raises(RunFailedError, match=reason) as failure:
        crew.ask(VERIFIERS, Commit([1]))
    assert (failure.value.role, failure.value.rank) == ("verifier", 4)
    assert {peer for peer, message in hub.sent if message == DumpStacks()} == {
        f"{rank}.{GUARD}" for rank in (1, 2, 3, 4)
    }


def failure_of(crew) -> RunFailedError:
    """What ends the run while both ranks of the verifier are asked."""
    with pytest.raises(RunFailedError) as failure:
        crew.ask(VERIFIERS, Commit([1]))
    return failure.value


def test_who_waits_for_the_other_in_a_sum_is_not_to_blame():
    crew, hub, _ = fake_crew()
    hub.answer = nothing
    hub.beats |= {3: Beat(7, "Verify", waits_for_others=True), 4: Beat(7, "Verify")}
    assert failure_of(crew).rank == 4


def test_who_is_silent_is_to_blame_before_who_makes_no_progress():
    crew, hub, _ = fake_crew()
    hub.answer = nothing
    hub.beats |= {3: Beat(7, "Verify"), 4: SILENT}
    assert failure_of(crew).rank == 4


def test_what_one_rank_raises_is_not_waited_out_by_the_other():
    crew, hub, _ = fake_crew()
    hub.answer = lambda peer, request: None if peer == "3.verifier" else raising(p4_verifier=ValueError("odd"))(peer, 0)
    began = hub.clock.now
    assert failure_of(crew).rank == 4
    assert hub.clock.now - began < 2


def test_a_death_is_the_cause_of_what_others_raise_though_it_is_heard_later():
    crew, hub, _ = fake_crew()
    hub.answer = raising(p3_verifier=ConnectionError("closed by peer"))
    hub.answer = lambda peer, request, answer=hub.answer: None if peer == "4.verifier" else answer(peer, request)
    calls = crew.post_all(VERIFIERS, Commit([1]))
    crew.pump(0)
    hub.tell(f"4.{GUARD}", Ended(-9, 4))
    with pytest.raises(RunFailedError, match="killed by signal 9") as failure:
        crew.wait_all(calls)
    assert failure.value.rank == 4


def test_an_answer_that_got_lost_is_a_stall():
    crew, hub, _ = fake_crew()
    hub.answer = lambda peer, request: None if peer == "4.verifier" else Plain()
    failure = failure_of(crew)
    assert failure.rank == 4 and "no progress" in str(failure)


def test_a_guard_that_died_is_told_from_a_signal_of_the_user():
    crew, hub, _ = fake_crew()
    crew.pump(1.0)
    crew.check_guards()
    hub.dead_guards.add(1)
    with pytest.raises(RunFailedError, match="its guard") as failure:
        crew.check_guards()
    assert (failure.value.role, failure.value.rank) == ("drafter", 1)


def test_reports_are_of_those_who_answer_in_time():
    crew, hub, notes = fake_crew()
    hub.answer = lambda peer, request: None if peer == "4.process" else Plain(peer)
    assert crew.reports() == {rank: Plain(f"{rank}.process").value for rank in (1, 2, 3)}


def test_a_verifier_that_dies_when_all_is_done_is_no_failure():
    crew, hub, notes = fake_crew()
    hub.answer = lambda peer, request: None if peer == "4.process" else Plain(peer)
    hub.tell(f"4.{GUARD}", Ended(-9, 4))
    assert crew.reports().keys() <= {1, 2, 3}
    assert "no report of all processes: verifier (rank 4)" in notes[0]


def test_a_verifier_that_goes_on_may_take_as_long_as_it_wants():
    crew, hub, _ = fake_crew()
    hub.answer = nothing
    call = crew.post(VERIFIERS[0], Commit([1]))
    for step in range(1, 200):
        hub.beats |= {3: Beat(step, "Prefill"), 4: Beat(step, "Prefill")}
        crew.pump(1.0)
    hub.tell(VERIFIERS[0], Reply(call, Plain("done")))
    assert crew.wait(call) == Plain("done")


def test_a_process_that_idles_is_not_stalled():
    crew, hub, _ = fake_crew()
    for _ in range(100):
        crew.pump(1.0)
    assert not any(member.is_lost for member in crew.members.values())


def test_colocated_processes_are_all_needed():
    crew, hub, _ = fake_crew(PlacementKind.colocated, 2)
    hub.tell(f"0.{GUARD}", Ended(-9, 0))
    with pytest.raises(RunFailedError, match="killed by signal 9"):
        crew.pump(0)


# ---- The end. ----


@pytest.mark.parametrize(("at_once", "lines"), [(False, (PROCESS, BEAT, GUARD)), (True, (GUARD, BEAT))])
def test_close_tells_all_and_closes_the_hub(at_once, lines):
    crew, hub, _ = fake_crew()
    hub.forget(f"2.{PROCESS}")
    crew.close(at_once=at_once)
    told = [peer for peer, message in hub.sent if message == Close(at_once)]
    assert told == [f"{rank}.{line}" for rank in (1, 2, 3, 4) for line in lines if f"{rank}.{line}" != f"2.{PROCESS}"]
    assert hub.sent[-1] == ("", None)


def test_strange_peers_do_no_harm():
    crew, hub, _ = fake_crew()
    for peer in ("9.verifier", "x.verifier", ""):
        hub.tell(peer, Hello(1, "", 1, "host"))
    crew.pump(0)
