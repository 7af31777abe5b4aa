"""The worker processes as the orchestrator sees them: who is there, what was asked, who has died or stands still.

A process has three lines: `<rank>.process` (build, report), `<rank>.beat` (heartbeats, from a thread of its own) and
`<rank>.guard` (its guard, which ends and restarts it); and one for each role it plays, `<rank>.<role>`.

    what is seen                                      of a drafter or retriever     of a verifier
    the guard says that the process ended             restart, go on without it     the run fails
    no heartbeat, or a call takes too long            restart, go on without it     the run fails, with all stacks
    busy, but no progress for stall_timeout_s         restart, go on without it     the run fails, with all stacks
    a call raised                                     restart, go on without it     the run fails (or rereads)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from orchestrator.placement import VERIFIER_ROLE, Placement, Seat
from tiers.errors import DamagedBlockError
from workers.channel import ChannelError, Hub
from workers.messages import (
    Beat,
    Build,
    Built,
    Call,
    Close,
    DumpStacks,
    Ended,
    Failure,
    Hello,
    Message,
    Reply,
    Request,
    Restart,
    Result,
)

PROCESS, BEAT, GUARD = "process", "beat", "guard"
TICK_SECONDS = 0.25
MAX_RESTARTS = 3
STACK_SECONDS = 1.0
"""For workers to write their stacks before they are ended."""


class RunFailedError(RuntimeError):
    """A run cannot go on: says which role, on which rank."""

    def __init__(self, role: str, rank: int, reason: str):
        super().__init__(reason)
        self.role, self.rank = role, rank


class RoleLostError(RuntimeError):
    """An optional role is out of order for now; the run goes on without it."""


@dataclass(kw_only=True)
class TimeLimits:
    """In seconds; see conf.schema.PlacementConfig."""

    start_s: float = 600.0
    stall_s: float = 60.0
    draft_s: float = 10.0
    silence_s: float = 5.0
    """Without a heartbeat, of a role that can be done without."""


@dataclass(kw_only=True)
class Member:
    """The process of one rank."""

    rank: int
    roles: list[str]
    pid: int = 0
    host: str = ""
    seat: Seat | None = None
    heard_at: float = 0.0
    progress: int = 0
    progress_at: float = 0.0
    busy_with: str = ""
    done_of_total: tuple[int, int] = (0, 0)
    is_lost: bool = True
    num_restarts: int = 0
    assignment: dict[str, Any] = field(default_factory=dict)

    @property
    def is_needed(self) -> bool:
        """Without it there is no run."""
        return VERIFIER_ROLE in self.roles

    @property
    def name(self) -> str:
        return "+".join(self.roles)


@dataclass(slots=True)
class _Pending:
    peer: str
    asked_at: float
    what: str
    then: Callable[[Result], None] | None = None
    answer: Reply | Failure | RoleLostError | None = None


class Crew:
    """Talks to all workers from one thread. `note(line)` tells the user what happened."""

    def __init__(
        self,
        hub: Hub,
        placement: Placement,
        limits: TimeLimits,
        note: Callable[[str], None] = lambda line: None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.hub, self.limits, self.placement = hub, limits, placement
        self.note, self._clock = note, clock
        self.members = {rank: Member(rank=rank, roles=placement.roles_of(rank)) for rank in placement.worker_ranks}
        self.on_progress: Callable[[int, int], None] = lambda done, total: None
        self.on_return: dict[str, Callable[[Built], None]] = {}
        """By role: called when its restarted process has built it again."""
        self.look_around: Callable[[], None] = lambda: None
        """Called regularly while waiting."""
        self._pending: dict[int, _Pending] = {}
        self._next_id = 0
        self._config: dict[str, Any] = {}
        self._is_closing = False

    # ---- Coming together. ----

    def gather(self) -> None:
        """Waits until every process is there. Raises RunFailedError."""
        lines = [f"{rank}.{line}" for rank in self.members for line in (PROCESS, BEAT, GUARD)]
        began = self._clock()
        while missing := [peer for peer in lines if not self.hub.knows(peer)]:
            if self._clock() - began > self.limits.start_s:
                rank = int(missing[0].split(".")[0])
                raise RunFailedError(
                    self.members[rank].name, rank, f"{', '.join(missing)} not there after {self.limits.start_s:g} s"
                )
            self.pump(TICK_SECONDS)

    def build(self, config: dict[str, Any], assignments: dict[int, dict[str, Any]]) -> dict[int, Built]:
        """These processes load and allocate what they are assigned, at once. Raises RunFailedError."""
        self._config = config
        for rank, assignment in assignments.items():
            self.members[rank].assignment = assignment
            for role in self.members[rank].roles:
                self.hub.forget(f"{rank}.{role}")  # of what it had built before
        calls = {rank: self.post(f"{rank}.{PROCESS}", self._build_request(rank)) for rank in assignments}
        built = {rank: self.wait(call, self.limits.start_s) for rank, call in calls.items()}
        began = self._clock()
        lines = [f"{rank}.{role}" for rank in assignments for role in assignments[rank]["roles"]]
        while not all(self.hub.knows(line) for line in lines) and self._clock() - began < self.limits.start_s:
            self.pump(TICK_SECONDS)
        for rank in assignments:
            self.members[rank].is_lost = False
        return built

    def _build_request(self, rank: int) -> Build:
        return Build(self._config, self.members[rank].assignment)

    # ---- Asking. ----

    def post(self, peer: str, request: Request, then: Callable[[Result], None] | None = None) -> int:
        """Asks without waiting; `then` is called with the result when it comes. Returns the call's id."""
        self._next_id += 1
        pending = _Pending(peer, self._clock(), type(request).__name__, then)
        self._pending[self._next_id] = pending
        try:
            self.hub.send(peer, Call(self._next_id, request))
        except ChannelError as error:
            pending.answer = RoleLostError(str(error))
        return self._next_id

    def wait(self, call: int, timeout_s: float | None = None) -> Result:
        """The result of a call. `timeout_s` is for roles that can be done without; others are watched for progress.

        Raises RoleLostError, RunFailedError, DamagedBlockError.
        """
        pending = self._pending[call]
        while pending.answer is None:
            self.pump(TICK_SECONDS)
            self._check_late(pending, timeout_s)
        del self._pending[call]
        return self._result_of(pending)

    def ask(self, peers: Iterable[str], request: Request, timeout_s: float | None = None) -> list[Reply]:
        """Asks several at once, and waits for all of them; see `wait_all`."""
        return self.wait_all(self.post_all(peers, request), timeout_s)

    def post_all(self, peers: Iterable[str], request: Request) -> list[int]:
        """The calls' ids."""
        return [self.post(peer, request) for peer in peers]

    def are_answered(self, calls: list[int]) -> bool:
        """Whether `wait_all` would return at once; listens for a moment."""
        self.pump(0)
        return all(self._pending[call].answer is not None for call in calls)

    def wait_all(self, calls: list[int], timeout_s: float | None = None) -> list[Reply]:
        """Their replies: a failure of one is raised when all have answered. See `wait`."""
        pending = [self._pending[call] for call in calls]
        for item in pending:
            while item.answer is None:
                self.pump(TICK_SECONDS)
                self._check_late(item, timeout_s)
        for call in calls:
            del self._pending[call]
        # What a damaged block did to one rank shows in the others as odd results: it comes first.
        for item in sorted(pending, key=lambda item: not _is_damage(item.answer)):
            self._result_of(item)
        return [item.answer for item in pending]

    def _check_late(self, pending: _Pending, timeout_s: float | None) -> None:
        late = timeout_s is not None and self._clock() - pending.asked_at > timeout_s
        if late and pending.answer is None:
            self._lose(self._member_of(pending.peer), f"{pending.what} took more than {timeout_s:g} s")

    def _result_of(self, pending: _Pending) -> Result:
        answer = pending.answer
        if isinstance(answer, Reply):
            return answer.result
        if isinstance(answer, RoleLostError):
            raise answer
        if answer.kind == DamagedBlockError.__name__:
            raise DamagedBlockError(answer.message)
        member = self._member_of(pending.peer)
        reason = f"{answer.kind}: {answer.message}"
        if member.is_needed:
            raise RunFailedError(pending.peer.partition(".")[2], member.rank, reason)
        self._lose(member, reason)
        raise RoleLostError(reason)

    # ---- Listening. ----

    def pump(self, timeout_s: float) -> None:
        """Takes what has come, for at most `timeout_s` if nothing does, and looks after everyone."""
        received = self.hub.receive(timeout_s)
        while received is not None:
            self._take(*received)
            received = self.hub.receive(0)
        self._look_after()

    def _take(self, peer: str, message: Message) -> None:
        member = self._member_of(peer)
        if member is None:
            return
        member.heard_at = self._clock()
        match message:
            case Hello():
                self._greet(member, peer, message)
            case Beat():
                self._note_progress(member, message)
            case Reply() | Failure():
                self._answer(message)
            case Ended():
                self._note_end(member, message)

    def _greet(self, member: Member, peer: str, hello: Hello) -> None:
        if peer.endswith(f".{GUARD}"):
            return
        member.pid, member.host = hello.pid, hello.host
        member.seat = Seat(node=hello.node, num_devices=hello.num_devices)
        is_back = member.is_lost and member.num_restarts and peer.endswith(f".{PROCESS}")
        if is_back:
            self.post(peer, self._build_request(member.rank), then=lambda built: self._back(member, built))

    def _back(self, member: Member, built: Result) -> None:
        member.is_lost = False
        member.progress_at = self._clock()
        for role in member.roles:
            if role in self.on_return:
                self.on_return[role](built)

    def _note_progress(self, member: Member, beat: Beat) -> None:
        if beat.progress != member.progress or not beat.busy_with:
            member.progress, member.progress_at = beat.progress, self._clock()
        member.busy_with = beat.busy_with
        if beat.total and member.is_needed:
            self.on_progress(beat.done, beat.total)

    def _answer(self, message: Reply | Failure) -> None:
        pending = self._pending.get(message.id)
        if pending is None:
            return
        pending.answer = message
        if pending.then is not None:
            del self._pending[message.id]
            if isinstance(message, Failure):
                self._result_of_later(pending)
            else:
                pending.then(message.result)

    def _result_of_later(self, pending: _Pending) -> None:
        """Nobody waits for this call: a role that can be done without is lost, any other ends the run."""
        try:
            self._result_of(pending)
        except RoleLostError:
            return

    def _note_end(self, member: Member, ended: Ended) -> None:
        if ended.pid != member.pid and member.pid:
            return  # of a process before the present one
        code = ended.exit_code
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        self._lose(member, f"its process {ended.pid} {how}")

    # ---- Looking after everyone. ----

    def _look_after(self) -> None:
        self.look_around()
        now = self._clock()
        for member in self.members.values():
            if member.is_lost or not member.heard_at:
                continue
            silence = now - member.heard_at
            limit = self.limits.stall_s if member.is_needed else min(self.limits.silence_s, self.limits.stall_s)
            if silence > limit:
                self._lose(member, f"no heartbeat for {silence:.0f} s")
            elif member.busy_with and now - member.progress_at > self.limits.stall_s:
                stalled = now - member.progress_at
                self._lose(member, f"no progress for {stalled:.0f} s in {member.busy_with}")

    def _lose(self, member: Member, reason: str) -> None:
        """Raises RunFailedError where there is no run without it."""
        if member.is_needed or self._is_closing:
            self._fail(member, reason)
        if member.is_lost:
            return
        member.is_lost = True
        for line in (PROCESS, BEAT, *member.roles):
            self.hub.forget(f"{member.rank}.{line}")
        for pending in self._pending.values():
            if pending.answer is None and self._member_of(pending.peer) is member:
                pending.answer = RoleLostError(reason)
        self._restart(member, reason)

    def _restart(self, member: Member, reason: str) -> None:
        who = f"{member.name} (rank {member.rank})"
        if member.num_restarts >= MAX_RESTARTS:
            self.note(f"{who} is out of order: {reason}; going on without it")
            return
        member.num_restarts += 1
        self.note(f"{who} is out of order: {reason}; going on without it while it is restarted")
        try:
            self.hub.send(f"{member.rank}.{GUARD}", Restart())
        except ChannelError:
            self.note(f"{who} cannot be restarted: its guard is gone")

    def _fail(self, member: Member, reason: str) -> None:
        for rank in self.members:
            self._tell(f"{rank}.{BEAT}", DumpStacks())
        time.sleep(STACK_SECONDS)
        raise RunFailedError(member.name, member.rank, reason)

    @property
    def num_restarts(self) -> dict[str, int]:
        """Of each role that was restarted."""
        return {member.name: member.num_restarts for member in self.members.values() if member.num_restarts}

    def _member_of(self, peer: str) -> Member | None:
        rank = peer.partition(".")[0]
        return self.members.get(int(rank)) if rank.isdigit() else None

    def _tell(self, peer: str, message: Message) -> None:
        try:
            self.hub.send(peer, message)
        except ChannelError:
            return  # gone: what it was to be told does not matter any more

    def close(self, *, at_once: bool = False) -> None:
        """Ends all processes: in good order, or whatever they are doing."""
        self._is_closing = True
        for rank in self.members:
            for line in (GUARD, BEAT) if at_once else (PROCESS, BEAT, GUARD):
                self._tell(f"{rank}.{line}", Close(at_once))
        self.hub.close()


def _is_damage(answer: Any) -> bool:
    return isinstance(answer, Failure) and answer.kind == DamagedBlockError.__name__
