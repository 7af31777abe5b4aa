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
from contextlib import suppress
from pathlib import Path
from types import FrameType

import msgspec

from launch.processes.mps import Service
from workers.messages import Close, DumpStacks, Ended, Ping, Restart
from workers.process.channel import PING_SECONDS, ChannelError, Endpoints, Line, PingListener

WORKER_PROGRAM = Path(__file__).with_name("worker_process.py")
ENDPOINTS, PIPE, START_TIMEOUT = "TIERFORCE_ENDPOINTS", "TIERFORCE_PIPE", "TIERFORCE_START_TIMEOUT"
"""Environment of the worker: how to join a run that its guard belongs to already; or else where to tell the guard how,
and how long to look for it."""
TICK_SECONDS = 0.1
MAX_SILENCE_SECONDS = 4.0
CLOSING_SECONDS = 10.0
DONE, FAILED, FOUND_NOBODY = 0, 1, 3
STACKS_SIGNAL = signal.SIGUSR1
"""To the worker: it writes the stacks of its threads to its log."""
PR_SET_PDEATHSIG = 1
libc = ctypes.CDLL(None)


def same_host() -> bool:
    """Whether this rank's node is that of the orchestrator."""
    return os.environ.get("GROUP_RANK", "0") == "0"


class Guard:
    """Of the worker of this process's rank."""

    def __init__(self, start_timeout_s: float, clock=time.monotonic):
        """`start_timeout_s`: so long its worker looks for the orchestrator."""
        self._rank, self._clock = os.environ.get("RANK", "0"), clock
        self._start_timeout_s, self._pinged_at = start_timeout_s, clock()
        self._endpoints: Endpoints | None = None
        if ENDPOINTS in os.environ:
            self._endpoints = msgspec.json.decode(os.environ[ENDPOINTS], type=Endpoints)
        self._is_told_to_end = False
        self._worker: subprocess.Popen | None = None
        self._line: Line | None = None
        self._pings: PingListener | None = None
        self._mps = Service(os.environ)
        self._for_mps: dict[str, str] = {}

    def run(self) -> int:
        """The exit code, when the run is over."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        try:
            self._for_mps = self._mps.join()
            self._start()
            return self._watch()
        finally:
            self._kill()
            self._mps.close()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # In a run the orchestrator decides: it ends in good order on the same signal, and says so.
        self._is_told_to_end = True

    def _start(self) -> None:
        environment, pipe = os.environ | self._for_mps, None
        if self._endpoints is None:
            pipe, end = os.pipe()
            environment |= {PIPE: str(end), START_TIMEOUT: str(self._start_timeout_s)}
        else:
            environment[ENDPOINTS] = msgspec.json.encode(self._endpoints).decode()
        self._worker = subprocess.Popen(
            [sys.executable, str(WORKER_PROGRAM)],
            env=environment,
            pass_fds=() if pipe is None else (end,),
            start_new_session=True,  # a Ctrl-C in the terminal is the orchestrator's to judge
            preexec_fn=_die_with_parent,
        )
        if pipe is not None:
            os.close(end)
            self._join(pipe)
        elif self._line is None:
            self._connect()

    def _join(self, pipe: int) -> None:
        """Waits until the worker has found the orchestrator."""
        os.set_blocking(pipe, False)
        text = b""
        while not text.endswith(b"\n"):
            if self._is_told_to_end or self._worker.poll() is not None:
                return
            try:
                text += os.read(pipe, 65536)
            except BlockingIOError:
                time.sleep(TICK_SECONDS)
        os.close(pipe)
        self._endpoints = msgspec.convert(json.loads(text), Endpoints)
        self._connect()

    def _connect(self) -> None:
        messages, pings = self._endpoints.for_host(same_host=same_host())
        self._line = Line(messages, f"{self._rank}.guard", self._endpoints.secret)
        self._pings = PingListener(pings, self._clock, self._endpoints.pid if same_host() else None)

    def _watch(self) -> int:
        if self._line is None:
            return DONE if self._is_told_to_end else self._fail_to_start()
        has_told = False
        while True:
            message = self._receive()
            if isinstance(message, Close):
                return self._end(at_once=message.at_once)
            if isinstance(message, Restart):
                self._kill()
                self._start()
                has_told = False
            if isinstance(message, DumpStacks):
                self._show_stacks()
            self._ping()
            if self._pings.seconds_of_silence() > MAX_SILENCE_SECONDS:
                return FAILED  # the orchestrator is gone
            if not has_told and (exit_code := self._worker.poll()) is not None:
                self._line.send(Ended(exit_code, self._worker.pid))
                has_told = True

    def _fail_to_start(self) -> int:
        """Nobody else could say so: the orchestrator does not know of this rank yet."""
        if (exit_code := self._worker.returncode) != FOUND_NOBODY:
            print(
                f"tierforce: failed in phase start, rank {self._rank}: its process {self._worker.pid} ended with exit "
                f"code {exit_code} before it found the orchestrator",
                file=sys.stderr,
                flush=True,
            )
        return FAILED

    def _ping(self) -> None:
        now = self._clock()
        if now - self._pinged_at >= PING_SECONDS:
            self._line.send(Ping())
            self._pinged_at = now

    def _show_stacks(self) -> None:
        """Of a stopped process, too."""
        if self._worker.poll() is None:
            self._worker.send_signal(signal.SIGCONT)
            self._worker.send_signal(STACKS_SIGNAL)

    def _receive(self) -> Close | Restart | DumpStacks | None:
        try:
            return self._line.receive(TICK_SECONDS)
        except ChannelError:
            return None

    def _end(self, *, at_once: bool) -> int:
        with suppress(subprocess.TimeoutExpired):
            self._worker.wait(0 if at_once else CLOSING_SECONDS)
        self._line.close()
        return DONE

    def _kill(self) -> None:
        """A stopped process, too."""
        if self._worker is not None and self._worker.poll() is None:
            self._worker.kill()
            self._worker.wait()


def _die_with_parent() -> None:
    """Between fork and exec: whatever becomes of the guard."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(Guard(0.0).run())  # of the orchestrator's own rank: it is told where to find it
