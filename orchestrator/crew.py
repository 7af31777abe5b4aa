"""The worker processes as the orchestrator sees them: who is there, what was asked, who has died or stands still.

A process has three lines: `<rank>.process` (build, report), `<rank>.beat` (heartbeats, from a thread of its own) and
`<rank>.guard` (its guard, which ends and restarts it); and one for each role it plays, `<rank>.<role>`. What is known
of it: orchestrator.members; what it was asked: orchestrator.calls.

    what is seen                                     of a drafter or retriever           of a verifier, or while loading
    the guard says that the process ended            go on without it, restart it        the run fails
    no heartbeat for SILENCE_SECONDS (verifier: stall_s)   go on without it, restart it        the run fails
    a call takes more than draft_s                   go on without it, restart it        -
    asked, but no progress for stall_s               go on without it, restart it        the run fails
    a call raised                                    go on without it, restart it        the run fails (or rereads)
    restarted MAX_RESTARTS times, or no guard        go on without it                    the run fails

Who fails a run is the one where it began (orchestrator.health), and of calls that raised the first. All stacks are then
in the logs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn

from conf.schema import ConfigError
from orchestrator.calls import PendingCall, PendingCalls, RoleLostError, RunFailedError, are_settled
from orchestrator.health import TimeLimits, has_guard, how_it_ended, trouble_of
from orchestrator.members import Member
from orchestrator.placement import Placement, Seat
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
    Plain,
    Reply,
    Request,
    Restart,
    Result,
)
from workers.process.channel import ChannelError, Hub
from workers.process.peers import BEAT, GUARD, PROCESS, line_of, peer_name, rank_of

TICK_SECONDS = 0.25
MAX_RESTARTS = 3
STACK_SECONDS = 1.0
"""Time for workers to write their stacks before they are ended."""
REPORT_SECONDS = 5.0
GUARD_ANSWER_SECONDS = 2.0


class Crew:
    """The workers of a run: brings them together, asks them, looks after them. All from one thread."""

    def __init__(
        self,
        hub: Hub,
        placement: Placement,
        limits: TimeLimits,
        note: Callable[[str], None] = lambda line: None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`note(line)` tells the user what happened."""
        self.hub, self.limits, self.placement = hub, limits, placement
        self.note, self._clock = note, clock
        self.members = {rank: Member(rank=rank, roles=placement.roles_of(rank)) for rank in placement.worker_ranks}
        self.on_progress: Callable[[int, int], None] = lambda done, total: None
        """Called with the tokens of the prompt that were read, and all of them, through all layers."""
        self.on_return: dict[str, Callable[[Built], None]] = {}
        """Callbacks by role: called when its restarted process has built the role again."""
        self.look_around: Callable[[], None] = lambda: None
        """Called regularly while waiting; may raise to leave what is waited for."""
        self._calls = PendingCalls()
        self._config: dict[str, Any] = {}

    # ---- Coming together. ----

    def gather(self) -> None:
        """Waits until every process is there. Raises RunFailedError."""
        peers = [peer for member in self.members.values() for peer in member.peers(PROCESS, BEAT, GUARD)]
        if missing := self._missing(peers):
            member, where = self._member_of(missing[0]), self.hub.endpoints.remote or "this host's sockets"
            raise RunFailedError(
                member.name,
                member.rank,
                f"{', '.join(missing)} did not come to {where} within {self.limits.start_s:g} s "
                "(placement.start_timeout_s)",
            )

    def build(self, config: dict[str, Any], assignments: dict[int, dict[str, Any]]) -> dict[int, Built]:
        """Has these ranks load and allocate their assignments, all at once; what each built. Raises RunFailedError."""
        self._config = config
        members = {rank: self.members[rank] for rank in assignments}
        for rank, member in members.items():
            member.assignment = assignments[rank]
            for peer in member.peers(*member.roles):
                self.hub.forget(peer)  # of what it had built before
        calls = [self.post(peer_name(rank, PROCESS), Build(config, assignments[rank])) for rank in members]
        replies = self.wait_all(calls, self.limits.start_s)
        if missing := self._missing([peer for each in members.values() for peer in each.peers(*each.active_roles)]):
            self._fail(self._member_of(missing[0]), f"{missing[0]} did not come")
        built = {}
        for member, reply in zip(members.values(), replies, strict=True):
            member.is_built = True
            assert isinstance(reply.result, Built)
            built[member.rank] = reply.result
        return built

    def _missing(self, peers: list[str]) -> list[str]:
        """Waits until the hub knows these peers; returns those that did not come within `limits.start_s`."""
        began = self._clock()
        while missing := [peer for peer in peers if not self.hub.knows(peer)]:
            if self._clock() - began > self.limits.start_s:
                break
            self.pump(TICK_SECONDS)
        return missing

    # ---- Asking. ----

    def post(self, peer: str, request: Request, then: Callable[[Result], None] | None = None) -> int:
        """Asks without waiting; `then` is called with the result when it comes. Returns the call's id."""
        call_id = self._calls.add(peer, request, self._clock(), then)
        self._tell(peer, Call(call_id, request))  # whose process is gone will be found so, and why
        return call_id

    def post_all(self, peers: Iterable[str], request: Request) -> list[int]:
        """Asks several without waiting. Returns the calls' ids."""
        return [self.post(peer, request) for peer in peers]

    def wait(self, call: int, timeout_s: float | None = None) -> Result:
        """Waits for the result of one call; see `wait_all`."""
        return self.wait_all([call], timeout_s)[0].result

    def ask(self, peers: Iterable[str], request: Request, timeout_s: float | None = None) -> list[Reply]:
        """Asks several at once, and waits for all of them; see `wait_all`."""
        return self.wait_all(self.post_all(peers, request), timeout_s)

    def are_answered(self, calls: list[int]) -> bool:
        """Whether `wait_all` would return or raise at once; listens for a moment."""
        self.pump(0)
        return self._are_settled([self._calls[call] for call in calls])

    def wait_all(self, calls: list[int], timeout_s: float | None = None) -> list[Reply]:
        """Waits for the replies to these calls. `timeout_s` limits the time of each; all processes are watched besides.

        Raises RoleLostError, RunFailedError, DamagedBlockError, ConfigError.
        """
        pending = [self._calls[call] for call in calls]
        while not self._are_settled(pending):
            self.pump(TICK_SECONDS)
            for call in pending:
                if timeout_s is not None and self._calls.seconds_since(call, self._clock()) > timeout_s:
                    self._lose(self._member_of(call.peer), f"{call.what} took more than {timeout_s:g} s")
        self._calls.drop(calls)
        # What a damaged block did to one rank shows in the others as odd results: it comes first.
        answered = [call for call in pending if call.answer is not None]
        for call in sorted(answered, key=lambda call: (not call.is_damage, call.answered_at)):
            self._reply_of(call)
        return [self._reply_of(call) for call in pending]

    def _are_settled(self, pending: list[PendingCall]) -> bool:
        return are_settled(pending, self._clock(), is_sharded=self.placement.tensor_parallel > 1)

    def _reply_of(self, call: PendingCall) -> Reply:
        """The reply to a call that was answered; raises what became of it otherwise."""
        answer = call.answer
        if isinstance(answer, Reply):
            return answer
        if isinstance(answer, RoleLostError):
            raise answer
        assert answer is not None, f"{call.what} was not answered"
        if call.is_damage:
            raise DamagedBlockError(answer.message)
        member = self._member_of(call.peer)
        if answer.kind == ConfigError.__name__ and not member.is_built:
            raise ConfigError(answer.message)
        reason = f"{answer.kind}: {answer.message}"
        self._lose(member, reason)
        raise RoleLostError(reason)

    def reports(self) -> dict[int, Any]:
        """Reports of the processes that are there and answer in time, by rank: JSON types.

        By now all tokens are there: nobody is needed any more.
        """
        there = [rank for rank, member in self.members.items() if not member.is_lost]
        calls = {rank: self.post(peer_name(rank, PROCESS), MakeReport()) for rank in there}
        pending = {rank: self._calls[call] for rank, call in calls.items()}
        until = self._clock() + REPORT_SECONDS
        try:
            while any(call.answer is None for call in pending.values()) and self._clock() < until:
                self.pump(TICK_SECONDS)
        except RunFailedError as error:
            self.note(f"no report of all processes: {error.role} (rank {error.rank}): {error}")
        self._calls.drop(calls.values())
        results = {rank: call.answer.result for rank, call in pending.items() if isinstance(call.answer, Reply)}
        return {rank: result.value for rank, result in results.items() if isinstance(result, Plain)}

    # ---- Listening. ----

    def pump(self, timeout_s: float) -> None:
        """Takes what has come, for at most `timeout_s` if nothing does, and looks after everyone."""
        received = self.hub.receive(timeout_s)
        while received is not None:
            self._take(*received)
            received = self.hub.receive(0)
        self._look_after()

    def _take(self, peer: str, message: Message) -> None:
        try:
            member = self.members[rank_of(peer)]
        except (KeyError, ValueError):
            return  # nobody of this run
        if line_of(peer) == GUARD:
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
        if line_of(peer) == PROCESS:
            self.post(peer, Build(self._config, member.assignment), then=partial(self._take_back, member))
        self._take_back(member)

    def _take_back(self, member: Member, built: Result | None = None) -> None:
        """Ends a member's loss, once it is `built` and each of its roles has said that it listens."""
        if isinstance(built, Built):
            member.rebuilt = built
        if member.rebuilt is None or not all(map(self.hub.knows, member.peers(*member.active_roles))):
            return
        rebuilt = member.mark_back()
        for role in member.active_roles:
            if role in self.on_return:
                self.on_return[role](rebuilt)

    def _note_progress(self, member: Member, beat: Beat) -> None:
        member.hear(beat, self._clock())
        if beat.total and member.is_verifier:
            self.on_progress(beat.done, beat.total)

    def _answer(self, message: Reply | Failure) -> None:
        call = self._calls.answer(message, self._clock())
        if call is None or call.then is None:
            return
        if isinstance(message, Reply):
            return call.then(message.result)
        # Nobody waits for this call: a role that can be done without is lost by its failure, any other ends the run.
        with suppress(RoleLostError):
            self._reply_of(call)

    def _note_end(self, member: Member, ended: Ended) -> None:
        if ended.pid == member.lost_pid:
            return  # it was given up before
        self._lose(member, f"its process {ended.pid} {how_it_ended(ended)}")

    # ---- Looking after everyone. ----

    def _look_after(self) -> None:
        self.look_around()
        found = [
            (trouble, member)
            for member in self.members.values()
            if (trouble := trouble_of(member, self._calls.unanswered(member.rank), self._clock(), self.limits))
        ]
        for trouble, member in sorted(found, key=lambda item: item[0].distance):
            self._lose(member, trouble.reason)

    def _lose(self, member: Member, reason: str) -> None:
        """Goes on without a member. Raises RunFailedError where there is no run without it."""
        if member.is_needed:
            self._fail(member, reason)
        if member.is_over:
            return
        member.mark_lost(reason)
        for peer in member.peers(PROCESS, BEAT, *member.roles):
            self.hub.forget(peer)
        self._calls.give_up(member.rank, reason)
        self._restart(member, reason)

    def _restart(self, member: Member, reason: str) -> None:
        who, guard = f"{member.name} (rank {member.rank})", peer_name(member.rank, GUARD)
        is_guarded = has_guard(member, self._clock())
        if member.num_restarts >= MAX_RESTARTS or not is_guarded:
            how = "" if is_guarded else " cannot be restarted and"
            self.note(f"{who} is out of order: {reason}; it{how} stays so, and the run goes on without it")
            self._tell(guard, Close(at_once=True))
            return
        member.num_restarts += 1
        member.back_by = self._clock() + self.limits.start_s
        self.note(f"{who} is out of order: {reason}; going on without it while it is restarted")
        self._tell(guard, Restart())

    def _fail(self, member: Member, reason: str) -> NoReturn:
        for other in self.members.values():
            self._tell(peer_name(other.rank, GUARD), DumpStacks())
        time.sleep(STACK_SECONDS)
        raise RunFailedError(member.name, member.rank, reason)

    def check_guards(self) -> None:
        """Finds whether a signal came from the user, or from torchrun, which ends all processes when one of them died.

        Raises RunFailedError for a guard that died.
        """
        asked_at = self._clock()
        while silent := [m for m in self.members.values() if 0 < m.guard_heard_at <= asked_at and not m.is_over]:
            if self._clock() - asked_at > GUARD_ANSWER_SECONDS:
                raise RunFailedError(silent[0].name, silent[0].rank, "its guard, the process of torchrun, died")
            self.pump(TICK_SECONDS)

    def _member_of(self, peer: str) -> Member:
        return self.members[rank_of(peer)]

    def _tell(self, peer: str, message: Message) -> None:
        try:
            self.hub.send(peer, message)
        except ChannelError:
            return  # gone: what it was to be told does not matter any more

    def close(self, *, at_once: bool = False) -> None:
        """Ends all processes: in good order, or whatever they are doing."""
        for member in self.members.values():
            now = at_once or member.is_lost
            for peer in member.peers(GUARD, BEAT) if now else member.peers(PROCESS, BEAT, GUARD):
                self._tell(peer, Close(now))
        self.hub.close()
