"""Which chunks of the context matter to the next tokens: those that verification itself has just attended to.

All queries of a verification meet all keys, so the mass of attention on each chunk comes without reading anything
again (H2O, arXiv 2306.14048, sums it over all time; here older rounds count for less). It takes one number a chunk,
where mean keys take a key.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tiers.base import CacheShape
from tiers.full_cache import FullCache
from tiers.retrieval.mean_key_rule import Pool, best_chunks, not_pooled

DECAY = 0.5
"""Of what earlier rounds count for, with each round."""


class AttentionMass:
    """A running mean of attention mass [H, chunks] for each layer; see tiers.retrieval.mean_key_rule.ChunkRule."""

    def __init__(
        self,
        shape: CacheShape,
        capacity: int,
        chunk_size: int,
        tier,
        pool: Pool = not_pooled,
        *,
        decay: float = DECAY,
    ):
        self.chunk_size, self._pool, self._decay = chunk_size, pool, decay
        num_chunks = -(-capacity // chunk_size)
        self._mass = tier.allocate(shape.num_layers, shape.num_kv_heads, num_chunks, dtype=torch.float32)
        self.reset()

    def reset(self) -> None:
        self._mass.zero_()

    def begin_reading(self) -> None:
        """What is read again is what it was: its mass stays."""

    def observe(self, layer: int, start: int, k: torch.Tensor) -> None:
        """Keys say nothing by themselves."""

    def catch_up(self, cache: FullCache) -> None:
        """Whatever verification saw is known."""

    @property
    def mass_observer(self) -> Callable[[int, torch.Tensor], None]:
        """See tiers.retrieval.mean_key_rule.ChunkRule."""
        return self.add

    def add(self, layer: int, mass: torch.Tensor) -> None:
        """What a verification's queries gave to each chunk, [H, chunks]; the last ones may be padding."""
        held = self._mass[layer].mul_(self._decay)
        num_chunks = min(mass.shape[1], held.shape[1])
        held[:, :num_chunks] += mass[:, :num_chunks]

    def select(
        self, layer: int, q: torch.Tensor | None, num_chunks: int, num_wanted: int, num_newest: int, oldest: int = 0
    ) -> torch.Tensor:
        """See tiers.retrieval.mean_key_rule.ChunkRule; queries are not needed any more."""
        scores = self._pool(self._mass[layer, :, :num_chunks].clone())
        return best_chunks(scores, num_wanted, num_newest, oldest // self.chunk_size)
