"""A draft cache seen with all of its slots at every step, so that one recorded forward pass fits every step.

Here nothing that changes from step to step is a number of the host: which slots the new tokens go to is a tensor, and
all slots are read, behind a mask. That costs attention over slots that are empty; see workers.models.cuda_graphs for
the gain.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from tiers.base import KVCache, Segment


class SlotCache(KVCache, Protocol):
    """A draft level's cache, whose memory stays where it is, with a slot for each token that it holds, in order."""

    can_record: bool
    """Whether slots and summaries are all that it holds, so that a recorded pass over them sees what it should."""

    @property
    def next_slot(self) -> int:
        """Slot of the first new token."""

    def slots(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [H, S, D] of all slots, S the same in all layers; finite where nothing was written."""

    def summaries(self, layer: int) -> Segment | None:
        """Segment that is seen beside the slots, with a bias that hides what is empty; None where there is none."""


class FixedSlots:
    """The PassCache of one forward pass over `cache`, whose new tokens go to slots `places` [T], ascending by one.

    The cache's own `begin` and `end` are the caller's.
    """

    def __init__(self, cache: SlotCache, places: torch.Tensor):
        self._cache, self._places = cache, places

    def begin(self, num_new: int) -> None:
        num_slots = self._cache.slots(0)[0].shape[1]
        # New tokens are the last: what a token sees are the slots up to its own.
        self._hidden = (torch.arange(num_slots, device=self._places.device) > self._places[:, None])[None]

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        for rows, new in zip(self._cache.slots(layer), (k, v), strict=True):
            rows.index_copy_(1, self._places, new)

    def segments(self, layer: int) -> Iterator[Segment]:
        if (summaries := self._cache.summaries(layer)) is not None:
            yield summaries
        k, v = self._cache.slots(layer)
        yield Segment(k, v, hidden=self._hidden)

    def end(self) -> None: ...
    def abort(self) -> None: ...
