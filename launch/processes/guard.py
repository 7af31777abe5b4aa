"""The process that torchrun starts for every rank but the orchestrator's: it runs the worker, and survives it.

torchrun ends a whole run when one of its processes dies. A drafter may die without harm, so what torchrun watches is
this small process, which starts the worker as its child, tells the orchestrator when that ends, and starts it anew or
ends it, a stopped one too, as the orchestrator says. It loads no torch.

Whichever dies, none is left: the worker is killed with its guard by the kernel; and a guard ends when the orchestrator
has ended, which on its own host it sees at once, from another by its silence.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType

import msgspec

from launch.command_line.interruption import ending_signals
from launch.command_line.outcome import ExitCode
from launch.processes.mps import MpsService
from launch.processes.python_module import start_module
from workers.messages import Close, DumpStacks, Ended, Message, Ping, Restart
from workers.process.channel import PING_SECONDS, ChannelError, Endpoints, Line, PingListener
from workers.process.peers import GUARD, peer_name

WORKER_MODULE = "launch.processes.worker_process"
ENDPOINTS, PIPE, START_TIMEOUT = "TIERFORCE_ENDPOINTS", "TIERFORCE_PIPE", "TIERFORCE_START_TIMEOUT"
"""Environment of the worker: how to join a run that its guard belongs to already; or else where to tell the guard how,
and how long to look for it."""
TICK_SECONDS = 0.1
MAX_SILENCE_SECONDS = 4.0
CLOSING_SECONDS = 10.0
FOUND_NOBODY = 3
"""Exit code of a worker that found no orchestrator, and has said so."""
STACKS_SIGNAL = signal.SIGUSR1
"""Signal on which a worker writes the stacks of its threads to its log."""
PR_SET_PDEATHSIG = 1
libc = ctypes.CDLL(None)


def same_host() -> bool:
    """Whether this rank's node is that of the orchestrator."""
    return os.environ.get("GROUP_RANK", "0") == "0"


@dataclass(kw_only=True)
class _Connection:
    """A guard's connection with the orchestrator."""

    line: Line
    pings: PingListener

    def receive(self) -> Message | None:
        """The next message, if one comes within a tick."""
        try:
            return self.line.receive(TICK_SECONDS)
        except ChannelError:
            return None


class Guard:
    """Starts the worker of this process's rank, watches it and ends it."""

    def __init__(
        self,
        start_timeout_s: float,
        worker_module: str = WORKER_MODULE,
        clock: Callable[[], float] = time.monotonic,
    ):
        """The worker is the program `worker_module`; for `start_timeout_s` it looks for the orchestrator."""
        self._rank, self._worker_module, self._clock = os.environ.get("RANK", "0"), worker_module, clock
        self._start_timeout_s, self._pinged_at = start_timeout_s, clock()
        self._endpoints: Endpoints | None = None
        if ENDPOINTS in os.environ:
            self._endpoints = msgspec.json.decode(os.environ[ENDPOINTS], type=Endpoints)
        self._is_told_to_end = False
        self._worker: subprocess.Popen[bytes] | None = None
        self._connection: _Connection | None = None
        self._mps = MpsService(os.environ)
        self._for_mps: dict[str, str] = {}

    def run(self) -> int:
        """The exit code, when the run is over."""
        for number in ending_signals():
            signal.signal(number, self._on_signal)
        try:
            self._for_mps = self._mps.join()
            worker = self._start()
            if self._connection is None:
                return ExitCode.done if self._is_told_to_end else self._fail_to_start(worker)
            return self._watch(worker, self._connection)
        finally:
            self._kill()
            self._mps.close()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # In a run the orchestrator decides: it ends in good order on the same signal, and says so.
        self._is_told_to_end = True

    def _start(self) -> subprocess.Popen[bytes]:
        """A new worker; before the first one is returned, it has found the orchestrator, or will not."""
        if self._endpoints is not None:
            how_to_join = {ENDPOINTS: msgspec.json.encode(self._endpoints).decode()}
            worker = self._worker = self._start_worker(how_to_join)
            if self._connection is None:
                self._connection = self._connect(self._endpoints)
            return worker
        pipe, end = os.pipe()
        where_to_tell = {PIPE: str(end), START_TIMEOUT: str(self._start_timeout_s)}
        worker = self._worker = self._start_worker(where_to_tell, pass_fds=(end,))
        os.close(end)
        self._endpoints = self._told_endpoints(pipe, worker)
        if self._endpoints is not None:
            self._connection = self._connect(self._endpoints)
        return worker

    def _start_worker(self, environment: dict[str, str], pass_fds: tuple[int, ...] = ()) -> subprocess.Popen[bytes]:
        environment = os.environ | self._for_mps | environment
        return start_module(self._worker_module, environment, pass_fds=pass_fds, preexec_fn=_die_with_parent)

    def _told_endpoints(self, pipe: int, worker: subprocess.Popen[bytes]) -> Endpoints | None:
        """How the worker reached the orchestrator, when it has; None if it ended before, or this guard is to end."""
        os.set_blocking(pipe, False)
        text = b""
        while not text.endswith(b"\n"):
            if self._is_told_to_end or worker.poll() is not None:
                return None
            try:
                text += os.read(pipe, 65536)
            except BlockingIOError:
                time.sleep(TICK_SECONDS)
        os.close(pipe)
        return msgspec.convert(json.loads(text), Endpoints)

    def _connect(self, endpoints: Endpoints) -> _Connection:
        messages, pings = endpoints.for_host(same_host=same_host())
        return _Connection(
            line=Line(messages, peer_name(int(self._rank), GUARD), endpoints.secret),
            pings=PingListener(pings, self._clock, endpoints.pid if same_host() else None),
        )

    def _watch(self, worker: subprocess.Popen[bytes], connection: _Connection) -> int:
        """Does what the orchestrator says until the run is over; the exit code."""
        has_told = False
        while True:
            message = connection.receive()
            if isinstance(message, Close):
                return self._end(worker, connection, at_once=message.at_once)
            if isinstance(message, Restart):
                self._kill()
                worker = self._start()
                has_told = False
            if isinstance(message, DumpStacks):
                _show_stacks(worker)
            self._ping(connection)
            if connection.pings.seconds_of_silence() > MAX_SILENCE_SECONDS:
                return ExitCode.failed  # the orchestrator is gone
            if not has_told and (exit_code := worker.poll()) is not None:
                connection.line.send(Ended(exit_code, worker.pid))
                has_told = True

    def _fail_to_start(self, worker: subprocess.Popen[bytes]) -> int:
        """Says why, which nobody else could: the orchestrator does not know of this rank yet."""
        if (exit_code := worker.returncode) != FOUND_NOBODY:
            print(
                f"tierforce: failed in phase start, rank {self._rank}: its process {worker.pid} ended with exit "
                f"code {exit_code} before it found the orchestrator",
                file=sys.stderr,
                flush=True,
            )
        return ExitCode.failed

    def _ping(self, connection: _Connection) -> None:
        now = self._clock()
        if now - self._pinged_at >= PING_SECONDS:
            connection.line.send(Ping())
            self._pinged_at = now

    def _end(self, worker: subprocess.Popen[bytes], connection: _Connection, *, at_once: bool) -> int:
        with suppress(subprocess.TimeoutExpired):
            worker.wait(0 if at_once else CLOSING_SECONDS)
        connection.line.close()
        return ExitCode.done

    def _kill(self) -> None:
        """Ends the worker, a stopped one, too."""
        if self._worker is not None and self._worker.poll() is None:
            self._worker.kill()
            self._worker.wait()


def _show_stacks(worker: subprocess.Popen[bytes]) -> None:
    """Has the worker, a stopped one, too, write its stacks to its log."""
    if worker.poll() is None:
        worker.send_signal(signal.SIGCONT)
        worker.send_signal(STACKS_SIGNAL)


def _die_with_parent() -> None:
    """Between fork and exec of the worker: the kernel is to kill it when its guard ends, however that happens."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(Guard(0.0).run())  # of the orchestrator's own rank: its worker is told where to find the orchestrator
