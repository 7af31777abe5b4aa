"""Which chunks of the context matter to the next tokens: what a rule that scores them must and may do.

To add a rule `NAME`: write tiers/retrieval/NAME_rule.py with a class NameRule(RetrievalRule), and add the
member `NAME` to RetrievalRuleName in conf/values.py. Nothing else must name it: `rule_class` finds it, the memory
plan asks its `planned_bytes`, and tests/unit/tiers/retrieval/test_rule.py holds it to this contract.

Shape letters as in tiers.base. A chunk is `chunk_size` consecutive tokens; every kv head of every layer chooses for
itself.
"""

# ruff: noqa: B027  methods that do nothing unless a rule needs them

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib import import_module

import torch

from tiers.base import CacheShape, Tier
from tiers.full_cache import FullCache

Pool = Callable[[torch.Tensor], torch.Tensor]
"""Makes scores [H, chunks] the same on all ranks: the mean, where other ranks have other query heads of these heads."""

MassObserver = Callable[[int, torch.Tensor], None]
"""Takes a layer and the mass of attention [H, >= chunks] that a verification gave to each chunk; the last ones may be
padding. All queries count alike: the mass of a kv head adds up to 1."""


def not_pooled(scores: torch.Tensor) -> torch.Tensor:
    """The scores as they are: the pool of a verifier of one rank."""
    return scores


class RetrievalRule(ABC):
    """Scores the chunks of each layer of a full cache, of at most `capacity` tokens; memory comes from `tier`.

    A rule must have `scores`. Of the rest it implements what it learns from: keys as a prompt is read (`observe`), keys
    in the cache (`catch_up`), the attention of verifications (`mass_observer`).
    """

    def __init__(self, shape: CacheShape, capacity: int, chunk_size: int, tier: Tier, pool: Pool = not_pooled):
        self.chunk_size, self._pool = chunk_size, pool

    @classmethod
    def planned_bytes(cls, shape: CacheShape, num_chunks: int) -> int:
        """Bytes of `tier` that the rule takes for `num_chunks` chunks of every layer; the memory plan counts on it."""
        return 0

    def reset(self) -> None:
        """Forgets the sequence: a new one begins."""

    def begin_reading(self) -> None:
        """Tells that the sequence will be read, or read again, from its first token."""

    def observe(self, layer: int, start: int, k: torch.Tensor) -> None:
        """Takes keys [H, T, D] that are final, as prefill appends them from position `start` on, in order."""

    def catch_up(self, cache: FullCache) -> None:
        """Learns what there is to learn of the cache's tokens, which must be final."""

    @property
    def mass_observer(self) -> MassObserver | None:
        """Receiver of the attention of verifications; None where the rule has no use for it, since it takes time."""
        return None

    @abstractmethod
    def scores(self, layer: int, q: torch.Tensor, num_chunks: int) -> torch.Tensor:
        """Scores [H, num_chunks] of the first chunks, all complete, for queries `q` [H, G, T, D]: larger is better.

        They are finite and in memory of their own: the caller overwrites them.
        """

    def select(
        self, layer: int, q: torch.Tensor, num_chunks: int, num_wanted: int, num_newest: int, oldest: int = 0
    ) -> torch.Tensor:
        """Ids [H, num_wanted], ascending, of the best of the first `num_chunks` chunks for queries `q` [H, G, T, D].

        The `num_newest` last ones and the first are always among them; chunks before position `oldest` only if
        nothing else is left. All chunks must be complete.
        """
        scores = self._pool(self.scores(layer, q, num_chunks))
        return best_chunks(scores, num_wanted, num_newest, oldest // self.chunk_size)


def best_chunks(scores: torch.Tensor, num_wanted: int, num_newest: int, num_old: int = 0) -> torch.Tensor:
    """Ids [H, num_wanted], ascending, of the chunks of highest score; `scores` [H, chunks] are overwritten.

    The `num_newest` last ones and the first are always among them; the first `num_old` only if nothing else is left.
    Needs at least `num_wanted` chunks.
    """
    num_chunks = scores.shape[1]
    assert num_newest <= num_wanted <= num_chunks, f"{num_newest} <= {num_wanted} <= {num_chunks} chunks"
    scores[:, :num_old] = -torch.inf
    scores[:, num_chunks - num_newest :] = torch.inf
    if num_wanted > num_newest:
        scores[:, 0] = torch.inf
    return scores.topk(num_wanted, dim=-1).indices.sort(dim=-1).values


def rule_class(name: str) -> type[RetrievalRule]:
    """Class of a rule by its name in conf.schema.RetrievalRuleName: `mean_key` is MeanKeyRule of mean_key_rule.py."""
    module = import_module(f"{__package__}.{name}_rule")
    found: type[RetrievalRule] = getattr(module, name.title().replace("_", "") + "Rule")
    return found
