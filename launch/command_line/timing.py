"""Clocks of measurements. Seconds are those of one clock for intervals; loading this module does not load torch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def utc_now() -> str:
    """The time of day as ISO 8601, in whole seconds: when a measurement was made."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def now(device: torch.device | None = None) -> float:
    """Seconds of the clock, read when all is done that was queued on `device`; only CUDA devices have a queue."""
    if device is not None and device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
    return time.perf_counter()


class Stopwatch:
    """Seconds within its `with` blocks, added up: `with watch: ...`, then `watch.seconds`.

    Work queued on `device` before a block is not counted; what the block queues there is.
    """

    def __init__(self, device: torch.device | None = None):
        self._device, self._began = device, 0.0
        self.seconds = 0.0

    def __enter__(self) -> Stopwatch:
        self._began = now(self._device)
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds += now(self._device) - self._began

    def reset(self) -> None:
        """Starts again from 0."""
        self.seconds = 0.0


def seconds_of(action: Callable[[], object], device: torch.device | None = None) -> float:
    """Seconds of one call, with all that it queues on `device`."""
    with Stopwatch(device) as watch:
        action()
    return watch.seconds


def repeated_seconds(
    action: Callable[[], object], repetitions: int, *, warm_up: int = 0, device: torch.device | None = None
) -> list[float]:
    """Seconds of each of `repetitions` calls, after `warm_up` calls that are not counted."""
    return [seconds_of(action, device) for _ in range(warm_up + repetitions)][warm_up:]


def median_or_none(values: Iterable[float | None]) -> float | None:
    """The median of the values that are not None; None where there are none."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
