"""Steps of every program that decodes in our engine: the seed, the room for new tokens, rounds with their time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from conf.schema import ConfigError, RunConfig
from launch.prompts.document import is_built_in
from launch.prompts.prompt import Prompt
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
            "reads as much of it as fits; a model with a plain rotary embedding is stretched to more by "
            "model.max_positions"
        )
    room = max_positions - num_prompt + 1
    if wanted > room:
        note(
            f"generation.max_new_tokens={wanted} is cut to {room}: the model has {max_positions} positions, "
            f"the prompt takes {num_prompt}"
        )
    return min(wanted, room)


def note_of_cut(config: RunConfig, prompt: Prompt, max_positions: int) -> str | None:
    """A line on what of the document was left out, and how more of it is read; None where nothing was.

    The built-in document is there to be cut, and has no such line.
    """
    if not prompt.is_cut or is_built_in(config.prompt):
        return None
    at_least = "" if prompt.is_counted else "at least "
    line = f"prompt: {prompt.num_read:,} of {at_least}{prompt.num_document:,} tokens read"
    line += f" (prompt.max_tokens={config.prompt.max_tokens or 'null'}"
    num_missing = prompt.num_document - prompt.num_read
    most = max_positions - config.generation.max_new_tokens + 1
    if prompt.is_counted and len(prompt.ids) + num_missing <= most:
        return f"{line}; null reads all)"
    if most > len(prompt.ids):
        return f"{line}; {most} reads as much as the model has positions for)"
    return f"{line}; the model has positions for no more)"


def check_ids(ids: list[int], vocab_size: int, tokenizer: Any) -> None:
    """Raises ConfigError for a token of the prompt that the target cannot read: it has ids below `vocab_size` only."""
    beyond = next((index for index, token_id in enumerate(ids) if token_id >= vocab_size), None)
    if beyond is not None:
        raise ConfigError(
            f"the prompt's token {beyond} is {tokenizer.decode([ids[beyond]])!r} with id {ids[beyond]}; it must be "
            f"below {vocab_size}, the model's vocab_size: a word was added to the tokenizer that the model does not "
            "know. Use the model's own tokenizer, or take the word out of the prompt"
        )


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
