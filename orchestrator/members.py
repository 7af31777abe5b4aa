"""The worker process of one rank as the orchestrator sees it: what it is, and what was last heard of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from orchestrator.placement import VERIFIER_ROLE, Seat
from workers.messages import Beat, Built
from workers.process.peers import peer_name


@dataclass(kw_only=True)
class Member:
    """The process of one rank. Times are those of the crew's clock, in seconds; 0: never."""

    rank: int
    roles: list[str]
    pid: int = 0
    seat: Seat = field(default_factory=lambda: Seat(node=0, num_devices=0))
    """Node and devices of the process, as it said when it came."""
    heard_at: float = 0.0
    guard_heard_at: float = 0.0
    beat: Beat = field(default_factory=lambda: Beat(0, ""))
    """The last heartbeat of the process."""
    progress_at: float = 0.0
    """Time of the first heartbeat that told as much progress as the last one."""
    is_built: bool = False
    is_lost: bool = False
    back_by: float | None = None
    """Time by which the restarted process of a lost member must be there; None: it is not restarted any more."""
    rebuilt: Built | None = None
    """Answer of a restarted process that has built its roles, until these can be asked."""
    lost_pid: int | None = None
    num_restarts: int = 0
    why_lost: str = ""
    """Reason why it was lost the last time."""
    assignment: dict[str, Any] = field(default_factory=dict)

    @property
    def is_verifier(self) -> bool:
        return VERIFIER_ROLE in self.roles

    @property
    def is_needed(self) -> bool:
        """Whether there is no run without it: a verifier; and before the run begins, everyone."""
        return self.is_verifier or not self.is_built

    @property
    def active_roles(self) -> list[str]:
        """The roles that it was assigned: without those that the run's mode does not use."""
        return list(self.assignment["roles"])

    @property
    def is_over(self) -> bool:
        """Whether it is lost for good: not restarted any more."""
        return self.is_lost and self.back_by is None

    @property
    def name(self) -> str:
        """Names of its roles, for messages: `verifier`, or `verifier+retriever+drafter`."""
        return "+".join(self.roles)

    def hear(self, beat: Beat, now: float) -> None:
        """Takes a heartbeat."""
        if beat.progress != self.beat.progress:
            self.progress_at = now
        self.beat = beat

    def mark_lost(self, reason: str) -> None:
        """Gives its process up: it is lost until `mark_back`."""
        self.is_lost, self.back_by, self.rebuilt = True, None, None
        self.lost_pid, self.why_lost = self.pid, reason

    def mark_back(self) -> Built:
        """Ends its loss; returns what its restarted process has built."""
        assert self.rebuilt is not None, f"{self.name} has built nothing"
        built, self.rebuilt = self.rebuilt, None
        self.is_lost, self.back_by = False, None
        return built

    def peers(self, *lines: str) -> list[str]:
        """Names of these lines of its rank."""
        return [peer_name(self.rank, line) for line in lines]
