"""The host tier: page-locked memory for copies at link speed, exact in size. The only importer of cupy.

torch's pinned allocator and cupy's pool round sizes up to a power of two; `cupy.cuda.PinnedMemory` does not. Without
CUDA the same tier is plain memory.
"""

from __future__ import annotations

import math

import torch

from tiers.base import BlockShape
from tiers.errors import OutOfTierMemoryError


class PinnedHostTier:
    """Allocates host memory, page-locked if `pin`, and keeps count."""

    def __init__(self, *, pin: bool):
        self.name, self.pin = "host", pin
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
        return HostBlocks(shape, self.allocate(count, *shape.size, dtype=shape.dtype))

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


def can_pin() -> bool:
    """Whether page-locked memory can be had: CUDA works and cupy is installed."""
    if not torch.cuda.is_available():
        return False
    try:
        import cupy  # noqa: F401
    except ImportError:
        return False
    return True
