"""Ctrl-C, SIGTERM and SIGHUP: how they end a run in good order."""

from __future__ import annotations

import signal
import time
from types import FrameType


def ending_signals() -> list[signal.Signals]:
    """The signals that are to end a run.

    SIGHUP, which says that the terminal is gone, is none of them where it is ignored already: so nohup wants it.
    """
    hangs_up = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hangs_up else [])]


class Interruption:
    """Handles signals within its `with`: the first one ends the run in good order, a later one at once.

    While a round is decoded the first is only noted, so that the session stays whole; elsewhere it raises
    KeyboardInterrupt. A round that waits for other processes may be left, too, when it takes too long.
    """

    ECHO_SECONDS = 2.0
    """Time within which a second signal is the first one's echo: torchrun passes on a Ctrl-C that we had already."""
    PATIENCE_SECONDS = 15.0
    """How long a round may take after the first signal; torchrun kills after 30."""

    def __init__(self) -> None:
        self.is_requested = False
        """The run is to end; whoever decodes looks here after each round."""
        self.is_deferred = False
        """The first signal is only noted; set by whoever looks at `is_requested`."""
        self._first_at = 0.0

    def __enter__(self) -> Interruption:
        self._earlier = {number: signal.signal(number, self._on_signal) for number in ending_signals()}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.is_requested:
            self.is_requested, self._first_at = True, now
            must_stop_now = not self.is_deferred
        else:
            must_stop_now = now - self._first_at > self.ECHO_SECONDS
        if must_stop_now:
            raise KeyboardInterrupt

    def check_patience(self) -> None:
        """Raises KeyboardInterrupt when a round takes too long after the first signal."""
        if self.is_requested and self.is_deferred and time.monotonic() - self._first_at > self.PATIENCE_SECONDS:
            raise KeyboardInterrupt
