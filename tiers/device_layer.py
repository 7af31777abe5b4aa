"""One layer of a cache whose keys and values are all on the device."""

from __future__ import annotations

import torch

from tiers.base import CacheShape, Segment, Tier, gather_chunks, padded


class DeviceLayer:
    """Keys and values of one layer on the device: one segment [H, capacity, D] each, padded."""

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
