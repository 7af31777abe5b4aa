"""Sizes that a configuration and its models ask of the memory plan: tokens, slots and bytes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

from conf.schema import MAX_AUTO_GAMMA1, MAX_AUTO_GAMMA2, NEVER, ConfigError, PlacementConfig, RunConfig
from tiers.base import CacheShape
from tiers.planning.sizes import PlanInput, RetrievalSizes, StreamingSizes

Config = TypeVar("Config", bound=RunConfig)
GIB = 2**30
PIECE_TOKENS = 1024
"""Tokens of the prompt that pass through a layer together."""
MIN_STREAMING_SLACK = 64
"""Least number of tokens after which the drafter reads its window anew."""
# What `auto` chooses from.
AUTO_GAMMAS1 = (0, 1, 2, 3, 4, 6, MAX_AUTO_GAMMA1)
AUTO_GAMMAS2 = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, MAX_AUTO_GAMMA2)
AUTO_BUDGETS = (512, 1024, 2048, 4096, 8192, 16384)
"""Budgets in tokens; those that fit in a quarter of the context are chosen from."""


@dataclass(kw_only=True, frozen=True, slots=True)
class ModelSize:
    """Size of a model, or of the part of it that one device holds."""

    cache_shape: CacheShape
    num_weight_bytes: int
    hidden_size: int
    intermediate_size: int


@dataclass(kw_only=True, frozen=True, slots=True)
class FreeBytes:
    """Memory that there is to plan for; `device_is_host`: no GPU, one memory."""

    device: int
    host: int
    disk: int
    device_is_host: bool


def available_bytes(placement: PlacementConfig, free: FreeBytes) -> FreeBytes:
    """Memory to plan for: the configured limit of each tier, or what is `free` where there is none."""

    def limit_or(gib: float | None, free_bytes: int) -> int:
        return free_bytes if gib is None else int(gib * GIB)

    return FreeBytes(
        device=limit_or(placement.device_memory_gib, free.device),
        host=limit_or(placement.host_memory_gib, free.host),
        disk=limit_or(placement.disk_gib, free.disk),
        device_is_host=free.device_is_host,
    )


def gammas1(config: RunConfig) -> tuple[int, ...]:
    """Values that γ1 of a round may have."""
    if not config.uses_drafter:
        return (0,)
    gamma1 = config.decoding.gamma1
    return (gamma1,) if isinstance(gamma1, int) else AUTO_GAMMAS1


def gammas2(config: RunConfig) -> tuple[int, ...]:
    """Values that γ2 of a round may have."""
    if not (config.uses_drafter or config.uses_retrieval):
        return (0,)
    gamma2 = config.decoding.gamma2
    return (gamma2,) if isinstance(gamma2, int) else AUTO_GAMMAS2


def budgets(config: RunConfig, num_prompt_tokens: int) -> tuple[int, ...]:
    """Budgets, in tokens, that the retrieval cache may have behind such a prompt; none where there is no such level.

    A budget of more than the prompt is cut to it.
    """
    if not config.uses_retrieval:
        return ()
    budget, size = config.cache.retrieval.budget, config.cache.retrieval.chunk_size
    most = -(-num_prompt_tokens // size) * size
    if isinstance(budget, int):
        return (min(budget, most),)
    fitting = [each // size * size for each in AUTO_BUDGETS if size <= each <= num_prompt_tokens // 4]
    return tuple(fitting) or (min(AUTO_BUDGETS[0] // size * size or size, most),)


def with_known_budget(config: Config, num_prompt_tokens: int, notes: list[str]) -> Config:
    """`config` with the retrieval budget that memory is planned for, in tokens; `notes` is told where it differs.

    That is the configured one, cut to the prompt; of `auto` the most that it may choose. That the default is more than
    a short prompt needs no line.
    """
    possible = budgets(config, num_prompt_tokens)
    if not possible:
        return config
    retrieval, most = config.cache.retrieval, possible[-1]
    if isinstance(retrieval.budget, str):
        notes.append(f"cache.retrieval.budget=auto: at most {most}")
    elif retrieval.budget > most and retrieval.budget != type(retrieval)().budget:
        notes.append(f"cache.retrieval.budget={retrieval.budget} is more than the prompt: cut to {most}")
    return replace(config, cache=replace(config.cache, retrieval=replace(retrieval, budget=most)))


def slack_tokens(config: RunConfig) -> int:
    """Most tentative tokens of a round: a block, what its last inner step brings on top, and the target's own.

    Drafting ahead has as many behind them.
    """
    of_block = config.decoding.most_gamma2 + config.decoding.most_gamma1 + 2
    return 2 * of_block if config.overlaps else of_block


def streaming_sizes(config: RunConfig) -> StreamingSizes:
    """Sizes of the drafter's cache; its slack is read anew in one short pass."""
    streaming = config.cache.streaming
    slack = max(MIN_STREAMING_SLACK, 2 * slack_tokens(config))
    return StreamingSizes(sinks=streaming.sinks, window=streaming.window, slack=slack)


def check_drafter_window(config: RunConfig, drafter: str, max_positions: int) -> None:
    """Raises ConfigError where a drafter that knows so many positions has no room for the configured window."""
    streaming = streaming_sizes(config)
    most = max_positions - streaming.sinks - streaming.slack
    if most < 1:
        raise ConfigError(
            f"model.drafter is {drafter!r}, which knows {max_positions} positions; it must know at "
            f"least {streaming.sinks + streaming.slack + 1}: {streaming.sinks} for cache.streaming.sinks, "
            f"{streaming.slack} for tokens in flight, fewer with smaller decoding.gamma1 and gamma2, and 1 for the "
            "window. Or use model.drafter=lookup"
        )
    if streaming.window > most:
        raise ConfigError(
            f"cache.streaming.window is {streaming.window}; it must be at most {most}: the drafter knows "
            f"{max_positions} positions, {streaming.sinks} of them for cache.streaming.sinks and "
            f"{streaming.slack} for tokens in flight"
        )


def retrieval_sizes(config: RunConfig, max_new_tokens: int) -> RetrievalSizes | None:
    """Sizes of the retrieval level, whose budget must be known; None where there is no such level."""
    if not config.uses_retrieval:
        return None
    retrieval = config.cache.retrieval
    assert isinstance(retrieval.budget, int), f"the budget is {retrieval.budget!r}: see with_known_budget"
    is_rebuilt, slack = retrieval.rebuild != NEVER, slack_tokens(config)
    # Room for the tokens after a rebuild: all of them if there is none, else half a budget.
    tail = min(max_new_tokens, max(retrieval.budget // 2, 4 * slack)) if is_rebuilt else max_new_tokens
    return RetrievalSizes(
        budget=retrieval.budget,
        # A rebuild also brings the tokens behind the last whole chunk; tentative ones of several rounds come on top.
        tail_tokens=tail + retrieval.chunk_size + 3 * slack,
        chunk_size=retrieval.chunk_size,
        rule=retrieval.rule,
        bits=retrieval.dtype.bits,
        summary_tokens=retrieval.summary_tokens,
        is_rebuilt=is_rebuilt,
    )


def plan_input(
    config: RunConfig,
    target: ModelSize,
    drafter: ModelSize | None,
    *,
    max_tokens: int,
    max_new_tokens: int,
    free: FreeBytes,
) -> PlanInput:
    """Input of the memory plan for a prompt and its continuation of `max_tokens` in all.

    The budget of `config` must be known: see `with_known_budget`.
    """
    return PlanInput(
        target_shape=target.cache_shape,
        target_weight_bytes=target.num_weight_bytes,
        hidden_bytes_per_token=target.hidden_size * target.cache_shape.dtype.itemsize,
        max_tokens=max_tokens,
        slack_tokens=slack_tokens(config),
        piece_tokens=PIECE_TOKENS,
        retrieval=retrieval_sizes(config, max_new_tokens),
        drafter_shape=drafter.cache_shape if drafter else None,
        drafter_weight_bytes=drafter.num_weight_bytes if drafter else 0,
        streaming=streaming_sizes(config) if drafter else None,
        # A piece of the prompt passes through a layer: hidden states, the MLP's two inputs, attention's fp32 output.
        activation_bytes=PIECE_TOKENS * 4 * (4 * target.hidden_size + 3 * target.intermediate_size),
        device_free_bytes=free.device,
        host_free_bytes=free.host,
        disk_free_bytes=free.disk,
        checks_host=config.tiers.host.checksums,
        device_is_host=free.device_is_host,
    )
