"""The host tier: page-locked memory for copies at link speed, exact in size. The only importer of cupy.

torch's pinned allocator and cupy's pool round sizes up to a power of two; `cupy.cuda.PinnedMemory` does not. Without
CUDA the same tier is plain memory.
"""

from __future__ import annotations

import math

import torch

from tiers.base import BlockShape
from tiers.checksum import CheckedBlock, checksum
from tiers.errors import DamagedBlockError, OutOfTierMemoryError


class PinnedHostTier:
    """Allocates host memory, page-locked if `pin`, and keeps count. With `checksums`, blocks are checked when read."""

    def __init__(self, *, pin: bool, checksums: bool = False):
        self.name, self.pin, self.checksums = "host", pin, checksums
        self.num_damaged = 0
        self.used_bytes = self.peak_bytes = 0

    def allocate(self, *size: int, dtype: torch.dtype) -> torch.Tensor:
        """See tiers.base.Tier."""
        num_bytes = math.prod(size) * dtype.itemsize
        try:
            if self.pin and num_bytes:
                tensor = self._pinned(num_bytes, dtype).view(size)
            else:
                tensor = torch.empty(size, dtype=dtype)
        except (RuntimeError, MemoryError) as error:
            gib = num_bytes / 2**30
            raise OutOfTierMemoryError(
                f"the host tier cannot give {gib:.2f} GiB, pinned={self.pin}: {error}"
            ) from error
        self.used_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        return tensor

    def blocks(self, shape: BlockShape, count: int) -> HostBlocks:
        """Room for `count` blocks of `shape`. Raises OutOfTierMemoryError."""
        memory = self.allocate(count, *shape.size, dtype=shape.dtype)
        return CheckedHostBlocks(shape, memory, self) if self.checksums else HostBlocks(shape, memory)

    def _pinned(self, num_bytes: int, dtype: torch.dtype) -> torch.Tensor:
        import cupy

        # The tensor keeps the pointer alive, and it the memory: frombuffer holds a reference to its buffer.
        pointer = cupy.cuda.PinnedMemoryPointer(cupy.cuda.PinnedMemory(num_bytes), 0)
        return torch.frombuffer(pointer, dtype=dtype, count=num_bytes // dtype.itemsize)

    def free(self, tensor: torch.Tensor) -> None:
        """The memory itself goes with the last reference."""
        self.used_bytes -= tensor.nbytes


class HostBlocks:
    """The blocks of one layer, one after another; see tiers.base.BlockStore."""

    def __init__(self, shape: BlockShape, memory: torch.Tensor):
        self.shape, self._memory = shape, memory

    def write(self, index: int, rows: torch.Tensor) -> None:
        self._memory[index].copy_(rows, non_blocking=True)

    def source(self, index: int) -> torch.Tensor:
        return self._memory[index]

    def read(self, index: int, begin: int, end: int) -> torch.Tensor:
        return self._memory[index][:, :, begin:end]

    def gather(self, heads: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        block, offset = tokens // self.shape.num_tokens, tokens % self.shape.num_tokens
        return torch.stack([self._memory[block, side, heads, offset] for side in (0, 1)])


class CheckedHostBlocks(HostBlocks):
    """Holds each block it reads against the checksum of its newest write: to find faulty memory, or a bug."""

    def __init__(self, shape: BlockShape, memory: torch.Tensor, tier: PinnedHostTier):
        super().__init__(shape, memory)
        self._tier, self._checksums = tier, [None] * len(memory)

    def write(self, index: int, rows: torch.Tensor) -> None:
        self._memory[index].copy_(rows)
        self._checksums[index] = checksum(self._memory[index])

    def source(self, index: int) -> CheckedBlock:
        return CheckedBlock(self, index)

    def read(self, index: int, begin: int, end: int) -> torch.Tensor:
        self.check(index, self._memory[index])
        return super().read(index, begin, end)

    def gather(self, heads: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        for index in (tokens // self.shape.num_tokens).unique().tolist():
            self.check(index, self._memory[index])
        return super().gather(heads, tokens)

    def read_into(self, index: int, buffer: torch.Tensor) -> None:
        """Copies block `index` to `buffer`, on the host, and checks the copy. Raises DamagedBlockError."""
        buffer.copy_(self._memory[index])
        self.check(index, buffer)

    def check(self, index: int, block: torch.Tensor) -> None:
        """Raises DamagedBlockError."""
        if checksum(block) != self._checksums[index]:
            self._tier.num_damaged += 1
            raise DamagedBlockError(
                f"block {index} of {len(self._memory)} in host memory has another checksum than what was written"
            )


def can_pin() -> bool:
    """Whether page-locked memory can be had: CUDA works and cupy is installed."""
    if not torch.cuda.is_available():
        return False
    try:
        import cupy  # noqa: F401
    except ImportError:
        return False
    return True
