"""From a configuration and the sizes of its models to what the memory plan asks: tokens, slots and bytes."""

from __future__ import annotations

from dataclasses import dataclass

from conf.schema import AUTO, MAX_AUTO_GAMMA1, MAX_AUTO_GAMMA2, RetrievalRuleName, RunConfig
from tiers.base import CacheShape
from tiers.planning.plan import PlanInput

PIECE_TOKENS = 1024
"""Of the prompt, which pass through a layer together."""
MIN_STREAMING_SLACK = 64
AUTO_GAMMAS1 = (0, 1, 2, 3, 4, 6, MAX_AUTO_GAMMA1)
AUTO_GAMMAS2 = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, MAX_AUTO_GAMMA2)
AUTO_BUDGETS = (512, 1024, 2048, 4096, 8192, 16384)
"""What `auto` chooses from; of the budgets those that fit in a quarter of the context."""


@dataclass(kw_only=True, frozen=True, slots=True)
class ModelSize:
    """What a model takes on one device."""

    cache_shape: CacheShape
    num_weight_bytes: int
    hidden_size: int
    intermediate_size: int


@dataclass(kw_only=True, frozen=True, slots=True)
class FreeBytes:
    """What there is; `device_is_host`: no GPU, one memory."""

    device: int
    host: int
    disk: int
    device_is_host: bool


def gammas1(config: RunConfig) -> tuple[int, ...]:
    """What γ1 of a round may be."""
    if not config.uses_drafter:
        return (0,)
    return AUTO_GAMMAS1 if config.decoding.gamma1 == AUTO else (config.decoding.gamma1,)


def gammas2(config: RunConfig) -> tuple[int, ...]:
    """What γ2 of a round may be."""
    if not (config.uses_drafter or config.uses_retrieval):
        return (0,)
    return AUTO_GAMMAS2 if config.decoding.gamma2 == AUTO else (config.decoding.gamma2,)


def budgets(config: RunConfig, num_prompt_tokens: int) -> tuple[int, ...]:
    """What the budget of the retrieval cache may be behind such a prompt, in tokens; none where there is no such level.

    More than the prompt is cut to it.
    """
    if not config.uses_retrieval:
        return ()
    budget, size = config.cache.retrieval.budget, config.cache.retrieval.chunk_size
    most = -(-num_prompt_tokens // size) * size
    if budget != AUTO:
        return (min(budget, most),)
    fitting = [each // size * size for each in AUTO_BUDGETS if size <= each <= num_prompt_tokens // 4]
    return tuple(fitting) or (min(AUTO_BUDGETS[0] // size * size or size, most),)


def streaming_slack(config: RunConfig) -> int:
    """Tokens that the drafter's cache takes on top of its window before it must be read anew."""
    return max(MIN_STREAMING_SLACK, 2 * slack_tokens(config))


def slack_tokens(config: RunConfig) -> int:
    """Most tentative tokens of a round: a block, what its last inner step brings on top, and the target's own.

    Drafting ahead has as many behind them.
    """
    of_block = config.decoding.most_gamma2 + config.decoding.most_gamma1 + 2
    return 2 * of_block if config.overlaps else of_block


def retrieval_tail_tokens(config: RunConfig, max_new_tokens: int) -> int:
    """Room for the tokens after a rebuild: all of them if there is none, else half a budget."""
    tail = max_new_tokens
    if config.cache.retrieval.rebuild != "never":
        tail = min(tail, max(config.cache.retrieval.budget // 2, 4 * slack_tokens(config)))
    return tail + config.cache.retrieval.chunk_size + 3 * slack_tokens(config)


def plan_input(
    config: RunConfig,
    target: ModelSize,
    drafter: ModelSize | None,
    *,
    max_tokens: int,
    max_new_tokens: int,
    free: FreeBytes,
) -> PlanInput:
    """For a prompt and its continuation of `max_tokens` in all."""
    budget, tail, retrieval = 0, 0, config.cache.retrieval
    if config.uses_retrieval:
        budget, tail = retrieval.budget, retrieval_tail_tokens(config, max_new_tokens)
    streaming = config.cache.streaming
    return PlanInput(
        target_shape=target.cache_shape,
        target_weight_bytes=target.num_weight_bytes,
        hidden_bytes_per_token=target.hidden_size * target.cache_shape.dtype.itemsize,
        max_tokens=max_tokens,
        slack_tokens=slack_tokens(config),
        retrieval_budget=budget,
        retrieval_tail=tail,
        retrieval_bits=retrieval.dtype.bits,
        chunk_size=retrieval.chunk_size,
        keeps_mean_keys=retrieval.rule == RetrievalRuleName.mean_key,
        ahead_tokens=budget if retrieval.rebuild != "never" else 0,
        summary_tokens=retrieval.summary_tokens,
        drafter_shape=drafter.cache_shape if drafter else None,
        drafter_weight_bytes=drafter.num_weight_bytes if drafter else 0,
        drafter_slots=streaming.sinks + streaming.window + streaming_slack(config) if drafter else 0,
        # A piece of the prompt passes through a layer: hidden states, the MLP's two inputs, attention's fp32 output.
        activation_bytes=PIECE_TOKENS * 4 * (4 * target.hidden_size + 3 * target.intermediate_size),
        device_free_bytes=free.device,
        host_free_bytes=free.host,
        disk_free_bytes=free.disk,
        checks_host=config.tiers.host.checksums,
        device_is_host=free.device_is_host,
    )
