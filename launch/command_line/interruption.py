"""What Ctrl-C and SIGTERM do to a run."""

from __future__ import annotations

import signal
import time
from types import FrameType


class Interruption:
    """Ctrl-C and SIGTERM: the first one ends the run in good order, a later one at once.

    While a round is decoded the first is only noted, so that the session stays whole; elsewhere it raises
    KeyboardInterrupt. torchrun passes a Ctrl-C on to a process that had it already: an echo is no second one.
    A round that waits for other processes may be left, too, when it takes longer than torchrun's patience.
    """

    ECHO_SECONDS = 2.0
    PATIENCE_SECONDS = 15.0
    """torchrun kills after 30."""

    def __init__(self) -> None:
        self.is_requested = self.is_deferred = False
        self._first_at = 0.0

    def __enter__(self) -> Interruption:
        self._earlier = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
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
