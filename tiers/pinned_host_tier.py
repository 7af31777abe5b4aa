"""The host tier: page-locked memory for copies at link speed, exact in size. The only importer of cupy.

torch's pinned allocator and cupy's pool round sizes up to a power of two; `cupy.cuda.PinnedMemory` does not. Without
CUDA the same tier is plain memory.
"""

from __future__ import annotations

import math

import torch

from tiers.base import OutOfTierMemoryError


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

    def _pinned(self, num_bytes: int, dtype: torch.dtype) -> torch.Tensor:
        import cupy

        # The tensor keeps the pointer alive, and it the memory: frombuffer holds a reference to its buffer.
        pointer = cupy.cuda.PinnedMemoryPointer(cupy.cuda.PinnedMemory(num_bytes), 0)
        return torch.frombuffer(pointer, dtype=dtype, count=num_bytes // dtype.itemsize)

    def free(self, tensor: torch.Tensor) -> None:
        """The memory itself goes with the last reference."""
        self.used_bytes -= tensor.nbytes


def can_pin() -> bool:
    """Whether page-locked memory can be had: CUDA works and cupy is installed."""
    if not torch.cuda.is_available():
        return False
    try:
        import cupy  # noqa: F401
    except ImportError:
        return False
    return True
