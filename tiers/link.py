"""An emulated link from host to device: what offloading costs can be studied on a machine without a GPU."""

from __future__ import annotations

import threading
import time

CATCH_UP_SECONDS = 1e-3
"""A link is busy without a break if its next copy comes so soon: sleeping is not exact."""


class Link:
    """A link over which copies take turns, and no less time than at `gb_per_s` (1e9 bytes a second).

    With None it is as fast as the machine.
    """

    def __init__(self, gb_per_s: float | None):
        self.gb_per_s = gb_per_s
        self._lock = threading.Lock()
        self._free_at = 0.0

    def pace(self, began: float, num_bytes: int) -> None:
        """Waits until a copy of `num_bytes` that began at time.perf_counter() == `began` would be done."""
        if self.gb_per_s is None:
            return
        with self._lock:
            idle = began - self._free_at
            self._free_at = (began if idle > CATCH_UP_SECONDS else self._free_at) + num_bytes / self.gb_per_s / 1e9
            done_at = self._free_at
        time.sleep(max(0.0, done_at - time.perf_counter()))


AS_FAST_AS_IT_IS = Link(None)
"""The machine's own link."""
