"""The memory plan: the bytes of every weight and cache in each tier, made before any of them is allocated.

Policy only: numbers in, a `MemoryPlan` or a `ConfigError` with need, have and the knob to turn out.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from conf.schema import CacheConfig, ConfigError, FullCacheTier
from tiers.base import CacheShape, padded, padded_to_pages
from tiers.quantisation import quantised_bytes

MAX_BLOCK_BYTES = 8 << 20
"""Attention over a block costs a few dozen small operations on top, as long as the copy of some MiB."""
MIN_BLOCKS = 8
"""Of a context: so many blocks overlap copies and computation well, and the tail stays small beside them."""
RETRIEVAL_PARTS = ("retrieval cache", "dequantised chunks")
"""Of a plan's bytes on the device: those that are the retrieval cache's own."""
RESERVE_SHARE = 0.05
"""Of free memory, left for the allocator and the system."""


@dataclass(kw_only=True, frozen=True)
class PlanInput:
    """What is to be held and what there is; sizes in tokens and bytes."""

    target_shape: CacheShape
    target_weight_bytes: int
    hidden_bytes_per_token: int = 0
    max_tokens: int
    """Prompt and generated tokens."""
    slack_tokens: int
    """Tentative tokens on top, of one round."""
    retrieval_budget: int = 0
    """Of the retrieval cache, per layer and kv head; 0: no such level."""
    retrieval_tail: int = 0
    """Room for newer tokens in it."""
    retrieval_bits: int | None = None
    """Of a value of its chosen chunks; None: as the model has them."""
    chunk_size: int = 8
    keeps_mean_keys: bool = False
    """Of each chunk; else one number."""
    ahead_tokens: int = 0
    """Budget of the retrieval cache where its chunks may be chosen ahead and copied as blocks pass; 0: they may not."""
    summary_tokens: int = 0
    """Of one group of tokens that are not chosen; 0: they are left out."""
    drafter_shape: CacheShape | None = None
    drafter_weight_bytes: int = 0
    drafter_slots: int = 0
    activation_bytes: int = 0
    device_free_bytes: int
    host_free_bytes: int
    disk_free_bytes: int = 0
    checks_host: bool = False
    """Blocks on the host have checksums, and reach a device through buffers, as those on disk do."""
    device_is_host: bool
    """No GPU: both tiers share one memory."""


@dataclass(kw_only=True)
class MemoryPlan:
    """Where everything goes. The first layers of the full cache are on disk, then come those on the host."""

    max_tokens: int
    slack_tokens: int
    block_tokens: int
    num_device_layers: int
    num_host_layers: int
    num_disk_layers: int
    stream_buffers: int
    device_bytes: dict[str, int] = field(default_factory=dict)
    host_bytes: dict[str, int] = field(default_factory=dict)
    disk_bytes: dict[str, int] = field(default_factory=dict)
    chooses_ahead: bool = False
    """Chunks of layers in blocks are chosen an update ahead and copied as the blocks pass."""
    hidden_tier: str = "device"
    """Where a prompt's hidden states wait between layers: device or host."""
    reason: str = ""

    @property
    def totals(self) -> dict[str, int]:
        """Planned bytes per tier."""
        tiers = {"device": self.device_bytes, "host": self.host_bytes, "disk": self.disk_bytes}
        return {name: sum(parts.values()) for name, parts in tiers.items()}


def block_tokens_for(shape: CacheShape, cache: CacheConfig, max_tokens: int) -> int:
    """Tokens of a block, unless configured: a power of two, at most 8 MiB and an eighth of the context."""
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
    num_layers = inputs.target_shape.num_layers
    plan.reason = f"full cache: {plan.num_device_layers} of {num_layers} layers on the device"
    if plan.num_host_layers:
        plan.reason += f", {plan.num_host_layers} on the host"
    if plan.num_disk_layers:
        plan.reason += f", {plan.num_disk_layers} on disk"
    if plan.num_device_layers < num_layers:
        plan.reason += f", in blocks of {plan.block_tokens} tokens"
    return plan


def _plans(inputs: PlanInput, cache: CacheConfig) -> list[MemoryPlan]:
    """The best first: those that fetch chunks for every rebuild come after all that have room to collect them."""
    choices = _choices(inputs, cache)
    rooms = [inputs, replace(inputs, ahead_tokens=0)] if inputs.ahead_tokens else [inputs]
    return [_plan_with(room, cache, *layers) for room in rooms for layers in choices]


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


def _plan_with(inputs: PlanInput, cache: CacheConfig, num_device_layers: int, num_host_layers: int) -> MemoryPlan:
    shape, per_layer = inputs.target_shape, inputs.target_shape.bytes_per_token_and_layer
    num_disk_layers = shape.num_layers - num_device_layers - num_host_layers
    num_block_layers = num_host_layers + num_disk_layers
    block_tokens = block_tokens_for(shape, cache, inputs.max_tokens)
    plan = MemoryPlan(
        max_tokens=inputs.max_tokens,
        slack_tokens=inputs.slack_tokens,
        block_tokens=block_tokens,
        num_device_layers=num_device_layers,
        num_host_layers=num_host_layers,
        num_disk_layers=num_disk_layers,
        stream_buffers=cache.full.stream_buffers,
        chooses_ahead=num_block_layers > 0 and inputs.ahead_tokens > 0,
    )
    capacity = inputs.max_tokens + inputs.slack_tokens
    plan.device_bytes = {
        "target weights": inputs.target_weight_bytes,
        "drafter weights": inputs.drafter_weight_bytes,
        "full cache": num_device_layers * padded(capacity) * per_layer,
        "activations": inputs.activation_bytes,
    }
    prefill_bytes, update_bytes = 0, 0
    hidden_bytes = inputs.max_tokens * inputs.hidden_bytes_per_token
    if num_block_layers:
        tail = num_block_layers * padded(block_tokens + 2 * inputs.slack_tokens) * per_layer
        block_bytes, num_blocks = block_tokens * per_layer, inputs.max_tokens // block_tokens
        buffer_bytes = cache.full.stream_buffers * block_bytes
        plan.device_bytes["full cache tails"] = tail
        plan.device_bytes["stream buffers"] = buffer_bytes
        plan.host_bytes["full cache"] = num_host_layers * num_blocks * block_bytes
        plan.disk_bytes["full cache"] = num_disk_layers * num_blocks * padded_to_pages(block_bytes)
        if num_disk_layers:
            # Of the thread that writes blocks and of the one that fetches chunks; others read to stream buffers.
            plan.host_bytes["page buffers"] = 2 * padded_to_pages(block_bytes)
        prefill_bytes = padded(inputs.max_tokens) * per_layer
        if not inputs.device_is_host:
            plan.hidden_tier, plan.host_bytes["hidden states"] = "host", hidden_bytes
            plan.host_bytes["staging buffers"] = buffer_bytes if num_disk_layers or inputs.checks_host else 0
    if plan.hidden_tier == "device":
        prefill_bytes += hidden_bytes
    if inputs.retrieval_budget:
        plan.device_bytes |= _retrieval_bytes(inputs)
        heads, num_chunks = shape.num_layers * shape.num_kv_heads, -(-capacity // inputs.chunk_size)
        if inputs.keeps_mean_keys:
            plan.device_bytes["chunk scores"] = num_chunks * shape.bytes_per_token // 2
        else:
            plan.device_bytes["chunk scores"] = num_chunks * heads * 4
        if num_ahead := num_block_layers * inputs.ahead_tokens:
            plan.device_bytes["chunks ahead"] = num_ahead * per_layer
            plan.device_bytes["places of chunks ahead"] = num_ahead * shape.num_kv_heads * 3 * 8
        exact_bytes = _retrieval_bytes(replace(inputs, retrieval_bits=None))["retrieval cache"]
        if inputs.summary_tokens:
            groups = capacity // inputs.summary_tokens
            summary_bytes = padded(groups) * (shape.bytes_per_token + heads * 4)
            plan.device_bytes["retrieval cache"] += summary_bytes
            exact_bytes += summary_bytes
            plan.device_bytes["means of groups"] = groups * shape.bytes_per_token + heads * 2 * shape.head_dim * 4
        # What a rebuild brings of one layer, and as much to put it together; keys are quantised in fp32, then values.
        update_bytes = (2 if inputs.retrieval_bits is None else 4) * exact_bytes // shape.num_layers
    # A layer of the prompt and its hidden states are there in prefill alone, an update in decoding alone.
    plan.device_bytes["workspace"] = max(prefill_bytes, update_bytes)
    if inputs.drafter_shape is not None:
        plan.device_bytes["streaming cache"] = padded(inputs.drafter_slots) * inputs.drafter_shape.bytes_per_token
    return plan


def _retrieval_bytes(inputs: PlanInput) -> dict[str, int]:
    """Of chosen chunks and newer tokens, with their positions, and of the layer that is dequantised."""
    shape, budget, tail = inputs.target_shape, inputs.retrieval_budget, inputs.retrieval_tail
    heads = shape.num_layers * shape.num_kv_heads
    if inputs.retrieval_bits is None:
        return {"retrieval cache": padded(budget + tail) * (shape.bytes_per_token + heads * 8)}
    chunks = quantised_bytes(shape, budget, inputs.retrieval_bits) + padded(budget) * heads * 4
    newer = padded(tail) * (shape.bytes_per_token + heads * 8)
    return {"retrieval cache": chunks + newer, "dequantised chunks": padded(budget) * shape.bytes_per_token_and_layer}


def _available(inputs: PlanInput) -> dict[str, int]:
    """Usable bytes per tier."""
    free = {"device": inputs.device_free_bytes, "host": inputs.host_free_bytes, "disk": inputs.disk_free_bytes}
    return {name: int(num_bytes * (1 - RESERVE_SHARE)) for name, num_bytes in free.items()}


def _fits(plan: MemoryPlan, inputs: PlanInput) -> bool:
    have, need = _available(inputs), plan.totals
    both_fit = not inputs.device_is_host or need["device"] + need["host"] <= have["host"]
    return both_fit and all(need[name] <= have[name] for name in need)


def _refusal(plans: list[MemoryPlan], inputs: PlanInput, cache: CacheConfig) -> str:
    """Of the plan that takes least of the device: need, have, the largest context that fits, and the knobs."""
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
    move += ", or a smaller cache.retrieval.budget" if inputs.retrieval_budget else ""
    move += "".join(
        f", or cache.full.{key}=auto"
        for key in ("device_layers", "host_layers", "block_tokens")
        if getattr(cache.full, key) != "auto"
    )
    return f"a context of {inputs.max_tokens} tokens needs {needs}. {hint}{move}"


def _largest_context(inputs: PlanInput, cache: CacheConfig) -> int:
    """By bisection; 0 if not even one token fits."""
    low, high = 0, inputs.max_tokens
    while low < high:
        middle = (low + high + 1) // 2
        smaller = replace(inputs, max_tokens=middle)
        if any(_fits(plan, smaller) for plan in _plans(smaller, cache)):
            low = middle
        else:
            high = middle - 1
    return low


def retriever_plan(inputs: PlanInput, cache: CacheConfig, *, has_weights: bool) -> MemoryPlan:
    """Of a process that holds the target on a retrieval cache; its weights may be another's."""
    plan = _plan_with(inputs, cache, inputs.target_shape.num_layers, 0)
    return _with_parts(plan, (*["target weights"] * has_weights, "activations", *RETRIEVAL_PARTS))


def drafter_plan(inputs: PlanInput, cache: CacheConfig) -> MemoryPlan:
    """Of a process that holds the drafter alone."""
    plan = _plan_with(inputs, cache, inputs.target_shape.num_layers, 0)
    return _with_parts(plan, ("drafter weights", "streaming cache"))


def without_retrieval_cache(plan: MemoryPlan) -> MemoryPlan:
    """Of a verifier whose retriever is another process."""
    return _with_parts(plan, tuple(name for name in plan.device_bytes if name not in RETRIEVAL_PARTS))


def _with_parts(plan: MemoryPlan, names: tuple[str, ...]) -> MemoryPlan:
    """With these of its bytes on the device; without what is off it, unless it streams."""
    return replace(plan, device_bytes={name: plan.device_bytes[name] for name in names if name in plan.device_bytes})
