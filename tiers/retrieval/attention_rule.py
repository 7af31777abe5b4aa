"""The rule `attention`: those chunks matter that verification itself has just attended to.

All queries of a verification meet all keys, so the mass of attention on each chunk comes without reading anything
again (H2O, arXiv 2306.14048, sums it over all time; here older rounds count for less). It takes one number a chunk,
where mean keys take a key.
"""

from __future__ import annotations

import torch

from tiers.base import CacheShape, Tier
from tiers.retrieval.rule import MassObserver, Pool, RetrievalRule, not_pooled

DECAY = 0.5
"""Share of its weight that an earlier round keeps, with each round."""


class AttentionRule(RetrievalRule):
    """Keeps a running mean of attention mass [H, chunks] for each layer.

    Keys say nothing by themselves, and tokens that are read again are what they were: their mass stays.
    """

    def __init__(
        self,
        shape: CacheShape,
        capacity: int,
        chunk_size: int,
        tier: Tier,
        pool: Pool = not_pooled,
        *,
        decay: float = DECAY,
    ):
        super().__init__(shape, capacity, chunk_size, tier, pool)
        self._decay, num_chunks = decay, -(-capacity // chunk_size)
        self._mass = tier.allocate(shape.num_layers, shape.num_kv_heads, num_chunks, dtype=torch.float32)
        self.reset()

    @classmethod
    def planned_bytes(cls, shape: CacheShape, num_chunks: int) -> int:
        """Bytes of one float32 for each chunk, layer and kv head."""
        return num_chunks * shape.num_layers * shape.num_kv_heads * torch.float32.itemsize

    def reset(self) -> None:
        self._mass.zero_()

    @property
    def mass_observer(self) -> MassObserver:
        return self.add

    def add(self, layer: int, mass: torch.Tensor) -> None:
        """Takes what a verification's queries gave to each chunk, [H, chunks]; the last ones may be padding."""
        held = self._mass[layer].mul_(self._decay)
        num_chunks = min(mass.shape[1], held.shape[1])
        held[:, :num_chunks] += mass[:, :num_chunks]

    def scores(self, layer: int, q: torch.Tensor, num_chunks: int) -> torch.Tensor:
        """Mass [H, num_chunks] of the first chunks; queries are not needed any more."""
        return self._mass[layer, :, :num_chunks].clone()
