"""A crew over a hub without sockets, and a clock that tests set."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

from conf.schema import PlacementConfig, PlacementKind
from orchestrator.crew import Crew
from orchestrator.health import TimeLimits
from orchestrator.placement import place
from workers.messages import Beat, Built, Call, Failure, Hello, Message, Ping, Plain, Reply, Request
from workers.process.channel import ChannelError
from workers.process.peers import BEAT, GUARD, PROCESS

LIMITS = TimeLimits(start_s=60, stall_s=20, draft_s=4)


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class FakeHub:
    """`answer(peer, request)`, if it is not None, is the result that a peer gives at once, or what it raises.

    When nothing has come, waiting takes the time that it would; every living process beats meanwhile, and its guard.
    """

    def __init__(self, clock: Clock):
        self.clock, self.sent = clock, []
        self.endpoints = SimpleNamespace(remote="tcp://10.0.0.1:5555")
        self.dead_guards: set[int] = set()
        self.answer: Callable[[str, Request], Any] = lambda peer, request: Plain()
        self.beats: dict[int, Beat | None] = {}
        """By rank; None: it is silent."""
        self._known: set[str] = set()
        self._inbox: deque[tuple[str, Message]] = deque()

    def greet(self, peer: str, pid: int = 1, node: int = 0) -> None:
        self._known.add(peer)
        self.tell(peer, Hello(1, "", pid, "host", node))

    def tell(self, peer: str, message: Message) -> None:
        self._inbox.append((peer, message))

    # ---- As workers.process.channel.Hub. ----

    def knows(self, peer: str) -> bool:
        return peer in self._known

    def forget(self, peer: str) -> None:
        self._known.discard(peer)

    def send(self, peer: str, message: Message) -> None:
        if peer not in self._known:
            raise ChannelError(f"{peer} cannot be reached")
        self.sent.append((peer, deepcopy(message)))  # as it is now: on its way it does not change
        if not isinstance(message, Call):
            return
        try:
            result = self.answer(peer, message.request)
        except Exception as error:
            self.tell(peer, Failure(message.id, type(error).__name__, str(error), ""))
        else:
            if result is not None:
                self.tell(peer, result if isinstance(result, Reply) else Reply(message.id, result))

    def receive(self, timeout_s: float) -> tuple[str, Message] | None:
        if not self._inbox and timeout_s:
            self.clock.now += timeout_s
            for rank in self.beats.keys() - self.dead_guards:
                self.tell(f"{rank}.{GUARD}", Ping())
            for rank, beat in self.beats.items():
                if beat is not None:
                    self.tell(f"{rank}.{BEAT}", beat)
        return self._inbox.popleft() if self._inbox else None

    def close(self) -> None:
        self.sent.append(("", None))

    @property
    def last_call_id(self) -> int:
        return max(message.id for _, message in self.sent if isinstance(message, Call))

    def requests_to(self, peer: str) -> list[Request]:
        return [message.request for to, message in self.sent if to == peer and isinstance(message, Call)]


def fake_crew(kind: PlacementKind = PlacementKind.pipeline, world_size: int = 5) -> tuple[Crew, FakeHub, list[str]]:
    """A crew whose processes have all built; what it notes."""
    clock, notes = Clock(), []
    hub = FakeHub(clock)
    crew = Crew(hub, place(PlacementConfig(kind=kind), world_size), LIMITS, notes.append, clock)
    for rank, member in crew.members.items():
        for line in (PROCESS, BEAT, GUARD, *member.roles):
            hub.greet(f"{rank}.{line}", pid=rank)
        hub.beats[rank] = Beat(0, "")
    crew.gather()
    hub.answer = lambda peer, request: Built([], {})
    build(crew, hub)
    hub.answer, hub.sent = lambda peer, request: Plain(), []
    return crew, hub, notes


def build(crew: Crew, hub: FakeHub) -> None:
    """The roles' threads come back as soon as they are built."""
    answer = hub.answer

    def answer_and_greet(peer: str, request: Request):
        rank = peer.partition(".")[0]
        for role in crew.members[int(rank)].roles:
            hub.greet(f"{rank}.{role}", pid=int(rank))
        return answer(peer, request)

    hub.answer = answer_and_greet
    crew.build({}, {rank: {"roles": member.roles, "device": "cpu"} for rank, member in crew.members.items()})
    hub.answer = answer
