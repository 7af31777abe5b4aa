"""Steps of every program that decodes in our engine: the seed, the room for new tokens, rounds with their time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from conf.schema import ConfigError, RunConfig
from orchestrator.metrics import Metrics
from orchestrator.round import Round


def make_seed(config: RunConfig) -> int:
    """The configured seed, or one drawn now: of 48 bits, which is exact in any JSON reader."""
    seed = config.sampling.seed
    return int.from_bytes(os.urandom(6), "little") if seed is None else seed


def fit_to_model(config: RunConfig, num_prompt: int, max_positions: int, note: Callable[[str], None]) -> int:
    """The most tokens that can be generated after a prompt of `num_prompt` tokens; `note` is told if that is fewer.

    The last one of them needs no position. Raises ConfigError for a prompt that does not fit the model.
    """
    wanted = config.generation.max_new_tokens
    if num_prompt > max_positions:
        at_least = "at least " if num_prompt == 4 * max_positions else ""
        raise ConfigError(
            f"This model's maximum context length is {max_positions} tokens; the prompt has {at_least}{num_prompt} "
            f"tokens (prompt.max_tokens is {config.prompt.max_tokens or 'null'}). prompt.max_tokens={max_positions} "
            "reads as much of it as fits"
        )
    room = max_positions - num_prompt + 1
    if wanted > room:
        note(
            f"generation.max_new_tokens={wanted} is cut to {room}: the model has {max_positions} positions, "
            f"the prompt takes {num_prompt}"
        )
    return min(wanted, room)


def make_metrics(config: RunConfig) -> Metrics:
    """Metrics with the levels that this configuration has."""
    return Metrics(uses_drafter=config.uses_drafter, uses_retrieval=config.uses_retrieval)


def take_round(act: Callable[[], Round], metrics: Metrics) -> tuple[Round, float]:
    """One round, added to `metrics`, and its seconds; `act` is a hierarchy's `start` or `round`."""
    began = time.perf_counter()
    round_ = act()
    seconds = time.perf_counter() - began
    metrics.add(round_, seconds)
    return round_, seconds
