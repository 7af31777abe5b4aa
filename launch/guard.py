"""The process that torchrun starts for every rank but the orchestrator's: it runs the worker, and survives it.

torchrun ends a whole run when one of its processes dies. A drafter may die without harm, so what torchrun watches is
this small process, which starts the worker as its child, tells the orchestrator when that ends, and starts it anew or
ends it, a stopped one too, as the orchestrator says. It loads no torch.
"""

from __future__ import annotations

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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.mps import Service
from workers.channel import ChannelError, Endpoints, Line, PingListener
from workers.messages import Close, Ended, Restart

WORKER_PROGRAM = Path(__file__).with_name("role_process.py")
ENDPOINTS, PIPE = "TIERFORCE_ENDPOINTS", "TIERFORCE_PIPE"
"""Environment of the worker: how to join a run that its guard belongs to already; where to tell the guard how."""
TICK_SECONDS = 0.1
MAX_SILENCE_SECONDS = 5.0
CLOSING_SECONDS = 10.0
DONE, FAILED = 0, 1


def same_host() -> bool:
    """Whether this rank's node is that of the orchestrator."""
    return os.environ.get("GROUP_RANK", "0") == "0"


class Guard:
    """Of the worker of this process's rank."""

    def __init__(self, clock=time.monotonic):
        self._rank, self._clock = os.environ.get("RANK", "0"), clock
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
            environment[PIPE] = str(end)
        else:
            environment[ENDPOINTS] = msgspec.json.encode(self._endpoints).decode()
        self._worker = subprocess.Popen(
            [sys.executable, str(WORKER_PROGRAM)],
            env=environment,
            pass_fds=() if pipe is None else (end,),
            start_new_session=True,  # a Ctrl-C in the terminal is the orchestrator's to judge
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
        self._pings = PingListener(pings, self._clock)

    def _watch(self) -> int:
        if self._line is None:
            return DONE if self._is_told_to_end else FAILED
        has_told = False
        while True:
            message = self._receive()
            if isinstance(message, Close):
                return self._end(at_once=message.at_once)
            if isinstance(message, Restart):
                self._kill()
                self._start()
                has_told = False
            if self._pings.seconds_of_silence() > MAX_SILENCE_SECONDS:
                return FAILED  # the orchestrator is gone
            if not has_told and (exit_code := self._worker.poll()) is not None:
                self._line.send(Ended(exit_code, self._worker.pid))
                has_told = True

    def _receive(self) -> Close | Restart | None:
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


if __name__ == "__main__":
    sys.exit(Guard().run())
