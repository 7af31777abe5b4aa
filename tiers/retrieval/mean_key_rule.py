"""Which chunks of the context matter to the next tokens: mean keys, kept incrementally, and the choice among them.

TriForce (arXiv 2404.11912, section 4.1): a chunk is scored by the query and its mean key. Here per kv head, the query
heads of a group pooled, over the queries of all tokens of the last verification that were accepted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from tiers.base import CacheShape
from tiers.full_cache import FullCache

READ_TOKENS = 1024  # read from the cache at once, so that what is needed on the device stays small


Pool = Callable[[torch.Tensor], torch.Tensor]
"""Of scores [H, chunks]: where other ranks have other query heads of the same kv heads, the mean over all of them."""


def not_pooled(scores: torch.Tensor) -> torch.Tensor:
    return scores


class ChunkRule(Protocol):
    """Scores the chunks of `chunk_size` tokens of each layer of a full cache, and chooses among them."""

    chunk_size: int

    @property
    def mass_observer(self) -> Callable[[int, torch.Tensor], None] | None:
        """Takes a layer and the mass of attention [H, chunks] that a verification gave to each chunk of it; None where
        the rule has no use for that, which takes time to compute."""

    def reset(self) -> None:
        """A new sequence."""

    def begin_reading(self) -> None:
        """The sequence will be read, or read again, from its first token."""

    def observe(self, layer: int, start: int, k: torch.Tensor) -> None:
        """Takes keys [H, T, D] that are final, as prefill appends them from position `start` on, in order."""

    def catch_up(self, cache: FullCache) -> None:
        """Learns what there is to learn of the cache's tokens, which must be final."""

    def select(
        self, layer: int, q: torch.Tensor | None, num_chunks: int, num_wanted: int, num_newest: int, oldest: int = 0
    ) -> torch.Tensor:
        """The best of the first `num_chunks` chunks for queries `q` [H, G, T, D]: ids [H, num_wanted], ascending.

        The `num_newest` last ones and the first are always among them; chunks before position `oldest` only if
        nothing else is left. All chunks must be complete.
        """


class ChunkIndex:
    """Mean keys [H, number of complete chunks, D] of each layer of a full cache; a ChunkRule."""

    mass_observer = None

    def __init__(self, shape: CacheShape, capacity: int, chunk_size: int, tier, pool: Pool = not_pooled):
        self.chunk_size, self._pool = chunk_size, pool
        size = (shape.num_layers, shape.num_kv_heads, capacity // chunk_size, shape.head_dim)
        self._means = tier.allocate(*size, dtype=shape.dtype)
        self._num_layers = shape.num_layers
        self.reset()

    def observe(self, layer: int, start: int, k: torch.Tensor) -> None:
        """See ChunkRule."""
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
        return rows.unflatten(1, (-1, self.chunk_size)).mean(dim=2, dtype=torch.float32)

    def reset(self) -> None:
        self._num_indexed = [0] * self._num_layers
        self._begun: list[torch.Tensor | None] = [None] * self._num_layers  # keys of the chunk not yet complete

    begin_reading = reset

    def select(
        self, layer: int, q: torch.Tensor, num_chunks: int, num_wanted: int, num_newest: int, oldest: int = 0
    ) -> torch.Tensor:
        """See ChunkRule."""
        known = self._num_indexed[layer]
        assert num_chunks <= known, f"{num_chunks} chunks asked for, {known} indexed"
        means = self._means[layer, :, :num_chunks]
        q = q.flatten(1, 2)
        scores = torch.matmul(q.float(), means.float().transpose(1, 2)) * q.shape[-1] ** -0.5
        scores = torch.softmax(scores, dim=-1).mean(dim=1)
        return best_chunks(self._pool(scores), num_wanted, num_newest, oldest // self.chunk_size)


def best_chunks(scores: torch.Tensor, num_wanted: int, num_newest: int, num_old: int = 0) -> torch.Tensor:
    """The chunks of highest score [H, chunks], between 0 and 1, which is overwritten: ids [H, num_wanted], ascending.

    The `num_newest` last ones and the first are always among them; the first `num_old` only if nothing else is left.
    Needs at least `num_wanted` chunks.
    """
    num_chunks = scores.shape[1]
    assert num_newest <= num_wanted <= num_chunks, f"{num_newest} <= {num_wanted} <= {num_chunks} chunks"
    scores[:, :num_old] = -1
    scores[:, num_chunks - num_newest :] = 3  # above any score
    if num_wanted > num_newest:
        scores[:, 0] = 3
    return scores.topk(num_wanted, dim=-1).indices.sort(dim=-1).values
