"""Prints what a run takes and how fast it should be, with nothing loaded: python launch/plan.py key=value ...

The keys are those of launch/run.py, and `hardware` (conf/hardware: this, rtx4090, rtx4090x2, a100-80g, l40s, h200).
`expected.retrieval_acceptance` and `expected.draft_acceptance` are what the plan assumes of the drafts. Where times
come from: tiers/planning/cost.py. Exit codes: 0 it fits; 2 it does not, or a bad configuration.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from hydra.core.config_store import ConfigStore
from rich.console import Console
from rich.table import Table

from conf.model_shapes import ModelShape, model_shape
from conf.model_source import model_source
from conf.schema import AUTO, LOOKUP_DRAFTER, ConfigError, RunConfig, require
from launch.assembly.sizing import FreeBytes, ModelSize, budgets, gammas1, gammas2, plan_input
from launch.command_line.outcome import refuse
from launch.command_line.overrides import compose_program
from tiers.base import BlockShape, CacheShape, page_aligned
from tiers.disk_tier import DiskTier
from tiers.planning.cost import (
    ModelCost,
    Round,
    Speeds,
    Streamed,
    dequantise_seconds,
    forward_seconds,
    prefill_seconds,
    triforce_round,
)
from tiers.planning.memory import disk_free_bytes, host_free_bytes
from tiers.planning.plan import MemoryPlan, make_plan
from tiers.quantisation import quantised_bytes

MEASURED_SECONDS = 0.3
COPY_BYTES = 256 << 20
MATRIX_SIZE = 1024


@dataclass(kw_only=True, slots=True)
class HardwareConfig:
    """A machine; GB are 1e9 bytes. null is measured on the machine that the program runs on."""

    name: str = "this machine"
    num_devices: int = 1
    """The model is sharded over them: weights, heads and the stream, each over its own link."""
    device_memory_gib: float | None = None
    device_gb_per_s: float | None = None
    device_tflops: float | None = None
    """bf16, dense."""
    link_gb_per_s: float | None = None
    """Host to device, for each device."""
    host_memory_gib: float | None = None
    disk_gb_per_s: float | None = None
    disk_gib: float | None = None
    layer_overhead_ms: float = 0.28
    """Of each layer in each pass: launches and Python."""

    def __post_init__(self) -> None:
        require(self.num_devices >= 1, "hardware.num_devices", self.num_devices, ">= 1")
        require(self.layer_overhead_ms >= 0, "hardware.layer_overhead_ms", self.layer_overhead_ms, ">= 0")
        for item in fields(self):
            if item.name not in ("name", "num_devices", "layer_overhead_ms"):
                value = getattr(self, item.name)
                require(value is None or value > 0, f"hardware.{item.name}", value, "above 0, or null")


@dataclass(kw_only=True, slots=True)
class ExpectedConfig:
    """What is assumed of the drafts; measure it with launch/measure/acceptance.py."""

    retrieval_acceptance: float = 0.955
    """Of a token of the retrieval draft, by the target; the default is what the paper's figures imply."""
    draft_acceptance: float = 0.35
    """Of a drafted token, by the retrieval draft; the default is Llama-68M's in the paper."""

    def __post_init__(self) -> None:
        for key in ("retrieval_acceptance", "draft_acceptance"):
            require(0 <= getattr(self, key) <= 1, f"expected.{key}", getattr(self, key), "between 0 and 1")


@dataclass(kw_only=True, slots=True)
class PlanConfig(RunConfig):
    """A run and the machine it is planned for."""

    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    expected: ExpectedConfig = field(default_factory=ExpectedConfig)


ConfigStore.instance().store(name="plan_schema", node=PlanConfig)


@dataclass(kw_only=True, frozen=True, slots=True)
class Forecast:
    """A plan for one device, and the seconds that follow from it."""

    plan: MemoryPlan
    prefill_seconds: float
    autoregressive_seconds: float
    """Between tokens, of plain decoding with the layers that fit when nothing else is on the device."""
    round: Round


def read_plan_config(overrides: list[str]) -> PlanConfig:
    """Raises ConfigError."""
    return compose_program("plan", overrides, "conf/schema.py, launch/plan.py")


def measured(hardware: HardwareConfig, folder: Path) -> HardwareConfig:
    """What is null, measured or read from this machine, in about a second."""
    gib, values = 2**30, {}
    if hardware.device_gb_per_s is None or hardware.link_gb_per_s is None:
        values["device_gb_per_s"] = values["link_gb_per_s"] = _copy_gb_per_s()
    values["device_tflops"] = _matmul_tflops() if hardware.device_tflops is None else None
    values["disk_gb_per_s"] = _disk_gb_per_s(folder) if hardware.disk_gb_per_s is None else None
    values["device_memory_gib"] = values["host_memory_gib"] = host_free_bytes() / gib
    values["disk_gib"] = disk_free_bytes(folder) / gib
    return replace(hardware, **{name: value for name, value in values.items() if getattr(hardware, name) is None})


def _repeated(action) -> float:
    """Seconds of one call, the best of those that fit into MEASURED_SECONDS."""
    action()
    best, ends = float("inf"), time.perf_counter() + MEASURED_SECONDS
    while time.perf_counter() < ends:
        began = time.perf_counter()
        action()
        best = min(best, time.perf_counter() - began)
    return best


def _copy_gb_per_s() -> float:
    source, target = page_aligned(COPY_BYTES).zero_(), page_aligned(COPY_BYTES)
    return COPY_BYTES / _repeated(lambda: target.copy_(source)) / 1e9


def _matmul_tflops() -> float:
    bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    left, right = torch.randn(2, MATRIX_SIZE, MATRIX_SIZE, dtype=torch.bfloat16 if bf16 else torch.float32)
    return 2 * MATRIX_SIZE**3 / _repeated(lambda: left @ right) / 1e12


def _disk_gb_per_s(folder: Path) -> float:
    """Blocks of 1 MiB, one read at a time, as the disk tier reads them."""
    block = BlockShape(num_kv_heads=1, num_tokens=4096, head_dim=128, dtype=torch.uint8)
    count = 64
    while not folder.exists():
        folder = folder.parent
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        tier = DiskTier(scratch)
        blocks = tier.blocks(block, count)
        buffer = page_aligned(block.num_bytes).view(block.size)
        for index in range(count):
            blocks.write(index, buffer.fill_(index))
        seconds = _repeated(lambda: [blocks.read_into(index, buffer) for index in range(count)])
        tier.close()
    return count * block.num_bytes / seconds / 1e9


def forecast(config: PlanConfig, hardware: HardwareConfig) -> Forecast:
    """Raises ConfigError where it does not fit."""
    if config.cache.retrieval.budget == AUTO:
        config = _with_budget(config, (0, *budgets(config, config.prompt.max_tokens))[-1])
    target = _shape_of("model.target", config.model.target)
    uses_model_drafter = config.uses_drafter and config.model.drafter != LOOKUP_DRAFTER
    drafter = _shape_of("model.drafter", config.model.drafter) if uses_model_drafter else None
    plan = _plan(config, hardware, target, drafter)
    plain = replace(config, decoding=replace(config.decoding, gamma1=0, gamma2=0))
    speeds = Speeds(
        num_devices=hardware.num_devices,
        device_gb_per_s=hardware.device_gb_per_s,
        device_tflops=hardware.device_tflops,
        link_gb_per_s=hardware.link_gb_per_s,
        disk_gb_per_s=hardware.disk_gb_per_s,
        layer_overhead_ms=hardware.layer_overhead_ms,
    )
    cost, retrieval = _cost(target, config), config.cache.retrieval
    num_keys = config.prompt.max_tokens
    streamed = _streamed(plan, hardware)
    alone = replace(speeds, num_devices=1)  # a drafter is too small to be worth sharding
    window = config.cache.streaming.sinks + config.cache.streaming.window
    draft_step = forward_seconds(alone, _cost(drafter, config), 1, window, Streamed()) if drafter else 0.0
    dequantise = 0.0
    if retrieval.dtype.bits is not None:
        num_bytes = quantised_bytes(
            _size(target, _dtype(config), 1).cache_shape, retrieval.budget, retrieval.dtype.bits
        )
        dequantise = dequantise_seconds(speeds, cost, retrieval.budget, num_bytes)

    def round_of(gamma1: int, gamma2: int) -> Round:
        return triforce_round(
            draft_step=draft_step,
            retrieval_step=forward_seconds(speeds, cost, gamma1 + 1, retrieval.budget, Streamed()) + dequantise,
            verify=forward_seconds(speeds, cost, gamma2 + 1, num_keys, streamed),
            gamma1=gamma1,
            gamma2=gamma2,
            draft_acceptance=config.expected.draft_acceptance,
            retrieval_acceptance=config.expected.retrieval_acceptance,
        )

    # Without a retrieval draft nothing is known of how a draft would fare.
    choices = itertools.product(gammas1(config), gammas2(config) if config.uses_retrieval else (0,))
    return Forecast(
        plan=plan,
        prefill_seconds=prefill_seconds(speeds, cost, num_keys, streamed),
        autoregressive_seconds=forward_seconds(
            speeds, cost, 1, num_keys, _streamed(_plan(plain, hardware, target, None), hardware)
        ),
        round=min((round_of(*gammas) for gammas in choices), key=lambda round_: round_.seconds_per_token),
    )


def _with_budget(config: PlanConfig, budget: int) -> PlanConfig:
    return replace(config, cache=replace(config.cache, retrieval=replace(config.cache.retrieval, budget=budget)))


def _shape_of(key: str, name: str) -> ModelShape:
    return model_shape(key, name, model_source(key, name))


def _dtype(config: RunConfig) -> torch.dtype:
    return torch.bfloat16 if config.model.dtype == "auto" else getattr(torch, config.model.dtype)


def _cost(shape: ModelShape, config: RunConfig) -> ModelCost:
    size = _dtype(config).itemsize
    return ModelCost(
        num_layers=shape.num_layers,
        weight_bytes=shape.num_read_parameters * size,
        num_parameters=shape.num_read_parameters,
        attention_width=shape.num_heads * shape.head_dim,
        kv_bytes_per_token=2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * size,
    )


def _plan(config: PlanConfig, hardware: HardwareConfig, target: ModelShape, drafter: ModelShape | None) -> MemoryPlan:
    """Of one device, which holds its share of the target, and of its share of the host."""
    devices, gib = hardware.num_devices, 2**30
    if target.num_kv_heads % devices:
        rule = f"a divisor of the target's {target.num_kv_heads} kv heads"
        raise ConfigError(f"hardware.num_devices is {devices}; it must be {rule}")
    free = FreeBytes(
        device=int((config.placement.device_memory_gib or hardware.device_memory_gib) * gib),
        host=int((config.placement.host_memory_gib or hardware.host_memory_gib) * gib / devices),
        disk=int((config.placement.disk_gib or hardware.disk_gib) * gib / devices),
        device_is_host=hardware.name == HardwareConfig().name,
    )
    new_tokens = config.generation.max_new_tokens
    inputs = plan_input(
        config,
        _size(target, _dtype(config), devices),
        _size(drafter, _dtype(config), 1) if drafter else None,
        max_tokens=config.prompt.max_tokens + new_tokens,
        max_new_tokens=new_tokens,
        free=free,
    )
    return make_plan(inputs, config.cache)


def _size(shape: ModelShape, dtype: torch.dtype, devices: int) -> ModelSize:
    kv = CacheShape(
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads // devices,
        head_dim=shape.head_dim,
        dtype=dtype,
    )
    return ModelSize(
        cache_shape=kv,
        num_weight_bytes=shape.num_parameters * dtype.itemsize // devices,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size // devices,
    )


def _streamed(plan: MemoryPlan, hardware: HardwareConfig) -> Streamed:
    """Of one pass, over all devices."""
    host, disk = plan.host_bytes.get("full cache", 0), plan.disk_bytes.get("full cache", 0)
    return Streamed(host_bytes=host * hardware.num_devices, disk_bytes=disk * hardware.num_devices)


def show(console: Console, config: PlanConfig, hardware: HardwareConfig, made: Forecast) -> None:
    """Bytes of each tier, then times."""
    plan, gib = made.plan, 2**30
    each = " on each of them" if hardware.num_devices > 1 else ""
    console.print(f"{config.model.target} on {hardware.name}, {config.prompt.max_tokens:,} tokens{each}")
    console.print(plan.reason, highlight=False)
    table = Table("tier", "what", "GiB", box=None, pad_edge=False)
    for tier, parts in (("device", plan.device_bytes), ("host", plan.host_bytes), ("disk", plan.disk_bytes)):
        for what, num_bytes in parts.items():
            if num_bytes:
                table.add_row(tier, what, f"{num_bytes / gib:.2f}")
        table.add_row(tier, "in all", f"{sum(parts.values()) / gib:.2f}", style="bold")
    console.print(table)
    round_ = made.round
    phases = f"draft {round_.draft_seconds:.3f}, retrieval {round_.retrieval_seconds:.3f}, verify"
    phases += f" {round_.verify_seconds:.3f} s for {round_.num_tokens:.1f} tokens"
    if AUTO in (config.decoding.gamma1, config.decoding.gamma2):
        phases = f"gamma1 {round_.gamma1}, gamma2 {round_.gamma2}: {phases}"
    times = Table("predicted", "", box=None, pad_edge=False)
    times.add_row("TTFT", f"{made.prefill_seconds:.1f} s")
    times.add_row(f"TBT, {config.decoding.mode}", f"{1000 * round_.seconds_per_token:.0f} ms ({phases})")
    times.add_row("TBT, autoregressive", f"{1000 * made.autoregressive_seconds:.0f} ms")
    console.print(times)


def main(argv: list[str] | None = None) -> int:
    """The program; `argv` without its name."""
    console = Console()
    try:
        config = read_plan_config(sys.argv[1:] if argv is None else argv)
        require(config.prompt.max_tokens is not None, "prompt.max_tokens", None, "a number of tokens, to plan for")
        hardware = measured(config.hardware, Path(config.tiers.disk.folder or "."))
        made = forecast(config, hardware)
    except ConfigError as error:
        return refuse(error)
    show(console, config, hardware, made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
