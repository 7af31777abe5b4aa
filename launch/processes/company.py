"""The processes of a run, from the first greeting to the last.

The company is whom the orchestrator has brought together: it opens the sockets that the others come to, starts what
torchrun does not, and ends them all. What they say to each other is the business of its crew (orchestrator.crew).
"""

from __future__ import annotations

import os
import secrets
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress

import msgspec
from torch._C._distributed_c10d import TCPStore  # torch.distributed does not export it by name
from torch.distributed.distributed_c10d import Store

from conf.schema import RunConfig
from launch.processes.guard import CLOSING_SECONDS, ENDPOINTS
from launch.processes.python_module import start_module
from launch.processes.rendezvous import NOTICE_SECONDS, meeting_point, publish_endpoints
from orchestrator.calls import RunFailedError
from orchestrator.crew import Crew
from orchestrator.health import TimeLimits
from orchestrator.placement import Placement
from workers.process.channel import Endpoints, Hub

GUARD_MODULE = "launch.processes.guard"
PATIENCE_SECONDS = 2.0
"""How much longer than its worker a guard may take to end."""


class Company:
    """Brings the processes of a run together and ends them; `crew` talks to them meanwhile."""

    def __init__(
        self,
        config: RunConfig,
        placement: Placement,
        note: Callable[[str], None],
        look_around: Callable[[], None] = lambda: None,
    ):
        """`note(line)` tells the user what happens; `look_around()` is called regularly, and may raise to leave what is
        waited for."""
        self.placement = placement
        # Ranks of other nodes reach the orchestrator by the address that they found torchrun's store at.
        is_one_node = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
        self._host = None if is_one_node else os.environ["MASTER_ADDR"]
        self._hub = Hub(secrets.token_hex(16), self._host)
        self._guards: list[subprocess.Popen[bytes]] = []
        self._store: TCPStore | None = None
        self._meeting_place: Store | None = None
        limits = TimeLimits(
            start_s=config.placement.start_timeout_s,
            stall_s=config.placement.stall_timeout_s,
            draft_s=config.placement.draft_timeout_s,
        )
        self.crew = Crew(self._hub, placement, limits, note)
        self.crew.look_around = self._look_around
        self._start_s, self._look_elsewhere = config.placement.start_timeout_s, look_around
        self._note, self._awaited_since, self._has_told = note, 0.0, False

    @property
    def endpoints(self) -> Endpoints:
        """Where the others reach the orchestrator."""
        return self._hub.endpoints

    def start(self) -> None:
        """Tells the other ranks where to come; a role of this rank gets a process of its own, too."""
        if 0 in self.placement.worker_ranks:
            environment = os.environ | {ENDPOINTS: msgspec.json.encode(self.endpoints).decode(), "RANK": "0"}
            self._guards.append(start_module(GUARD_MODULE, environment))
        if len(self.placement.worker_ranks) > len(self._guards):
            self._meeting_place = publish_endpoints(self.endpoints, self._start_s, self._note)

    def _look_around(self) -> None:
        """Raises RunFailedError where a guard of this rank has ended; torchrun looks after those of other ranks."""
        self._look_elsewhere()
        if not self._has_told:
            self._tell_who_is_awaited()
        for guard in self._guards:
            if (exit_code := guard.poll()) is not None:
                raise RunFailedError("+".join(self.placement.roles_of(0)), 0, f"its guard ended with code {exit_code}")

    def _tell_who_is_awaited(self) -> None:
        """Names the ranks that have not come, once, when they have been waited for a while; rank 0 is this host's."""
        self._awaited_since = self._awaited_since or time.monotonic()
        awaited = [member for member in self.crew.members.values() if member.rank != 0 and not member.pid]
        if not awaited:
            self._has_told = True
        elif time.monotonic() - self._awaited_since > NOTICE_SECONDS:
            self._has_told = True
            ranks = ", ".join(f"{member.rank} ({member.name})" for member in awaited)
            self._note(
                f"waiting for rank{'s' if len(awaited) > 1 else ''} {ranks} at {meeting_point()}, for "
                f"{self._start_s:g} s (placement.start_timeout_s) at most"
            )

    def store(self) -> tuple[str, int]:
        """Host and port where the ranks of a sharded model find each other."""
        if self._store is None:
            self._store = TCPStore(self._host or "127.0.0.1", 0, is_master=True, wait_for_workers=False)
        return self._store.host, self._store.port

    def close(self, *, at_once: bool = False) -> None:
        """Ends all of them: in good order, or whatever they are doing."""
        self.crew.close(at_once=at_once)
        for guard in self._guards:
            with suppress(subprocess.TimeoutExpired):
                guard.wait(0 if at_once else CLOSING_SECONDS + PATIENCE_SECONDS)
            guard.kill()  # and its worker with it, whatever state they are in
            guard.wait()
