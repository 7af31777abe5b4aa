"""Blocks that are held against a checksum when they are read: xxh3, faster than memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import xxhash


def checksum(block: torch.Tensor) -> int:
    """Of the bytes of a contiguous tensor on the host, 64 bits."""
    return xxhash.xxh3_64_intdigest(memoryview(block.view(-1).view(torch.uint8).numpy()))


@dataclass(slots=True)
class CheckedBlock:
    """One block of a store, to be streamed; see tiers.transfer.StoredBlock."""

    blocks: Any
    index: int

    @property
    def nbytes(self) -> int:
        return self.blocks.shape.num_bytes

    def read_into(self, buffer: torch.Tensor) -> None:
        self.blocks.read_into(self.index, buffer)
