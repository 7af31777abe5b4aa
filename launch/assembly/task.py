"""The task of a run: what is to be generated, by which models, from which prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from conf.schema import RunConfig

if TYPE_CHECKING:
    from launch.assembly.prepare import Prepared


@dataclass(kw_only=True, frozen=True)
class Task:
    """All that an engine needs to know of one generation; the engine of one process and that of several take the same.

    It is made when the prompt has been read and fits the model, and never changes.
    """

    config: RunConfig
    prepared: Prepared
    """The models that `config` names, resolved against this machine."""
    prompt_ids: list[int]
    max_new_tokens: int
    """The most tokens that are generated; the model has positions for them behind the prompt."""
    seed: int
    """Seed of all random numbers; a configuration may leave it open, a task may not."""

    @property
    def num_prompt_tokens(self) -> int:
        """Number of tokens of the prompt."""
        return len(self.prompt_ids)

    @property
    def max_tokens(self) -> int:
        """The most tokens of prompt and continuation together."""
        return self.num_prompt_tokens + self.max_new_tokens
