"""A forecast of a run: its memory plan, and the seconds of each kind of pass that follow from it.

Where times come from: tiers/planning/cost.py.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch

from conf.model_shapes import ModelShape, model_shape
from conf.model_source import model_source
from conf.positions import check_stretch
from conf.schema import LOOKUP_DRAFTER, ConfigError, Dtype, RunConfig
from launch.assembly.session_run import fit_to_model
from launch.assembly.sizing import (
    ModelSize,
    available_bytes,
    check_drafter_window,
    gammas1,
    gammas2,
    plan_input,
    with_known_budget,
)
from launch.forecast.config import PlanConfig
from launch.forecast.machine import Machine
from tiers.base import CacheShape
from tiers.planning.cost import (
    ModelCost,
    RoundCost,
    Speeds,
    Streamed,
    dequantise_seconds,
    forward_seconds,
    prefill_seconds,
    triforce_round,
)
from tiers.planning.parts import Part
from tiers.planning.plan import MemoryPlan, make_plan
from tiers.quantisation import quantised_bytes


@dataclass(kw_only=True, frozen=True, slots=True)
class Forecast:
    """A plan for one device, and the seconds that follow from it."""

    plan: MemoryPlan
    prefill_seconds: float
    autoregressive_seconds: float
    """Seconds between tokens of plain decoding, with the layers that fit when nothing else is on the device."""
    round: RoundCost
    notes: list[str]
    """Lines for the user about what was chosen."""


def forecast(config: PlanConfig, machine: Machine) -> Forecast:
    """Plan and times of `config` on `machine`. Raises ConfigError where it does not fit."""
    num_keys, dtype, speeds = config.num_prompt_tokens, _dtype(config), machine.speeds
    config = with_known_budget(config, num_keys, [])
    target, drafter = _target(config), _drafter(config)
    notes: list[str] = []
    config = _fitted(config, target, drafter, notes)
    # 1. Memory: plain decoding has the device to itself.
    plan = _plan(config, machine, target, drafter)
    plain = replace(config, decoding=replace(config.decoding, gamma1=0, gamma2=0))
    plain_plan = _plan(plain, machine, target, None)
    # 2. Seconds of a step of each level.
    cost, streamed = _cost(target, dtype), _streamed(plan, speeds)
    draft_step = 0.0 if drafter is None else _draft_step(config, speeds, _cost(drafter, dtype))

    def round_of(gamma1: int, gamma2: int) -> RoundCost:
        return triforce_round(
            draft_step=draft_step,
            retrieval_step=_retrieval_step(plan, speeds, target, dtype, num_rows=gamma1 + 1),
            verify=forward_seconds(speeds, cost, gamma2 + 1, num_keys, streamed),
            gamma1=gamma1,
            gamma2=gamma2,
            draft_acceptance=config.expected.draft_acceptance,
            retrieval_acceptance=config.expected.retrieval_acceptance,
        )

    # 3. The best of the rounds that there may be; without a retrieval draft nothing is known of how a draft would fare.
    choices = itertools.product(gammas1(config), gammas2(config) if config.uses_retrieval else (0,))
    return Forecast(
        plan=plan,
        prefill_seconds=prefill_seconds(speeds, cost, num_keys, streamed),
        autoregressive_seconds=forward_seconds(speeds, cost, 1, num_keys, _streamed(plain_plan, speeds)),
        notes=notes,
        round=min((round_of(*gammas) for gammas in choices), key=lambda round_: round_.seconds_per_token),
    )


def _fitted(config: PlanConfig, target: ModelShape, drafter: ModelShape | None, notes: list[str]) -> PlanConfig:
    """The configuration with as many new tokens as the target has positions for.

    Raises ConfigError where the prompt or the drafter's window does not fit.
    """
    positions = config.model.max_positions
    if positions is None:
        positions = target.max_positions
    else:
        check_stretch(positions, target.max_positions)
    if drafter is not None:
        check_drafter_window(config, config.model.drafter, drafter.max_positions)
    new_tokens = fit_to_model(config, config.num_prompt_tokens, positions, notes.append)
    return replace(config, generation=replace(config.generation, max_new_tokens=new_tokens))


def _target(config: RunConfig) -> ModelShape:
    return _shape_of("model.target", config.model.target)


def _drafter(config: RunConfig) -> ModelShape | None:
    """Shape of the model that drafts; None where none does."""
    if not config.uses_drafter or config.model.drafter == LOOKUP_DRAFTER:
        return None
    return _shape_of("model.drafter", config.model.drafter)


def _shape_of(key: str, name: str) -> ModelShape:
    return model_shape(key, name, model_source(key, name))


def _dtype(config: RunConfig) -> torch.dtype:
    if config.model.dtype is Dtype.auto:
        return torch.bfloat16
    dtype: torch.dtype = getattr(torch, config.model.dtype)
    return dtype


# ---- Memory. ----


def _plan(config: PlanConfig, machine: Machine, target: ModelShape, drafter: ModelShape | None) -> MemoryPlan:
    """The plan of one device, which holds its share of the target, and has its share of the host."""
    devices, dtype, new_tokens = machine.speeds.num_devices, _dtype(config), config.generation.max_new_tokens
    if target.num_kv_heads % devices:
        rule = f"a divisor of the target's {target.num_kv_heads} kv heads"
        raise ConfigError(f"hardware.num_devices is {devices}; it must be {rule}")
    free = available_bytes(config.placement, machine.free)
    inputs = plan_input(
        config,
        _size(target, dtype, devices),
        _size(drafter, dtype, 1) if drafter else None,
        max_tokens=config.num_prompt_tokens + new_tokens,
        max_new_tokens=new_tokens,
        free=replace(free, host=free.host // devices, disk=free.disk // devices),
    )
    return make_plan(inputs, config.cache)


def _size(shape: ModelShape, dtype: torch.dtype, devices: int) -> ModelSize:
    """Size of the part of a model that each of so many devices holds."""
    return ModelSize(
        cache_shape=CacheShape(
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads // devices,
            head_dim=shape.head_dim,
            dtype=dtype,
        ),
        num_weight_bytes=shape.num_parameters * dtype.itemsize // devices,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size // devices,
    )


# ---- Times, over all devices. ----


def _cost(shape: ModelShape, dtype: torch.dtype) -> ModelCost:
    return ModelCost(
        num_layers=shape.num_layers,
        weight_bytes=shape.num_read_parameters * dtype.itemsize,
        num_parameters=shape.num_read_parameters,
        attention_width=shape.num_heads * shape.head_dim,
        kv_bytes_per_token=_size(shape, dtype, 1).cache_shape.bytes_per_token,
    )


def _streamed(plan: MemoryPlan, speeds: Speeds) -> Streamed:
    """Bytes of the full cache that one pass streams."""
    host, disk = plan.host_bytes.get(Part.full_cache, 0), plan.disk_bytes.get(Part.full_cache, 0)
    return Streamed(host_bytes=host * speeds.num_devices, disk_bytes=disk * speeds.num_devices)


def _draft_step(config: RunConfig, speeds: Speeds, cost: ModelCost) -> float:
    """Seconds in which the drafter drafts a token; it is too small to be worth sharding."""
    window = config.cache.streaming.sinks + config.cache.streaming.window
    return forward_seconds(replace(speeds, num_devices=1), cost, 1, window, Streamed())


def _retrieval_step(plan: MemoryPlan, speeds: Speeds, target: ModelShape, dtype: torch.dtype, num_rows: int) -> float:
    """Seconds of a pass of `num_rows` tokens over the retrieval cache; 0 where there is none."""
    retrieval, cost = plan.sizes.retrieval, _cost(target, dtype)
    if retrieval is None:
        return 0.0
    seconds = forward_seconds(speeds, cost, num_rows, retrieval.budget, Streamed())
    if retrieval.bits is not None:
        num_bytes = quantised_bytes(_size(target, dtype, 1).cache_shape, retrieval.budget, retrieval.bits)
        seconds += dequantise_seconds(speeds, cost, retrieval.budget, num_bytes)
    return seconds
