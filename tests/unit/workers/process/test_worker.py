"""workers/process/worker.py: a worker in threads of this process, on a real channel: builds, serves, beats, ends."""

from __future__ import annotations

import threading
import time
from functools import partial

import pytest
import torch

from workers.messages import (
    Attach,
    Beat,
    Build,
    Built,
    Call,
    Close,
    Commit,
    Draft,
    Extend,
    Failure,
    Hello,
    InnerStep,
    MakeReport,
    MakeUpdate,
    NeedsRebuild,
    Plain,
    Prefill,
    Propose,
    Reply,
    Reread,
    Survey,
    TakeUpdate,
    UpdateNotice,
    Verdict,
    Verify,
)
from workers.process.channel import Hub, Line, PingListener
from workers.process.worker import Worker, respond

SECRET, SECONDS = "s", 10.0
STEP = InnerStep(draft=Draft(tokens=[5], origins=["retrieval"], probs=[torch.ones(2)]), num_proposed=1, num_accepted=0)


class FakeRole:
    """Notes what it is asked; `state` is what ranks must agree on."""

    def __init__(self):
        self.calls = []

    def propose(self, after, count, branch):
        if count > 9:
            try:
                raise KeyError("cause")
            except KeyError as error:
                raise RuntimeError("at the top") from error
        self.calls.append(("propose", after, count, branch))
        return Draft(tokens=[7] * count)

    def extend(self, after, draft, branch):
        return STEP

    def verify(self, draft):
        return Verdict(num_accepted=len(draft), next_token=1)

    def retrieval_update(self, *, rebuild, budget=None):
        return UpdateNotice(is_rebuild=rebuild, length=3)

    def needs_rebuild(self):
        return True

    def state(self):
        return f"{len(self.calls)} calls"

    def __getattr__(self, name):
        return lambda *arguments: self.calls.append((name, *arguments))


@pytest.mark.parametrize(
    ("request_", "call"),
    [
        (Prefill([1, 2], 3), ("prefill", [1, 2], 3)),
        (Commit([4]), ("commit", [4])),
        (TakeUpdate([]), ("refresh", [])),
        (Reread(), ("reread",)),
        (Propose([1], 2, 3), ("propose", [1], 2, 3)),
    ],
)
def test_a_request_calls_the_method_it_stands_for(request_, call):
    role = FakeRole()
    respond(role, request_)
    assert role.calls == [call]


def test_what_methods_return_is_the_result():
    role = FakeRole()
    assert respond(role, Verify(Draft(tokens=[1]))) == Verdict(num_accepted=1, next_token=1)
    assert respond(role, MakeUpdate(True)) == UpdateNotice(is_rebuild=True, length=3)
    assert respond(role, NeedsRebuild()) == Plain(True)
    with pytest.raises(TypeError, match="MakeReport is for no role"):
        respond(role, MakeReport())


class FakeRoleSet:
    def __init__(self, config, assignment):
        self.roles = {name: FakeRole() for name in assignment["roles"]}
        self.is_first_shard, self.device = assignment["first"], torch.device("cpu")
        self.notes, self.shared, self.attached, self.is_closed = [f"of {config['name']}"], {}, [], False
        made.append(self)

    def attach(self, shared):
        self.attached.append(shared)
        return True

    def report(self):
        return {"peak_bytes": 3}

    def progress(self):
        return (17, 2, 9)

    def waits_for_others(self):
        return False

    def close(self):
        self.is_closed = True


made: list[FakeRoleSet] = []


class Orchestrator:
    """The other end."""

    def __init__(self, hub: Hub):
        self.hub, self._next_id, self.beats = hub, 0, []

    def greeted_by(self, *peers: str) -> None:
        deadline = time.monotonic() + SECONDS
        while not all(self.hub.knows(peer) for peer in peers):
            assert time.monotonic() < deadline
            self.take()

    def take(self):
        """The next reply, if there is one."""
        received = self.hub.receive(0.2)
        if received is None or isinstance(received[1], Hello):
            return None
        if isinstance(received[1], Beat):
            self.beats.append(received[1])
            return None
        return received[1]

    def ask(self, peer: str, request) -> Reply | Failure:
        self._next_id += 1
        self.hub.send(peer, Call(self._next_id, request))
        deadline = time.monotonic() + SECONDS
        while (answer := self.take()) is None or answer.id != self._next_id:
            assert time.monotonic() < deadline, request
        return answer


@pytest.fixture
def orchestrator():
    made.clear()
    hub = Hub(SECRET)
    messages, pings = hub.endpoints.for_host(same_host=True)
    worker = Worker(
        lambda name, *tensors: Line(messages, f"1.{name}", SECRET, *tensors),
        partial(PingListener, pings, time.monotonic),
        lambda device, folder: {"device": 5, "folder": len(folder)},
        FakeRoleSet,
    )
    thread = threading.Thread(target=worker.run)
    thread.start()
    orchestrator = Orchestrator(hub)
    orchestrator.greeted_by("1.process", "1.beat")
    yield orchestrator
    for line in ("1.process", "1.beat"):
        hub.send(line, Close())
    thread.join(SECONDS)
    assert not thread.is_alive() and all(role_set.is_closed for role_set in made)
    hub.close()


def build(orchestrator: Orchestrator, *roles: str, first: bool = True) -> Reply:
    for role in roles:
        orchestrator.hub.forget(f"1.{role}")
    reply = orchestrator.ask("1.process", Build({"name": "x"}, {"roles": list(roles), "first": first}))
    orchestrator.greeted_by(*(f"1.{role}" for role in roles))
    return reply


def test_builds_and_serves_each_role_on_a_line_of_its_own(orchestrator):
    assert orchestrator.ask("1.process", Survey("cpu", "/abc")).result.value == {"device": 5, "folder": 4}
    assert build(orchestrator, "drafter", "verifier").result == Built(["of x"], {})
    reply = orchestrator.ask("1.drafter", Propose([1], 3, 2))
    assert reply.result == Draft(tokens=[7, 7, 7]) and reply.state == "1 calls"
    assert orchestrator.ask("1.verifier", Verify(Draft(tokens=[4]))).state == "0 calls"
    assert orchestrator.ask("1.process", MakeReport()).result.value == {"peak_bytes": 3}
    orchestrator.ask("1.process", Attach({"a": 1}))
    assert made[0].attached == [{"a": 1}]


def test_what_a_role_raises_is_told_with_its_root_cause_and_the_role_goes_on(orchestrator):
    build(orchestrator, "drafter")
    failure = orchestrator.ask("1.drafter", Propose([], 10))
    assert (failure.kind, failure.message) == ("KeyError", "'cause'") and "at the top" in failure.traceback
    assert orchestrator.ask("1.drafter", Propose([], 1)).result.tokens == [7]


@pytest.mark.parametrize("first", [True, False])
def test_only_the_first_rank_sends_distributions(orchestrator, first):
    build(orchestrator, "retriever", first=first)
    result = orchestrator.ask("1.retriever", Extend([], Draft())).result
    assert result.draft.tokens == [5] and result.draft.origins == ["retrieval"]
    assert (result.draft.probs is not None) == first


def test_a_second_build_ends_the_first(orchestrator):
    build(orchestrator, "drafter")
    build(orchestrator, "verifier", "retriever")
    assert made[0].is_closed and not made[1].is_closed
    assert orchestrator.ask("1.verifier", Verify(Draft())).result == Verdict(num_accepted=0, next_token=1)


def test_heartbeats_tell_progress_and_what_it_is_at(orchestrator):
    build(orchestrator, "drafter")
    began, orchestrator.beats = time.monotonic(), []
    while len(orchestrator.beats) < 2:
        assert time.monotonic() - began < SECONDS
        orchestrator.take()
    assert orchestrator.beats[-1] == Beat(17, "", 2, 9)
