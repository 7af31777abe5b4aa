"""The memory plan: the bytes of every weight and cache in each tier, made before any of them is allocated.

Policy only: numbers in, a `MemoryPlan` or a `ConfigError` with need, have and the knob to turn out. What takes how much
is in tiers.planning.parts; here is who gets which tier.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

from conf.schema import CacheConfig, ConfigError, FullCacheTier
from tiers.base import CacheShape
from tiers.planning.parts import RETRIEVAL_PARTS, Part, device_parts, disk_parts, host_parts
from tiers.planning.sizes import PlanInput, Sizes, TierName

MAX_BLOCK_BYTES = 8 << 20
"""Attention over a block costs a few dozen small operations on top, as long as the copy of some MiB."""
MIN_BLOCKS = 8
"""Number of blocks of a context: so many overlap copies and computation well, and the tail stays small beside them."""
RESERVE_SHARE = 0.05
"""Share of free memory that is left for the allocator and the system."""


@dataclass(kw_only=True, frozen=True)
class MemoryPlan:
    """Where everything goes: the sizes to build by, and the bytes that each part of them takes in each tier."""

    sizes: Sizes
    device_bytes: dict[Part, int] = field(default_factory=dict)
    host_bytes: dict[Part, int] = field(default_factory=dict)
    disk_bytes: dict[Part, int] = field(default_factory=dict)

    @property
    def totals(self) -> dict[str, int]:
        """Planned bytes per tier."""
        tiers = {TierName.device: self.device_bytes, TierName.host: self.host_bytes, TierName.disk: self.disk_bytes}
        return {str(name): sum(parts.values()) for name, parts in tiers.items()}

    @property
    def reason(self) -> str:
        """One line that says where the layers of the full cache are."""
        sizes = self.sizes
        text = f"full cache: {sizes.num_device_layers} of {sizes.num_layers} layers on the device"
        if sizes.num_host_layers:
            text += f", {sizes.num_host_layers} on the host"
        if sizes.num_disk_layers:
            text += f", {sizes.num_disk_layers} on disk"
        if sizes.num_layers_in_blocks:
            text += f", in blocks of {sizes.block_tokens} tokens"
        return text


def block_tokens_for(shape: CacheShape, cache: CacheConfig, max_tokens: int) -> int:
    """Tokens of a block: as configured, else a power of two, of at most 8 MiB and an eighth of the context."""
    if cache.full.block_tokens != "auto":
        return int(cache.full.block_tokens)
    tokens = max(16, min(MAX_BLOCK_BYTES // shape.bytes_per_token_and_layer, max_tokens // MIN_BLOCKS))
    return 1 << (tokens.bit_length() - 1)


def make_plan(inputs: PlanInput, cache: CacheConfig) -> MemoryPlan:
    """Places the layers of the full cache: as many as fit on the device, then on the host. Raises ConfigError."""
    plans = _plans(inputs, cache)
    plan = next((plan for plan in plans if _fits(plan, inputs)), None)
    if plan is None:
        raise ConfigError(_refusal(plans, inputs, cache))
    return plan


def _plans(inputs: PlanInput, cache: CacheConfig) -> list[MemoryPlan]:
    """All plans that the configuration allows, the best first, whether they fit or not.

    Those that fetch chunks for every rebuild come after all that have room to collect them.
    """
    choices = _choices(inputs, cache)
    is_rebuilt = inputs.retrieval is not None and inputs.retrieval.is_rebuilt
    ways = (True, False) if is_rebuilt else (False,)
    return [_plan_with(inputs, cache, *layers, chooses_ahead=ahead) for ahead in ways for layers in choices]


def _choices(inputs: PlanInput, cache: CacheConfig) -> list[tuple[int, int]]:
    """(layers on the device, layers on the host) that the configuration allows, the fastest first."""
    tier, num_layers = cache.full.tier, inputs.target_shape.num_layers
    on_device = _configured("device_layers", cache.full.device_layers, num_layers)
    on_host = _configured("host_layers", cache.full.host_layers, num_layers)
    if on_device is None:
        on_device = {FullCacheTier.device: num_layers, FullCacheTier.auto: None}.get(tier, 0)
    one_memory = inputs.device_is_host and inputs.device_free_bytes >= inputs.host_free_bytes and on_device is None
    choices = []
    for num_device in range(num_layers, -1, -1) if on_device is None else [on_device]:
        rest = num_layers - num_device
        if tier == FullCacheTier.host:
            choices.append((num_device, rest))
        elif on_host is not None:
            choices += [(num_device, on_host)] if on_host <= rest else []
        elif tier == FullCacheTier.disk:
            choices.append((num_device, 0))
        elif one_memory:
            # A layer that does not fit on the device does not fit on the host either.
            choices.append((num_device, 0))
        else:
            choices += [(num_device, num_host) for num_host in range(rest, -1, -1)]
    if not choices:
        both = f"cache.full.device_layers is {on_device} and cache.full.host_layers is {on_host}"
        raise ConfigError(f"{both}; together they must be at most the target's {num_layers} layers")
    return choices


def _configured(key: str, value: str, num_layers: int) -> int | None:
    """A number of layers, or None for auto. Raises ConfigError."""
    if value == "auto":
        return None
    if int(value) > num_layers:
        raise ConfigError(f"cache.full.{key} is {value}; it must be at most the target's {num_layers} layers, or auto")
    return int(value)


def _plan_with(
    inputs: PlanInput, cache: CacheConfig, num_device_layers: int, num_host_layers: int, *, chooses_ahead: bool
) -> MemoryPlan:
    """The plan with so many layers on the device and on the host, whether it fits or not."""
    num_layers_in_blocks = inputs.target_shape.num_layers - num_device_layers
    sizes = Sizes(
        max_tokens=inputs.max_tokens,
        slack_tokens=inputs.slack_tokens,
        piece_tokens=inputs.piece_tokens,
        num_device_layers=num_device_layers,
        num_host_layers=num_host_layers,
        num_disk_layers=num_layers_in_blocks - num_host_layers,
        block_tokens=block_tokens_for(inputs.target_shape, cache, inputs.max_tokens),
        stream_buffers=cache.full.stream_buffers,
        stages_blocks=not inputs.device_is_host and (num_layers_in_blocks > num_host_layers or inputs.checks_host),
        # Where memory of the device is short, so that layers leave it, hidden states do not take any either.
        hidden_tier=TierName.host if num_layers_in_blocks and not inputs.device_is_host else TierName.device,
        retrieval=inputs.retrieval,
        chooses_ahead=chooses_ahead and num_layers_in_blocks > 0,
        streaming=inputs.streaming,
    )
    return MemoryPlan(
        sizes=sizes,
        device_bytes=device_parts(inputs, sizes),
        host_bytes=host_parts(inputs, sizes),
        disk_bytes=disk_parts(inputs, sizes),
    )


def _available(inputs: PlanInput) -> dict[str, int]:
    """Usable bytes per tier."""
    free = {"device": inputs.device_free_bytes, "host": inputs.host_free_bytes, "disk": inputs.disk_free_bytes}
    return {name: int(num_bytes * (1 - RESERVE_SHARE)) for name, num_bytes in free.items()}


def _fits(plan: MemoryPlan, inputs: PlanInput) -> bool:
    have, need = _available(inputs), plan.totals
    both_fit = not inputs.device_is_host or need["device"] + need["host"] <= have["host"]
    return both_fit and all(need[name] <= have[name] for name in need)


def _refusal(plans: list[MemoryPlan], inputs: PlanInput, cache: CacheConfig) -> str:
    """Message on the plan that takes least of the device: need, have, the largest context that fits, and the knobs."""
    plan, have = min(plans, key=lambda plan: plan.totals["device"]), _available(inputs)
    places = {"device": "on the device", "host": "on the host", "disk": "on disk"}
    needs = ", ".join(
        f"{need / 2**30:.2f} GiB {places[name]} (there are {have[name] / 2**30:.2f})"
        for name, need in plan.totals.items()
        if need or name != "disk"
    )
    largest = _largest_context(inputs, cache)
    hint = (
        f"With these settings {largest} tokens of context fit: set prompt.max_tokens and generation.max_new_tokens to "
        f"that in all"
        if largest
        else "Use a smaller model, or set model.dtype=bfloat16"
    )
    move = "" if cache.full.tier == FullCacheTier.auto else ", or cache.full.tier=auto"
    move += ", or a smaller cache.retrieval.budget" if inputs.retrieval is not None else ""
    move += "".join(
        f", or cache.full.{key}=auto"
        for key in ("device_layers", "host_layers", "block_tokens")
        if getattr(cache.full, key) != "auto"
    )
    return f"a context of {inputs.max_tokens} tokens needs {needs}. {hint}{move}"


def _largest_context(inputs: PlanInput, cache: CacheConfig) -> int:
    """Number of tokens, found by bisection; 0 if not even one fits."""
    low, high = 0, inputs.max_tokens
    while low < high:
        middle = (low + high + 1) // 2
        smaller = replace(inputs, max_tokens=middle)
        if any(_fits(plan, smaller) for plan in _plans(smaller, cache)):
            low = middle
        else:
            high = middle - 1
    return low


# ---- Plans of processes that hold a part of all this. ----


def retriever_plan(inputs: PlanInput, cache: CacheConfig, *, has_weights: bool) -> MemoryPlan:
    """Plan of a process that holds the target on a retrieval cache; its weights may be another's."""
    weights = [Part.target_weights] if has_weights else []
    return _with_parts(_all_on_device(inputs, cache), [*weights, Part.activations, *RETRIEVAL_PARTS])


def drafter_plan(inputs: PlanInput, cache: CacheConfig) -> MemoryPlan:
    """Plan of a process that holds the drafter alone."""
    return _with_parts(_all_on_device(inputs, cache), [Part.drafter_weights, Part.streaming_cache])


def without_retrieval_cache(plan: MemoryPlan) -> MemoryPlan:
    """Plan of a verifier whose retriever is another process."""
    return _with_parts(plan, [part for part in plan.device_bytes if part not in RETRIEVAL_PARTS])


def _all_on_device(inputs: PlanInput, cache: CacheConfig) -> MemoryPlan:
    """The plan of what does not stream: nothing of it is off the device."""
    return _plan_with(inputs, cache, inputs.target_shape.num_layers, 0, chooses_ahead=False)


def _with_parts(plan: MemoryPlan, parts: Collection[Part]) -> MemoryPlan:
    """The plan with these of its parts on the device alone; what is off the device stays."""
    return replace(plan, device_bytes={part: plan.device_bytes[part] for part in parts if part in plan.device_bytes})
