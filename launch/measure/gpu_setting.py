"""The setting that all parts of launch/measure/gpu.py share, and the time that is left to them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from launch.measure.gpu_config import MeasureGpuConfig
from launch.measure.gpu_pair import WidenedPair
from launch.measure.gpu_results import GpuResults

SAMPLE_SECONDS = 15.0
"""With less time left no further sample is begun."""


class Deadline:
    """A point in time, so many seconds from now."""

    def __init__(self, seconds: float):
        self._ends = time.monotonic() + seconds

    def leaves(self, seconds: float) -> bool:
        """Whether more than so much time is left."""
        return self._ends - time.monotonic() > seconds


@dataclass(kw_only=True)
class Setting:
    """One measurement, from its configuration to its results."""

    config: MeasureGpuConfig
    device: torch.device
    deadline: Deadline
    results: GpuResults
    pair: WidenedPair

    @property
    def folder(self) -> Path:
        return Path(self.config.output)
