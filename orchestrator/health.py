"""The trouble with a worker process, as a function of what was heard of it, of what it was asked, and of the time.

Who fails a run is the one where it began: a rank that died or is silent before one that makes no progress, that before
one that waits for the others' part of a sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from orchestrator.calls import PendingCall
from orchestrator.members import Member
from workers.messages import Ended

SILENCE_SECONDS = 5.0
"""Longest time without a heartbeat: of a role that can be done without, and of any guard."""
BLAME_SECONDS = 2.0
"""Longer than between two heartbeats: who waits for others is judged after them, whoever's last progress came first."""


@dataclass(kw_only=True)
class TimeLimits:
    """Times that processes may take, in seconds; see conf.schema.PlacementConfig."""

    start_s: float = 600.0
    stall_s: float = 60.0
    draft_s: float = 10.0

    @property
    def silence_s(self) -> float:
        """Longest time without a heartbeat of a role that can be done without."""
        return min(SILENCE_SECONDS, self.stall_s)


class Distance(IntEnum):
    """Distance of a trouble from the root of a run's failure."""

    root = 0
    stalled = 1
    waits_for_others = 2


@dataclass(frozen=True, slots=True)
class Trouble:
    """One thing that is wrong with a member, in words."""

    distance: Distance
    reason: str


def trouble_of(member: Member, asked: Sequence[PendingCall], now: float, limits: TimeLimits) -> Trouble | None:
    """Finds what is wrong with a member at the time `now`; `asked` are the calls that it has not answered yet."""
    if member.is_over:
        return None
    if member.guard_heard_at and not has_guard(member, now):
        return Trouble(Distance.root, f"no word from its guard for {now - member.guard_heard_at:.0f} s")
    if member.is_lost:
        is_late = member.back_by is not None and now > member.back_by
        return Trouble(Distance.root, f"not back after {limits.start_s:g} s") if is_late else None
    silence = now - member.heard_at if member.heard_at else 0.0
    if silence > (limits.stall_s if member.is_needed else limits.silence_s):
        return Trouble(Distance.root, f"no heartbeat for {silence:.0f} s")
    return _stall_of(member, asked, now, limits)


def has_guard(member: Member, now: float) -> bool:
    """Tells whether the member's guard was heard lately, and so can restart it."""
    return now - member.guard_heard_at <= SILENCE_SECONDS


def _stall_of(member: Member, asked: Sequence[PendingCall], now: float, limits: TimeLimits) -> Trouble | None:
    """No progress though something was asked: a process that has nothing to do may stand still."""
    if not asked:
        return None
    stalled = now - max(member.progress_at, min(call.asked_at for call in asked))
    waits = member.beat.waits_for_others
    if stalled <= limits.stall_s + (BLAME_SECONDS if waits else 0.0):
        return None
    where = member.beat.busy_with or asked[0].what
    distance = Distance.waits_for_others if waits else Distance.stalled
    return Trouble(distance, f"no progress for {stalled:.0f} s in {where}")


def how_it_ended(ended: Ended) -> str:
    """The end of a process in words, from its exit code or the signal that killed it."""
    code = ended.exit_code
    return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
