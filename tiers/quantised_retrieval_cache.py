"""Level 2 in less memory: a retrieval cache whose chosen chunks are quantised. Newer tokens and the summary are exact.

Reading a layer dequantises its chunks into a workspace that all layers share: memory is saved, no time. The target
verifies what is drafted on it, so nothing that is generated changes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tiers.base import CacheShape, Segment, Tier, padded
from tiers.quantisation import allocate_quantised, dequantise, quantise
from tiers.retrieval_cache import LayerUpdate, RetrievalCache, RetrievalUpdate

KEYS, VALUES = 0, 1


class QuantisedRetrievalCache(RetrievalCache):
    """A RetrievalCache of which the first `budget` tokens that a rebuild brings are quantised.

    Its slots hold what is exact: tokens that the budget has no room for, and newer ones.
    """

    can_record = False
    """Chunks are dequantised as a layer is read, and are in no slot."""

    def __init__(
        self,
        bits: int,
        shape: CacheShape,
        budget: int,
        tail_tokens: int,
        slack: int,
        tier: Tier,
        num_summaries: int = 0,
    ):
        super().__init__(shape, 0, tail_tokens, slack, tier, num_summaries)
        self._bits, self._budget = bits, budget
        self._chunks = allocate_quantised(tier, shape, budget, bits)
        size = (shape.num_layers, shape.num_kv_heads, padded(budget))
        self._chunk_positions = tier.allocate(*size, dtype=torch.int32).zero_()
        self._workspace = tier.allocate(2, *size[1:], shape.head_dim, dtype=shape.dtype).zero_()

    def reset(self) -> None:
        super().reset()
        self._num_chosen = 0

    def load(self, update: RetrievalUpdate) -> None:
        if update.is_rebuild:
            layers = (self._load_chosen(layer, new) for layer, new in enumerate(update.layers))
            update = RetrievalUpdate(is_rebuild=True, start=update.start, length=update.length, layers=layers)
        super().load(update)

    def _load_chosen(self, layer: int, new: LayerUpdate) -> LayerUpdate:
        """Quantises what the budget has room for; returns the rest."""
        assert new.positions is not None, "a rebuild without positions"
        count = self._num_chosen = min(self._budget, new.k.shape[1])
        if count:
            quantise(new.k[:, :count], self._chunks.part(layer, KEYS), self._bits)
            quantise(new.v[:, :count], self._chunks.part(layer, VALUES), self._bits)
            self._chunk_positions[layer, :, :count] = new.positions[:, :count]
        return LayerUpdate(new.k[:, count:], new.v[:, count:], new.positions[:, count:], new.summary)

    @property
    def written(self) -> tuple[int, list[int]]:
        num_slots, num_summaries = super().written
        return self._num_chosen + num_slots, num_summaries

    def adopt(self, *, is_rebuild: bool, length: int, num_slots: int, num_summaries: list[int]) -> None:
        if is_rebuild:
            self._num_chosen = min(self._budget, num_slots)
        num_exact = num_slots - self._num_chosen
        super().adopt(is_rebuild=is_rebuild, length=length, num_slots=num_exact, num_summaries=num_summaries)

    def segments(self, layer: int) -> Iterator[Segment]:
        if end := self._num_chosen:
            stop = padded(end)
            k, v = self._workspace[:, :, :stop]
            dequantise(self._chunks.part(layer, KEYS), k)
            dequantise(self._chunks.part(layer, VALUES), v)
            yield Segment(k, v, positions=self._chunk_positions[layer, :, :stop], num_pad=stop - end)
        yield from super().segments(layer)


def make_retrieval_cache(
    bits: int | None, shape: CacheShape, budget: int, tail_tokens: int, slack: int, tier: Tier, num_summaries: int = 0
) -> RetrievalCache:
    """A RetrievalCache whose chosen chunks have values of so many `bits`; None: as the model has them."""
    if bits is None:
        return RetrievalCache(shape, budget, tail_tokens, slack, tier, num_summaries)
    return QuantisedRetrievalCache(bits, shape, budget, tail_tokens, slack, tier, num_summaries)
