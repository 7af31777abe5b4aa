"""The memory plan: the bytes of every weight and cache in each tier, made before any of them is allocated.

Policy only: numbers in, a `MemoryPlan` or a `ConfigError` with need, have and the knob to turn out.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from conf.schema import CacheConfig, ConfigError, FullCacheTier
from tiers.base import CacheShape, padded

TARGET_BLOCK_BYTES = 1 << 20
RESERVE_SHARE = 0.05
"""Of free memory, left for the allocator and the system."""


@dataclass(kw_only=True, frozen=True)
class PlanInput:
    """What is to be held and what there is; sizes in tokens and bytes."""

    target_shape: CacheShape
    target_weight_bytes: int
    max_tokens: int
    """Prompt and generated tokens."""
    slack_tokens: int
    """Tentative tokens on top, of one round."""
    retrieval_slots: int = 0
    """Budget and tail of the retrieval cache, per layer and kv head; 0: no such level."""
    chunk_size: int = 8
    summary_tokens: int = 0
    """Of one group of tokens that are not chosen; 0: they are left out."""
    drafter_shape: CacheShape | None = None
    drafter_weight_bytes: int = 0
    drafter_slots: int = 0
    activation_bytes: int = 0
    device_free_bytes: int
    host_free_bytes: int
    device_is_host: bool
    """No GPU: both tiers share one memory."""


@dataclass(kw_only=True)
class MemoryPlan:
    """Where everything goes."""

    max_tokens: int
    slack_tokens: int
    block_tokens: int
    num_device_layers: int
    stream_buffers: int
    device_bytes: dict[str, int] = field(default_factory=dict)
    host_bytes: dict[str, int] = field(default_factory=dict)
    reason: str = ""

    @property
    def totals(self) -> dict[str, int]:
        """Planned bytes per tier."""
        return {"device": sum(self.device_bytes.values()), "host": sum(self.host_bytes.values())}


def block_tokens_for(shape: CacheShape, cache: CacheConfig) -> int:
    """Tokens of a host block: a power of two, at most 1 MiB, unless configured."""
    if cache.full.block_tokens != "auto":
        return int(cache.full.block_tokens)
    tokens = max(16, TARGET_BLOCK_BYTES // shape.bytes_per_token_and_layer)
    return 1 << (tokens.bit_length() - 1)


def make_plan(inputs: PlanInput, cache: CacheConfig) -> MemoryPlan:
    """Places the layers of the full cache. Raises ConfigError if it cannot be done."""
    shape = inputs.target_shape
    wanted = _wanted_device_layers(inputs, cache)
    plan = _plan_with(inputs, cache, wanted)
    may_move = cache.full.tier == FullCacheTier.auto and cache.full.device_layers == "auto"
    while may_move and plan.num_device_layers and not _fits(plan, inputs):
        plan = _plan_with(inputs, cache, plan.num_device_layers - 1)
    if not _fits(plan, inputs):
        raise ConfigError(_refusal(plan, inputs, cache))
    num_host_layers = shape.num_layers - plan.num_device_layers
    plan.reason = f"full cache: {plan.num_device_layers} of {shape.num_layers} layers on the device"
    if num_host_layers:
        plan.reason += f", {num_host_layers} on the host in blocks of {plan.block_tokens} tokens"
    return plan


def _wanted_device_layers(inputs: PlanInput, cache: CacheConfig) -> int:
    num_layers, configured = inputs.target_shape.num_layers, cache.full.device_layers
    if configured != "auto":
        if int(configured) > num_layers:
            rule = f"at most the target's {num_layers} layers, or auto"
            raise ConfigError(f"cache.full.device_layers is {configured}; it must be {rule}")
        return int(configured)
    if cache.full.tier != FullCacheTier.host:
        return num_layers
    return 0


def _plan_with(inputs: PlanInput, cache: CacheConfig, num_device_layers: int) -> MemoryPlan:
    shape, per_layer = inputs.target_shape, inputs.target_shape.bytes_per_token_and_layer
    num_host_layers = shape.num_layers - num_device_layers
    block_tokens = block_tokens_for(shape, cache)
    plan = MemoryPlan(
        max_tokens=inputs.max_tokens,
        slack_tokens=inputs.slack_tokens,
        block_tokens=block_tokens,
        num_device_layers=num_device_layers,
        stream_buffers=cache.full.stream_buffers,
    )
    capacity = inputs.max_tokens + inputs.slack_tokens
    plan.device_bytes = {
        "target weights": inputs.target_weight_bytes,
        "drafter weights": inputs.drafter_weight_bytes,
        "full cache": num_device_layers * padded(capacity) * per_layer,
        "activations": inputs.activation_bytes,
    }
    if num_host_layers:
        tail = num_host_layers * padded(block_tokens + 2 * inputs.slack_tokens) * per_layer
        plan.device_bytes["full cache tails"] = tail
        plan.device_bytes["stream buffers"] = cache.full.stream_buffers * block_tokens * per_layer
        plan.host_bytes["full cache"] = num_host_layers * (inputs.max_tokens // block_tokens) * block_tokens * per_layer
    if inputs.retrieval_slots:
        slots = padded(inputs.retrieval_slots)
        positions = shape.num_layers * shape.num_kv_heads * slots * 8
        plan.device_bytes["retrieval cache"] = slots * shape.bytes_per_token + positions
        plan.device_bytes["chunk means"] = capacity // inputs.chunk_size * shape.bytes_per_token // 2
        if inputs.summary_tokens:
            heads, groups = shape.num_layers * shape.num_kv_heads, inputs.max_tokens // inputs.summary_tokens
            plan.device_bytes["retrieval cache"] += padded(groups) * (shape.bytes_per_token + heads * 4)
            num_sums = -(-capacity // inputs.summary_tokens) * heads * 2 * shape.head_dim
            plan.device_bytes["sums of groups"] = num_sums * 4
        plan.device_bytes["retrieval update"] = plan.device_bytes["retrieval cache"]  # what a rebuild brings, at most
    if inputs.drafter_shape is not None:
        plan.device_bytes["streaming cache"] = padded(inputs.drafter_slots) * inputs.drafter_shape.bytes_per_token
    return plan


def _available(inputs: PlanInput) -> tuple[int, int]:
    usable = 1 - RESERVE_SHARE
    return int(inputs.device_free_bytes * usable), int(inputs.host_free_bytes * usable)


def _fits(plan: MemoryPlan, inputs: PlanInput) -> bool:
    device, host = _available(inputs)
    need = plan.totals
    both_fit = not inputs.device_is_host or need["device"] + need["host"] <= host
    return need["device"] <= device and need["host"] <= host and both_fit


def _refusal(plan: MemoryPlan, inputs: PlanInput, cache: CacheConfig) -> str:
    device, host = _available(inputs)
    gib = 2**30
    need = plan.totals
    largest = _largest_context(inputs, cache, plan.num_device_layers)
    hint = (
        f"With these settings {largest} tokens of context fit: set prompt.max_tokens and generation.max_new_tokens to "
        f"that in all"
        if largest
        else "Use a smaller model, or set model.dtype=bfloat16"
    )
    move = "" if cache.full.tier == FullCacheTier.auto else ", or cache.full.tier=auto"
    if cache.full.device_layers != "auto":
        move += ", or cache.full.device_layers=auto"
    return (
        f"a context of {inputs.max_tokens} tokens needs {need['device'] / gib:.2f} GiB on the device (there are "
        f"{device / gib:.2f}) and {need['host'] / gib:.2f} GiB on the host (there are {host / gib:.2f}). {hint}{move}"
    )


def _largest_context(inputs: PlanInput, cache: CacheConfig, num_device_layers: int) -> int:
    """By bisection; 0 if not even one token fits."""
    may_move = cache.full.tier == FullCacheTier.auto and cache.full.device_layers == "auto"
    low, high = 0, inputs.max_tokens
    while low < high:
        middle = (low + high + 1) // 2
        smaller = replace(inputs, max_tokens=middle)
        choices = range(inputs.target_shape.num_layers + 1) if may_move else [num_device_layers]
        if any(_fits(_plan_with(smaller, cache, choice), smaller) for choice in choices):
            low = middle
        else:
            high = middle - 1
    return low
