"""The rule `mean_key`: chunks are scored by the query and the mean of their keys.

So does TriForce (arXiv 2404.11912, section 4.1). Here the query heads of a kv head are pooled, over all tokens of the
last verification that were accepted. Means are kept incrementally.
"""

from __future__ import annotations

import torch

from tiers.base import CacheShape, Tier
from tiers.full_cache import READ_TOKENS, FullCache
from tiers.retrieval.rule import Pool, RetrievalRule, not_pooled


class MeanKeyRule(RetrievalRule):
    """Keeps mean keys [H, number of complete chunks, D] for each layer."""

    def __init__(self, shape: CacheShape, capacity: int, chunk_size: int, tier: Tier, pool: Pool = not_pooled):
        super().__init__(shape, capacity, chunk_size, tier, pool)
        size = (shape.num_layers, shape.num_kv_heads, capacity // chunk_size, shape.head_dim)
        self._means = tier.allocate(*size, dtype=shape.dtype)
        self._num_layers = shape.num_layers
        self._begun: list[torch.Tensor | None]  # per layer: keys of the chunk not yet complete
        self.reset()

    @classmethod
    def planned_bytes(cls, shape: CacheShape, num_chunks: int) -> int:
        """Bytes of one key for each chunk, layer and kv head."""
        return num_chunks * shape.bytes_per_token // 2

    def observe(self, layer: int, start: int, k: torch.Tensor) -> None:
        first, begun = self._num_indexed[layer], self._begun[layer]
        if begun is not None:
            k, start = torch.cat([begun, k], dim=1), start - begun.shape[1]
        skipped = first * self.chunk_size - start
        assert skipped >= 0, f"keys of chunk {first} are missing before position {start}"
        count = max(0, k.shape[1] - skipped) // self.chunk_size
        end = skipped + count * self.chunk_size
        if count:
            self._means[layer, :, first : first + count] = self._mean(k[:, skipped:end])
            self._num_indexed[layer] = first + count
        self._begun[layer] = k[:, end:].clone() if end < k.shape[1] else None

    def catch_up(self, cache: FullCache) -> None:
        """Indexes the complete chunks of the cache's tokens, which must be final."""
        chunks_at_once = max(1, READ_TOKENS // self.chunk_size)
        num_complete = cache.length // self.chunk_size
        for layer, num_indexed in enumerate(self._num_indexed):
            for first in range(num_indexed, num_complete, chunks_at_once):
                end = min(first + chunks_at_once, num_complete)
                k, _ = cache.read(layer, first * self.chunk_size, end * self.chunk_size)
                self._means[layer, :, first:end] = self._mean(k)
            self._num_indexed[layer] = max(num_indexed, num_complete)
        self._begun = [None] * self._num_layers

    def _mean(self, rows: torch.Tensor) -> torch.Tensor:
        """Means [H, n, D] of chunks of keys [H, n * chunk_size, D], summed in float32."""
        return torch.unflatten(rows, 1, (-1, self.chunk_size)).mean(dim=2, dtype=torch.float32)

    def reset(self) -> None:
        self._num_indexed = [0] * self._num_layers
        self._begun = [None] * self._num_layers

    begin_reading = reset

    def scores(self, layer: int, q: torch.Tensor, num_chunks: int) -> torch.Tensor:
        """Softmax of a query's products with the mean keys, its mean over all queries: [H, num_chunks]."""
        known = self._num_indexed[layer]
        assert num_chunks <= known, f"{num_chunks} chunks asked for, {known} indexed"
        means = self._means[layer, :, :num_chunks]
        q = q.flatten(1, 2)
        scores = torch.matmul(q.float(), means.float().transpose(1, 2)) * q.shape[-1] ** -0.5
        return torch.softmax(scores, dim=-1).mean(dim=1)
