"""Blocks that are held against a checksum when they are read: xxh3, faster than memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import xxhash

from tiers.base import BlockShape


def checksum(block: torch.Tensor) -> int:
    """Checksum, of 64 bits, of the bytes of a contiguous tensor on the host."""
    return xxhash.xxh3_64_intdigest(block.view(-1).view(torch.uint8).numpy().data)


class CheckedBlocks(Protocol):
    """Blocks of one shape, each of which is checked as it is read."""

    shape: BlockShape

    def read_into(self, index: int, buffer: torch.Tensor) -> None:
        """Copies block `index` to `buffer`, on the host. Raises DamagedBlockError."""


@dataclass(slots=True)
class CheckedBlock:
    """One block of a store, to be streamed; a tiers.base.BlockSource."""

    blocks: CheckedBlocks
    index: int

    @property
    def memory(self) -> None:
        """None: wherever the block is, it is checked on its way."""

    @property
    def nbytes(self) -> int:
        """Bytes of the block's keys and values."""
        return self.blocks.shape.num_bytes

    def read_into(self, buffer: torch.Tensor) -> None:
        """Fills `buffer`, on the host. Raises DamagedBlockError."""
        self.blocks.read_into(self.index, buffer)
