"""The worker processes as the orchestrator sees them: who is there, what was asked, who has died or stands still.

A process has three lines: `<rank>.process` (build, report), `<rank>.beat` (heartbeats, from a thread of its own) and
`<rank>.guard` (its guard, which ends and restarts it); and one for each role it plays, `<rank>.<role>`.

    what is seen                                     of a drafter or retriever           of a verifier, or while loading
    the guard says that the process ended            go on without it, restart it        the run fails
    no heartbeat for SILENCE_S (verifier: stall_s)   go on without it, restart it        the run fails
    a call takes more than draft_s                   go on without it, restart it        -
    asked, but no progress for stall_s               go on without it, restart it        the run fails
    a call raised                                    go on without it, restart it        the run fails (or rereads)
    restarted MAX_RESTARTS times, or no guard        go on without it                    the run fails

Who fails a run is the one where it began: a rank that died or is silent before one that makes no progress, that before
one that waits for the others' part of a sum; and of calls that raised the first. All stacks are then in the logs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from conf.schema import ConfigError
from orchestrator.placement import VERIFIER_ROLE, Placement, Seat
from tiers.errors import DamagedBlockError
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
    MakeReport,
    Message,
    Prefill,
    Reply,
    Request,
    Restart,
    Result,
)
from workers.process.channel import ChannelError, Hub

PROCESS, BEAT, GUARD = "process", "beat", "guard"
TICK_SECONDS = 0.25
MAX_RESTARTS = 3
SILENCE_SECONDS = 5.0
"""Without a heartbeat: of a role that can be done without, and of any guard."""
STACK_SECONDS = 1.0
"""For workers to write their stacks before they are ended."""
ROOT_CAUSE_SECONDS = 1.0
"""When a call raised: until the news of another's death is here, which may be why it did."""
BLAME_SECONDS = 2.0
"""Longer than between two heartbeats: who waits for others is judged after them, whoever's last progress came first."""
REPORT_SECONDS = 5.0
GUARD_ANSWER_SECONDS = 2.0


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

    @property
    def silence_s(self) -> float:
        """See SILENCE_SECONDS."""
        return min(SILENCE_SECONDS, self.stall_s)


@dataclass(kw_only=True)
class Member:
    """The process of one rank."""

    rank: int
    roles: list[str]
    pid: int = 0
    seat: Seat | None = None
    heard_at: float = 0.0
    guard_heard_at: float = 0.0
    beat: Beat = field(default_factory=lambda: Beat(0, ""))
    """The last one, of `progress_at` the first that told as much progress."""
    progress_at: float = 0.0
    is_built: bool = False
    is_lost: bool = False
    back_by: float | None = None
    """Of one that is lost: by then its restarted process must be there; None: it is not restarted any more."""
    rebuilt: Result | None = None
    """What its restarted process has built, until that can be asked."""
    lost_pid: int | None = None
    num_restarts: int = 0
    why_lost: str = ""
    """The last time."""
    assignment: dict[str, Any] = field(default_factory=dict)

    @property
    def is_verifier(self) -> bool:
        return VERIFIER_ROLE in self.roles

    @property
    def is_needed(self) -> bool:
        """Without it there is no run: a verifier; and before the run begins, everyone."""
        return self.is_verifier or not self.is_built

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
    answered_at: float = 0.0

    @property
    def has_failed(self) -> bool:
        """And not for a damaged block, which all ranks of a verifier get over together."""
        return isinstance(self.answer, Failure) and not _is_damage(self.answer)


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
        self._read_at: dict[str, float] = {}
        """By peer: when it had read its prompt, for which draft_s is no measure."""
        self._config: dict[str, Any] = {}

    # ---- Coming together. ----

    def gather(self) -> None:
        """Waits until every process is there. Raises RunFailedError."""
        lines = [f"{rank}.{line}" for rank in self.members for line in (PROCESS, BEAT, GUARD)]
        began = self._clock()
        while missing := [peer for peer in lines if not self.hub.knows(peer)]:
            if self._clock() - began > self.limits.start_s:
                member = self._member_of(missing[0])
                where = self.hub.endpoints.remote or "this host's sockets"
                raise RunFailedError(
                    member.name,
                    member.rank,
                    f"{', '.join(missing)} did not come to {where} within {self.limits.start_s:g} s "
                    "(placement.start_timeout_s)",
                )
            self.pump(TICK_SECONDS)

    def build(self, config: dict[str, Any], assignments: dict[int, dict[str, Any]]) -> dict[int, Built]:
        """These processes load and allocate what they are assigned, at once. Raises RunFailedError."""
        self._config = config
        for rank, assignment in assignments.items():
            self.members[rank].assignment = assignment
            for role in self.members[rank].roles:
                self.hub.forget(f"{rank}.{role}")  # of what it had built before
        calls = [self.post(f"{rank}.{PROCESS}", self._build_request(rank)) for rank in assignments]
        replies = self.wait_all(calls, self.limits.start_s)
        began = self._clock()
        lines = [f"{rank}.{role}" for rank in assignments for role in assignments[rank]["roles"]]
        while missing := [line for line in lines if not self.hub.knows(line)]:
            if self._clock() - began > self.limits.start_s:
                self._fail(self._member_of(missing[0]), f"{missing[0]} did not come")
            self.pump(TICK_SECONDS)
        for rank in assignments:
            self.members[rank].is_built = True
        return {rank: reply.result for rank, reply in zip(assignments, replies, strict=True)}

    def _build_request(self, rank: int) -> Build:
        return Build(self._config, self.members[rank].assignment)

    # ---- Asking. ----

    def post(self, peer: str, request: Request, then: Callable[[Result], None] | None = None) -> int:
        """Asks without waiting; `then` is called with the result when it comes. Returns the call's id."""
        self._next_id += 1
        pending = _Pending(peer, self._clock(), type(request).__name__, then)
        self._pending[self._next_id] = pending
        self._tell(peer, Call(self._next_id, request))  # whose process is gone will be found so, and why
        return self._next_id

    def wait(self, call: int, timeout_s: float | None = None) -> Result:
        """The result of a call; see `wait_all`."""
        return self.wait_all([call], timeout_s)[0].result

    def ask(self, peers: Iterable[str], request: Request, timeout_s: float | None = None) -> list[Reply]:
        """Asks several at once, and waits for all of them; see `wait_all`."""
        return self.wait_all(self.post_all(peers, request), timeout_s)

    def post_all(self, peers: Iterable[str], request: Request) -> list[int]:
        """The calls' ids."""
        return [self.post(peer, request) for peer in peers]

    def are_answered(self, calls: list[int]) -> bool:
        """Whether `wait_all` would return or raise at once; listens for a moment."""
        self.pump(0)
        return self._are_settled([self._pending[call] for call in calls])

    def wait_all(self, calls: list[int], timeout_s: float | None = None) -> list[Reply]:
        """Their replies. All are watched for life and progress; `timeout_s` limits the time of a call besides.

        Raises RoleLostError, RunFailedError, DamagedBlockError, ConfigError.
        """
        pending = [self._pending[call] for call in calls]
        while not self._are_settled(pending):
            self.pump(TICK_SECONDS)
            for item in pending:
                self._check_late(item, timeout_s)
        for call in calls:
            del self._pending[call]
        # What a damaged block did to one rank shows in the others as odd results: it comes first.
        answered = [item for item in pending if item.answer is not None]
        for item in sorted(answered, key=lambda item: (not _is_damage(item.answer), item.answered_at)):
            self._result_of(item)
        return [item.answer for item in pending]

    def _are_settled(self, pending: list[_Pending]) -> bool:
        """All have answered; or one has failed, for which others may wait in vain."""
        if all(item.answer is not None for item in pending):
            # The news of a death takes a moment longer than what it does to others.
            failed = [item.answered_at for item in pending if item.has_failed and self._has_partners(item)]
        else:
            failed = [item.answered_at for item in pending if item.has_failed]
            if not failed:
                return False
        return not failed or self._clock() - min(failed) > ROOT_CAUSE_SECONDS

    def _has_partners(self, pending: _Pending) -> bool:
        """It computes together with others, whose death it may have died of."""
        return pending.peer.partition(".")[2] == VERIFIER_ROLE and self.placement.tensor_parallel > 1

    def _check_late(self, pending: _Pending, timeout_s: float | None) -> None:
        if timeout_s is None or pending.answer is not None or self._is_reading(pending.peer):
            return
        if self._clock() - max(pending.asked_at, self._read_at.get(pending.peer, 0.0)) > timeout_s:
            self._lose(self._member_of(pending.peer), f"{pending.what} took more than {timeout_s:g} s")

    def _is_reading(self, peer: str) -> bool:
        return any(
            item.peer == peer and item.what == Prefill.__name__ and item.answer is None
            for item in self._pending.values()
        )

    def _result_of(self, pending: _Pending) -> Result:
        answer = pending.answer
        if isinstance(answer, Reply):
            return answer.result
        if isinstance(answer, RoleLostError):
            raise answer
        if _is_damage(answer):
            raise DamagedBlockError(answer.message)
        member = self._member_of(pending.peer)
        if answer.kind == ConfigError.__name__ and not member.is_built:
            raise ConfigError(answer.message)
        reason = f"{answer.kind}: {answer.message}"
        self._lose(member, reason)
        raise RoleLostError(reason)

    def reports(self) -> dict[int, Any]:
        """What each process that is there says of itself, by rank; nothing of one that does not answer in time.

        By now all tokens are there: nobody is needed any more.
        """
        there = [rank for rank, member in self.members.items() if not member.is_lost]
        calls = {rank: self.post(f"{rank}.{PROCESS}", MakeReport()) for rank in there}
        pending = {rank: self._pending[call] for rank, call in calls.items()}
        until = self._clock() + REPORT_SECONDS
        try:
            while any(item.answer is None for item in pending.values()) and self._clock() < until:
                self.pump(TICK_SECONDS)
        except RunFailedError as error:
            self.note(f"no report of all processes: {error.role} (rank {error.rank}): {error}")
        for call in calls.values():
            self._pending.pop(call, None)
        return {rank: item.answer.result.value for rank, item in pending.items() if isinstance(item.answer, Reply)}

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
        if peer.endswith(f".{GUARD}"):
            member.guard_heard_at = self._clock()
            if isinstance(message, Ended):
                self._note_end(member, message)
            return
        member.heard_at = self._clock()
        match message:
            case Hello():
                self._greet(member, peer, message)
            case Beat():
                self._note_progress(member, message)
            case Reply() | Failure():
                self._answer(message)

    def _greet(self, member: Member, peer: str, hello: Hello) -> None:
        member.pid, member.seat = hello.pid, Seat(node=hello.node, num_devices=hello.num_devices)
        if member.back_by is None:
            return
        if peer.endswith(f".{PROCESS}"):
            self.post(peer, self._build_request(member.rank), then=lambda built: self._rebuilt(member, built))
        self._take_back(member)

    def _rebuilt(self, member: Member, built: Result) -> None:
        member.rebuilt = built
        self._take_back(member)

    def _take_back(self, member: Member) -> None:
        """Once it is built, and each of its roles has said that it listens."""
        roles = member.assignment["roles"]
        if member.rebuilt is None or not all(self.hub.knows(f"{member.rank}.{role}") for role in roles):
            return
        built, member.rebuilt = member.rebuilt, None
        member.is_lost, member.back_by = False, None
        for role in roles:
            if role in self.on_return:
                self.on_return[role](built)

    def _note_progress(self, member: Member, beat: Beat) -> None:
        if beat.progress != member.beat.progress:
            member.progress_at = self._clock()
        member.beat = beat
        if beat.total and member.is_verifier:
            self.on_progress(beat.done, beat.total)

    def _answer(self, message: Reply | Failure) -> None:
        pending = self._pending.get(message.id)
        if pending is None:
            return
        pending.answer, pending.answered_at = message, self._clock()
        if pending.what == Prefill.__name__:
            self._read_at[pending.peer] = self._clock()
        if pending.then is not None:
            del self._pending[message.id]
            if isinstance(message, Failure):
                self._result_of_later(pending)
            else:
                pending.then(message.result)

    def _result_of_later(self, pending: _Pending) -> None:
        """Nobody waits for this call: a role that can be done without is lost, any other ends the run."""
        with suppress(RoleLostError):
            self._result_of(pending)

    def _note_end(self, member: Member, ended: Ended) -> None:
        if ended.pid == member.lost_pid:
            return  # it was given up before
        code = ended.exit_code
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        self._lose(member, f"its process {ended.pid} {how}")

    # ---- Looking after everyone. ----

    def _look_after(self) -> None:
        self.look_around()
        found = [(*trouble, member) for member in self.members.values() if (trouble := self._trouble_of(member))]
        for _, reason, member in sorted(found, key=lambda item: item[0]):
            self._lose(member, reason)

    def _trouble_of(self, member: Member) -> tuple[int, str] | None:
        """What is wrong, and how far from the root of a run's failure: the nearest is 0."""
        if self._is_over(member):
            return None
        now, limits = self._clock(), self.limits
        if member.guard_heard_at and now - member.guard_heard_at > SILENCE_SECONDS:
            return 0, f"no word from its guard for {now - member.guard_heard_at:.0f} s"
        if member.is_lost:
            return (0, f"not back after {limits.start_s:g} s") if now > member.back_by else None
        silence = now - member.heard_at if member.heard_at else 0.0
        if silence > (limits.stall_s if member.is_needed else limits.silence_s):
            return 0, f"no heartbeat for {silence:.0f} s"
        return self._stall_of(member)

    def _stall_of(self, member: Member) -> tuple[int, str] | None:
        asked = [item for item in self._pending.values() if item.answer is None and self._is_of(item, member)]
        if not asked:
            return None
        stalled = self._clock() - max(member.progress_at, min(item.asked_at for item in asked))
        waits = member.beat.waits_for_others
        if stalled <= self.limits.stall_s + (BLAME_SECONDS if waits else 0.0):
            return None
        where = member.beat.busy_with or asked[0].what
        return 1 + waits, f"no progress for {stalled:.0f} s in {where}"

    def _is_of(self, pending: _Pending, member: Member) -> bool:
        return self._member_of(pending.peer) is member

    def _lose(self, member: Member, reason: str) -> None:
        """Raises RunFailedError where there is no run without it."""
        if member.is_needed:
            self._fail(member, reason)
        if self._is_over(member):
            return
        member.is_lost, member.back_by, member.rebuilt = True, None, None
        member.lost_pid, member.why_lost = member.pid, reason
        for line in (PROCESS, BEAT, *member.roles):
            self.hub.forget(f"{member.rank}.{line}")
        for call, pending in list(self._pending.items()):
            if pending.answer is None and self._is_of(pending, member):
                pending.answer = RoleLostError(reason)
                if pending.then is not None:
                    del self._pending[call]
        self._restart(member, reason)

    def _restart(self, member: Member, reason: str) -> None:
        who, guard = f"{member.name} (rank {member.rank})", f"{member.rank}.{GUARD}"
        has_guard = self._clock() - member.guard_heard_at <= SILENCE_SECONDS
        if member.num_restarts >= MAX_RESTARTS or not has_guard:
            how = "" if has_guard else " cannot be restarted and"
            self.note(f"{who} is out of order: {reason}; it{how} stays so, and the run goes on without it")
            self._tell(guard, Close(at_once=True))
            return
        member.num_restarts += 1
        member.back_by = self._clock() + self.limits.start_s
        self.note(f"{who} is out of order: {reason}; going on without it while it is restarted")
        self._tell(guard, Restart())

    def _fail(self, member: Member, reason: str) -> None:
        for rank in self.members:
            self._tell(f"{rank}.{GUARD}", DumpStacks())
        time.sleep(STACK_SECONDS)
        raise RunFailedError(member.name, member.rank, reason)

    def check_guards(self) -> None:
        """Whether a signal came from the user, or from torchrun, which ends all processes when one of them died.

        Raises RunFailedError for a guard that died.
        """
        asked_at = self._clock()
        while silent := [m for m in self.members.values() if 0 < m.guard_heard_at <= asked_at and not self._is_over(m)]:
            if self._clock() - asked_at > GUARD_ANSWER_SECONDS:
                raise RunFailedError(silent[0].name, silent[0].rank, "its guard, the process of torchrun, died")
            self.pump(TICK_SECONDS)

    @staticmethod
    def _is_over(member: Member) -> bool:
        return member.is_lost and member.back_by is None

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
        for rank, member in self.members.items():
            now = at_once or member.is_lost
            for line in (GUARD, BEAT) if now else (PROCESS, BEAT, GUARD):
                self._tell(f"{rank}.{line}", Close(now))
        self.hub.close()


def _is_damage(answer: Any) -> bool:
    return isinstance(answer, Failure) and answer.kind == DamagedBlockError.__name__
