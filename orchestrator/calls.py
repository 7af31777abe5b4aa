"""Calls to the worker processes that were made and not taken yet, and the errors that a call may raise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from orchestrator.placement import VERIFIER_ROLE
from tiers.errors import DamagedBlockError
from workers.messages import Failure, Prefill, Reply, Request, Result
from workers.process.peers import line_of, rank_of

ROOT_CAUSE_SECONDS = 1.0
"""Time, after a call raised, until the news of another's death is here, which may be why it did."""


class RunFailedError(RuntimeError):
    """A run cannot go on: says which role, on which rank."""

    def __init__(self, role: str, rank: int, reason: str):
        super().__init__(reason)
        self.role, self.rank = role, rank


class RoleLostError(RuntimeError):
    """An optional role is out of order for now; the run goes on without it."""


@dataclass(slots=True)
class PendingCall:
    """One request to one peer; times are those of the crew's clock, in seconds."""

    peer: str
    asked_at: float
    what: str
    """Name of the request's type."""
    then: Callable[[Result], None] | None = None
    """Takes the result of a call that nobody waits for."""
    answer: Reply | Failure | RoleLostError | None = None
    answered_at: float = 0.0

    @property
    def is_damage(self) -> bool:
        """Whether the call met a damaged block, which all ranks of a verifier get over together."""
        return isinstance(self.answer, Failure) and self.answer.kind == DamagedBlockError.__name__

    @property
    def has_failed(self) -> bool:
        """Whether the call raised, and not for a damaged block."""
        return isinstance(self.answer, Failure) and not self.is_damage


class PendingCalls:
    """All calls that were made and not taken yet, by id."""

    def __init__(self) -> None:
        self._calls: dict[int, PendingCall] = {}
        self._next_id = 0
        self._read_at: dict[str, float] = {}

    def __getitem__(self, call_id: int) -> PendingCall:
        return self._calls[call_id]

    def add(self, peer: str, request: Request, now: float, then: Callable[[Result], None] | None) -> int:
        """Notes a call that is being made; returns its id."""
        self._next_id += 1
        self._calls[self._next_id] = PendingCall(peer, now, type(request).__name__, then)
        return self._next_id

    def drop(self, call_ids: Iterable[int]) -> None:
        """Forgets calls: their answers were taken, or will not be heard."""
        for call_id in call_ids:
            self._calls.pop(call_id, None)

    def answer(self, message: Reply | Failure, now: float) -> PendingCall | None:
        """Notes an answer. Returns the call if nobody waits for it: it is dropped then."""
        call = self._calls.get(message.id)
        if call is None:
            return None
        call.answer, call.answered_at = message, now
        if call.what == Prefill.__name__:
            self._read_at[call.peer] = now
        if call.then is None:
            return None
        del self._calls[message.id]
        return call

    def give_up(self, rank: int, reason: str) -> None:
        """Answers what a lost rank was asked: RoleLostError for those who wait, nothing for the others."""
        for call_id, call in list(self._calls.items()):
            if call.answer is None and rank_of(call.peer) == rank:
                call.answer = RoleLostError(reason)
                if call.then is not None:
                    del self._calls[call_id]

    def unanswered(self, rank: int) -> list[PendingCall]:
        """Calls that a rank has not answered, the oldest first."""
        return [call for call in self._open() if rank_of(call.peer) == rank]

    def seconds_since(self, call: PendingCall, now: float) -> float:
        """Seconds that a call is waited for; 0 if it is answered. Reading a prompt before it does not count."""
        if call.answer is not None:
            return 0.0
        is_reading = any(other.peer == call.peer and other.what == Prefill.__name__ for other in self._open())
        return 0.0 if is_reading else now - max(call.asked_at, self._read_at.get(call.peer, 0.0))

    def _open(self) -> Iterator[PendingCall]:
        return (call for call in self._calls.values() if call.answer is None)


def are_settled(calls: Sequence[PendingCall], now: float, *, is_sharded: bool) -> bool:
    """Whether all have answered; or one has failed, for which others may wait in vain.

    Where the verifier `is_sharded`, its ranks compute together, and one may have died of another's death, the news of
    which takes a moment longer than what it does to others.
    """
    failed = [call for call in calls if call.has_failed]
    if all(call.answer is not None for call in calls):
        failed = [call for call in failed if is_sharded and line_of(call.peer) == VERIFIER_ROLE]
        if not failed:
            return True
    return bool(failed) and now - min(call.answered_at for call in failed) > ROOT_CAUSE_SECONDS
