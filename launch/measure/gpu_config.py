"""The typed configuration of launch/measure/gpu.py."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum

from hydra.core.config_store import ConfigStore

from conf.schema import expand_home, require


class GpuPart(StrEnum):
    """A part of the measurement, in the order in which they are measured."""

    copies = "copies"
    offloaded = "offloaded"
    on_chip = "on_chip"
    attention = "attention"
    transformers = "transformers"


@dataclass(kw_only=True, slots=True)
class MeasureGpuConfig:
    """One measurement; the defaults are for 80 GB on the device and 128 GB on the host."""

    cells: list[str] = field(default_factory=lambda: list(GpuPart))
    """Parts to measure."""
    deadline_s: float = 500.0
    """Seconds from the start; nothing is begun that would end later."""
    target_shape: str = "NousResearch/Yarn-Llama-2-7b-128k"
    drafter_shape: str = "JackFram/llama-68m"
    offloaded_tokens: int = 120_000
    """Prompt tokens with the full cache on the host."""
    on_chip_tokens: int = 32_000
    """Prompt tokens with the full cache on the device."""
    transformers_tokens: int = 32_000
    """Prompt tokens of transformers' own generate."""
    block_tokens: int = 2048
    """Tokens of a block of the offloaded cache; 2048 are 32 MiB of a layer of Llama-2-7B."""
    block_mib: list[float] = field(default_factory=lambda: [0.25, 1, 4, 8, 16, 32, 64])
    """Sizes of the blocks that are copied."""
    piece_kib: list[int] = field(default_factory=lambda: [2, 8, 32, 128, 512])
    """Sizes of the scattered pieces that are copied."""
    copied_mib: int = 2048
    """Host memory that blocks and pieces are copied from."""
    gamma1: int = 2
    offloaded_gamma2: list[int] = field(default_factory=lambda: [8, 16, 32])
    """Ways to decode with the cache on the host, each with and without CUDA graphs."""
    on_chip_gamma2: list[int] = field(default_factory=lambda: [4, 8, 16])
    """Ways to decode with the cache on the device, each with and without CUDA graphs."""
    offloaded_budget: int = 8192
    """Tokens of the retrieval cache, per layer and kv head, beside a cache on the host."""
    on_chip_budget: int = 4096
    """Tokens of the retrieval cache, per layer and kv head, beside a cache on the device."""
    repetitions: int = 3
    sample_tokens: int = 16
    """Tokens of a speculating sample, at least; one of autoregressive decoding has a quarter as many."""
    temperature: float = 0.6
    smoke: bool = False
    """Tiny shapes, on any machine: whether the program runs, not how fast anything is."""
    models: str = "outputs/widened"
    """Folder for the widened pair."""
    output: str = "outputs/gpu"

    def __post_init__(self) -> None:
        expand_home(self, "", "models", "output")
        for cell in self.cells:
            require(cell in list(GpuPart), "cells", cell, f"of {', '.join(GpuPart)}")
        require(self.repetitions >= 1, "repetitions", self.repetitions, ">= 1")
        require(self.sample_tokens >= 4, "sample_tokens", self.sample_tokens, ">= 4")
        require(self.deadline_s > 0, "deadline_s", self.deadline_s, "above 0")

    def for_smoke(self) -> MeasureGpuConfig:
        """The same parts with sizes that any machine has time for."""
        return replace(
            self,
            offloaded_tokens=700,
            on_chip_tokens=400,
            transformers_tokens=200,
            block_tokens=64,
            block_mib=[0.0625, 0.125],
            piece_kib=[2],
            copied_mib=1,
            offloaded_gamma2=[4],
            on_chip_gamma2=[4],
            offloaded_budget=128,
            on_chip_budget=128,
            repetitions=1,
            sample_tokens=6,
        )


ConfigStore.instance().store(name="measure_gpu_schema", node=MeasureGpuConfig)
