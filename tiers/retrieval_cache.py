"""Level 2: the retrieval cache. Chosen chunks of the context, all newer tokens, and a summary of the rest.

slots of a layer            hold                                            written by
[0, num_retrieved)          tokens of the chosen chunks, other ones per     load
                            kv head, ascending by position
[num_retrieved, ...)        the tokens from position `base` on              append (drafted keys and values),
                                                                            replace (the verifier's true ones)

The summary has slots of its own, written by load at a rebuild.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from tiers.base import CacheShape, Segment, Tier, padded
from tiers.retrieval.context_summary import Summary


@dataclass(slots=True)
class LayerUpdate:
    """Keys and values [H, n, D] of one layer; of a rebuild also their positions [H, n], and a summary of the rest."""

    k: torch.Tensor
    v: torch.Tensor
    positions: torch.Tensor | None = None
    summary: Summary | None = None


@dataclass(slots=True)
class RetrievalUpdate:
    """The true keys and values of some tokens, which the verifier tells the retrieval cache.

    A rebuild brings the chosen chunks; otherwise they are the tokens from position `start` on. Either way the cache
    then holds `length` tokens. `layers` may be made as they are taken, so that only one of them needs memory.
    """

    is_rebuild: bool
    start: int
    length: int
    layers: Iterable[LayerUpdate]


class RetrievalCache:
    """A tiers.fixed_slots.SlotCache; `length` counts the tokens of the sequence, of which it holds a part.

    It has room for `budget` tokens of chosen chunks, for `tail_tokens` after the last rebuild, `slack` of which
    tentative ones may need at once, and for `num_summaries` groups of other tokens, per layer and kv head.
    """

    can_record = True
    """See tiers.fixed_slots.SlotCache."""

    def __init__(
        self, shape: CacheShape, budget: int, tail_tokens: int, slack: int, tier: Tier, num_summaries: int = 0
    ):
        size = (shape.num_layers, 2, shape.num_kv_heads, padded(budget + tail_tokens), shape.head_dim)
        self._kv = tier.allocate(*size, dtype=shape.dtype).zero_()
        self._positions = tier.allocate(shape.num_layers, shape.num_kv_heads, size[3], dtype=torch.int64).zero_()
        summary_size = (shape.num_layers, 2, shape.num_kv_heads, padded(num_summaries), shape.head_dim)
        self._summary_kv = tier.allocate(*summary_size, dtype=shape.dtype).zero_()
        self._summary_bias = tier.allocate(shape.num_layers, *summary_size[2:4], dtype=torch.float32).fill_(-torch.inf)
        self._slack = slack
        self.reset()

    def reset(self) -> None:
        self.length = self.base = self._num_retrieved = self._num_new = 0
        self._num_summaries = [0] * len(self._kv)

    @property
    def is_full(self) -> bool:
        """Whether the tail may not take another round: the cache must be rebuilt."""
        return self._slot(self.length) + self._slack > self._kv.shape[3]

    def _slot(self, position: int) -> int:
        """Slot of the token at `position`, which came after the last rebuild."""
        return self._num_retrieved + position - self.base

    @property
    def next_slot(self) -> int:
        """See tiers.fixed_slots.SlotCache."""
        return self._slot(self.length)

    def slots(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See tiers.fixed_slots.SlotCache."""
        k, v = self._kv[layer]
        return k, v

    def summaries(self, layer: int) -> Segment | None:
        """See tiers.fixed_slots.SlotCache."""
        k, v = self._summary_kv[layer]
        return Segment(k, v, start=0, bias=self._summary_bias[layer]) if k.shape[1] else None

    def load(self, update: RetrievalUpdate) -> None:
        """Takes a rebuild, or replaces drafted keys and values by the verifier's."""
        first = 0 if update.is_rebuild else self._slot(update.start)
        end = first
        for layer, new in enumerate(update.layers):
            end = first + new.k.shape[1]
            self._kv[layer, 0, :, first:end] = new.k
            self._kv[layer, 1, :, first:end] = new.v
            if update.is_rebuild:
                assert new.positions is not None, "a rebuild without positions"
                self._positions[layer, :, :end] = new.positions
                self._load_summary(layer, new.summary)
            else:
                self._positions[layer, :, first:end] = torch.arange(
                    update.start, update.length, device=self._positions.device
                )
        if update.is_rebuild:
            self.base, self._num_retrieved = update.length, end
        self.length = update.length

    @property
    def written(self) -> tuple[int, list[int]]:
        """Numbers that `adopt` needs: slots that the last rebuild wrote, and summaries of each layer."""
        return self._num_retrieved, list(self._num_summaries)

    def adopt(self, *, is_rebuild: bool, length: int, num_slots: int, num_summaries: list[int]) -> None:
        """Like `load`, for an update that was loaded in this cache's memory through another cache (see `written`)."""
        if is_rebuild:
            self.base, self._num_retrieved, self._num_summaries = length, num_slots, list(num_summaries)
        self.length = length

    def _load_summary(self, layer: int, summary: Summary | None) -> None:
        """Writes the summary of one layer, or that it has none."""
        count = 0
        if summary is not None:
            count = summary.k.shape[1]
            self._summary_kv[layer, 0, :, :count] = summary.k
            self._summary_kv[layer, 1, :, :count] = summary.v
            self._summary_bias[layer, :, :count] = summary.log_count
        self._num_summaries[layer] = count
        self._summary_bias[layer, :, count:] = -torch.inf  # padding

    def begin(self, num_new: int) -> None:
        end = self._slot(self.length + num_new)
        assert end <= self._kv.shape[3], f"{end} slots exceed the capacity {self._kv.shape[3]}"
        self._num_new = num_new
        new = torch.arange(self.length, self.length + num_new, device=self._positions.device)
        self._positions[:, :, self._slot(self.length) : end] = new

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        first = self._slot(self.length)
        self._kv[layer, 0, :, first : first + k.shape[1]] = k
        self._kv[layer, 1, :, first : first + k.shape[1]] = v

    def segments(self, layer: int) -> Iterator[Segment]:
        if count := padded(self._num_summaries[layer]):
            k, v = self._summary_kv[layer, :, :, :count]
            yield Segment(k, v, start=0, bias=self._summary_bias[layer, :, :count])
        end = self._slot(self.length + self._num_new)
        stop = padded(end)
        k, v = self._kv[layer, :, :, :stop]
        positions = self._positions[layer, :, :stop]
        yield Segment(k, v, positions=positions, num_new=self._num_new, num_pad=stop - end)

    def end(self) -> None:
        self.length += self._num_new

    def abort(self) -> None:
        self._num_new = 0

    def truncate(self, length: int) -> None:
        assert self.base <= length <= self.length, f"truncate to {length}, held [{self.base}, {self.length})"
        self.length = length
