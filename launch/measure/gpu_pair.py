"""The models of launch/measure/gpu.py: the demo pair, widened to published shapes once for all parts."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from conf.schema import (
    CacheConfig,
    DecodingConfig,
    Dtype,
    FullCacheConfig,
    GenerationConfig,
    ModelConfig,
    PromptConfig,
    RetrievalCacheConfig,
    RunConfig,
    SamplingConfig,
)
from launch.demo_pair.checkpoint import Fill, WidenConfig, Widened, widen
from launch.measure.gpu_config import MeasureGpuConfig
from workers.models.causal_model import CausalModel

MAX_POSITIONS = 131_072
"""Positions of the target in all parts, whatever their context: so it is loaded once."""


class WidenedPair:
    """Target and drafter, written when they are first asked for, and the target's weights, once they are loaded.

    `note` is told how long it took.
    """

    def __init__(self, config: MeasureGpuConfig, device: torch.device, note: Callable[[str], None]):
        self._config, self._note = config, note
        self._dtype = Dtype.bfloat16 if device.type == "cuda" else Dtype.float32
        self._written: list[Widened] = []
        self.target: CausalModel | None = None

    def keep(self, target: CausalModel) -> None:
        """Keeps the target's weights for the next part; the first time they get their noise."""
        if self.target is None:
            self.target = target
            self._written[0].widening.fill_with_noise(target.hf_model)

    def run_config(self, full: FullCacheConfig, num_tokens: int, budget: int, gamma2: int) -> RunConfig:
        """A run of the pair after `num_tokens` of prompt. Raises ConfigError."""
        target, drafter = self._folders()
        return RunConfig(
            model=ModelConfig(
                target=str(target),
                drafter=str(drafter),
                dtype=self._dtype,
                max_positions=MAX_POSITIONS,
                self_check=False,  # padded tokens' logits are too far off for its tolerance; tests compare instead
            ),
            decoding=DecodingConfig(gamma1=self._config.gamma1, gamma2=gamma2),
            cache=CacheConfig(full=full, retrieval=RetrievalCacheConfig(budget=budget)),
            generation=GenerationConfig(ignore_eos=True, use_model_rules=False),
            prompt=PromptConfig(max_tokens=num_tokens),
            sampling=SamplingConfig(temperature=self._config.temperature),
            output=self._config.output,
        )

    def _folders(self) -> list[Path]:
        """Folders of target and drafter.

        The target's zeros take next to no place on disk, and are filled with noise when they are on the device.
        """
        if not self._written:
            began = time.monotonic()
            self._written = [widen(wanted) for wanted in self._widen_configs()]
            gib = " and ".join(f"{one.num_bytes / 2**30:.2f}" for one in self._written)
            self._note(f"pair widened in {time.monotonic() - began:.0f} s: {gib} GiB of weights")
        return [one.folder for one in self._written]

    def _widen_configs(self) -> list[WidenConfig]:
        config, folder, dtype = self._config, Path(self._config.models), self._dtype
        target = WidenConfig(source="assets/demo/target", output=str(folder / "target"), dtype=dtype)
        drafter = WidenConfig(
            source="assets/demo/drafter", output=str(folder / "drafter"), dtype=dtype, fill=Fill.noise
        )
        target.shape, drafter.shape = config.target_shape, config.drafter_shape
        if config.smoke:
            target.shape = drafter.shape = None
            target.num_layers, target.hidden_size, target.intermediate_size = 7, 512, 800
            target.num_heads = target.num_kv_heads = 4
            drafter.hidden_size = 256
            drafter.num_heads = drafter.num_kv_heads = 2
        return [target, drafter]
