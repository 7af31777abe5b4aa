"""Level 1: StreamingLLM cache (arXiv 2309.17453): the first tokens as attention sinks and a window of newest ones.

Positions are counted within the cache, so a drafter that knows 2K positions works at 128K. Unlike the paper's, which
evicts a token at a time and so must rotate its keys anew at every step, this one evicts `slack` tokens at a time and
reads what stays again: one short forward pass every `slack` tokens, keys rotated once, any kind of positions. What the
drafter sees varies between `window` and `window + slack` newest tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tiers.base import CacheShape, Segment, Tier
from tiers.device_layer import DeviceLayer


class StreamingLLMCache:
    """A tiers.fixed_slots.SlotCache; `length` and all positions count slots of this cache.

    `window_start` is the sequence position of the token in slot `sinks`; it depends on the sequence's length alone.
    """

    can_record = True
    """See tiers.fixed_slots.SlotCache."""

    def __init__(self, shape: CacheShape, sinks: int, window: int, slack: int, tier: Tier):
        self.sinks, self.window, self.slack = sinks, window, slack
        self._layers = [DeviceLayer(shape, self.capacity, tier) for _ in range(shape.num_layers)]
        self.reset()

    @property
    def capacity(self) -> int:
        """Number of slots."""
        return self.sinks + self.window + self.slack

    def reset(self) -> None:
        self.length = self._num_new = 0
        self.window_start = self.sinks

    def window_start_for(self, num_tokens: int) -> int:
        """Position where the window of a sequence of `num_tokens` starts: a whole number of slacks after the sinks."""
        excess = num_tokens - self.capacity
        return self.sinks + max(0, -(-excess // self.slack)) * self.slack

    def slot(self, position: int) -> int:
        """Slot of the token at `position` of the sequence (a sink or in the window)."""
        return position if position < self.sinks else self.sinks + position - self.window_start

    @property
    def next_slot(self) -> int:
        """See tiers.fixed_slots.SlotCache."""
        return self.length

    def slots(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See tiers.fixed_slots.SlotCache."""
        k, v = self._layers[layer].kv
        return k, v

    def summaries(self, layer: int) -> None:
        """None: this cache has no summaries; see tiers.fixed_slots.SlotCache."""

    def begin(self, num_new: int) -> None:
        assert self.length + num_new <= self.capacity, f"{self.length} + {num_new} of {self.capacity} slots"
        self._num_new = num_new

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        self._layers[layer].append(self.length, k, v)

    def segments(self, layer: int) -> Iterator[Segment]:
        yield self._layers[layer].segment(0, self.length + self._num_new, self._num_new)

    def end(self) -> None:
        self.length += self._num_new

    def abort(self) -> None:
        self._num_new = 0

    def truncate(self, length: int) -> None:
        """Rolls back to the first `length` slots."""
        assert 0 <= length <= self.length, f"truncate to {length} of {self.length} slots"
        self.length = length
