"""A contender of launch/bench.py: whatever reads the same prompt and goes on from it, beside others.

A contender reads the prompt once, then continues it turn by turn, alternating with the others; so a repetition is a
stretch of the same continuation, at the same positions for all, and no prompt is read twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from conf.schema import RunConfig
from launch.assembly.prepare import Prepared

WORKSPACE_BYTES = 256 << 20
"""Memory of a running contender beside its weights and caches, which no plan counts."""


class NotHereError(Exception):
    """A contender that this machine, pair or cell cannot have: skipped, with the reason."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Cell:
    """A task of one comparison: everything that its contenders have in common."""

    config: RunConfig
    """The run of our engine; each of our contenders changes some of it."""
    prepared: Prepared
    """The pair with its drafter: facts of the models for the peers."""
    prompt: list[int]
    num_new_tokens: int
    """Tokens at most, over all turns."""
    seed: int

    @property
    def num_positions(self) -> int:
        """Tokens of the prompt and of all turns, for which a cache has room."""
        return len(self.prompt) + self.num_new_tokens

    @property
    def kv_bytes(self) -> int:
        """Keys and values of the target at all positions."""
        return self.prepared.target.cache_shape.bytes_per_token * self.num_positions


@dataclass(kw_only=True, slots=True)
class Turn:
    """New tokens of one turn of a contender: `num_timed` of them took `seconds`."""

    tokens: list[int]
    num_timed: int
    seconds: float


class Contender(Protocol):
    """`load`, `start`, then `decode` as often as wanted; `close` may come at any time, and more than once."""

    def needed_bytes(self) -> int:
        """Memory that it will take, about. Raises NotHereError, ConfigError."""

    def load(self) -> None:
        """Makes weights and caches."""

    def start(self) -> list[int]:
        """Reads the prompt and generates the first token, which it returns."""

    def decode(self, count: int) -> Turn:
        """Generates `count` tokens, or, where a round brings several, some more."""

    def begin_counting(self) -> None:
        """The warm-up is over: `facts` are of what comes now."""

    def facts(self) -> dict[str, Any]:
        """Everything else there is to tell of the tokens since `begin_counting`; JSON types."""

    def close(self) -> None:
        """Gives the memory back."""
