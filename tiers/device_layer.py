"""One layer of a cache whose keys and values are all on the device."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tiers.base import BlockSource, CacheShape, Segment, Tier, gather_chunks, oldest_seen, padded
from tiers.block_writer import BlockWriter
from tiers.collection import Collection
from tiers.transfer import BlockStreamer


class DeviceLayer:
    """Keys and values of one layer on the device: one segment [H, capacity, D] each, padded.

    In the full cache it is a tiers.full_cache.CacheLayer.
    """

    is_in_blocks = False

    def __init__(self, shape: CacheShape, capacity: int, tier: Tier):
        self.kv = tier.allocate(2, shape.num_kv_heads, padded(capacity), shape.head_dim, dtype=shape.dtype).zero_()

    def append(self, length: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Writes keys and values [H, T, D] behind the first `length` tokens."""
        end = length + k.shape[1]
        assert end <= self.kv.shape[2], f"{length} + {k.shape[1]} tokens exceed the capacity {self.kv.shape[2]}"
        self.kv[0, :, length:end] = k
        self.kv[1, :, length:end] = v

    def read(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [H, end - start, D] of these tokens; views."""
        return self.kv[0, :, start:end], self.kv[1, :, start:end]

    def segment(self, start: int, end: int, num_new: int) -> Segment:
        """Tokens `start` to `end`, of which the last `num_new` are new, and padding."""
        stop = min(start + padded(end - start), self.kv.shape[2])
        k, v = self.read(start, stop)
        return Segment(k, v, start=start, num_new=num_new, num_pad=stop - end)

    def gather(self, chunk_ids: torch.Tensor, chunk_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [H, m * chunk_size, D] of the chunks `chunk_ids` [H, m]."""
        k, v = (gather_chunks(rows, chunk_ids, chunk_size) for rows in self.kv)
        return k, v

    def truncate(self, length: int) -> None:
        """Does nothing: what is behind the first `length` tokens is written over."""

    def stream_sources(self, first_seen: int) -> list[BlockSource]:
        """No sources: nothing is streamed."""
        return []

    def segments(
        self, first_seen: int, end: int, num_new: int, streamer: BlockStreamer | None, collection: Collection | None
    ) -> Iterator[Segment]:
        """Yields one segment of all tokens from `first_seen` on."""
        yield self.segment(first_seen, end, num_new)

    def collection(self, chunk_ids: torch.Tensor, chunk_size: int, out: torch.Tensor) -> None:
        """None: no blocks pass; `gather` gives the chunks at any time."""

    def prefill(self, window: int | None, space: DeviceLayer | None, writer: BlockWriter | None) -> LayerPrefill:
        """The cache that pieces of a prompt are read into: this layer itself."""
        return LayerPrefill(self, window)


class LayerPrefill:
    """A layer's keys and values while the pieces of a prompt pass through it; a tiers.base.PassCache.

    `space` holds all of them. `window` is the layer's sliding window in tokens, or None.
    """

    def __init__(self, space: DeviceLayer, window: int | None):
        self._space, self._window = space, window
        self.length = self._num_new = 0

    def begin(self, num_new: int) -> None:
        self._num_new = num_new

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        self._space.append(self.length, k, v)

    def segments(self, layer: int) -> Iterator[Segment]:
        first = oldest_seen(self.length, self._window)
        yield self._space.segment(first, self.length + self._num_new, self._num_new)

    def end(self) -> None:
        self.length += self._num_new

    def abort(self) -> None:
        """Does nothing: a prompt that could not be read leaves the whole cache to be reset."""

    def finish(self) -> None:
        """Ends the layer, all pieces of whose prompt were read: `space` may be used again."""
