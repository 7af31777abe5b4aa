"""The device tier: memory of the compute device. On a machine without a GPU that is ordinary memory."""

from __future__ import annotations

import math

import torch

from tiers.base import page_aligned
from tiers.errors import OutOfTierMemoryError


class DeviceTier:
    """A tiers.base.Tier of memory on `device`."""

    def __init__(self, device: torch.device):
        self.name, self.device = "device", device
        self.used_bytes = self.peak_bytes = 0

    def allocate(self, *size: int, dtype: torch.dtype) -> torch.Tensor:
        """A tensor on the device; on a CPU it begins at a page. Raises OutOfTierMemoryError."""
        try:
            if self.device.type == "cpu":
                tensor = page_aligned(math.prod(size) * dtype.itemsize).view(dtype).view(size)
            else:
                tensor = torch.empty(size, dtype=dtype, device=self.device)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            raise OutOfTierMemoryError(f"the device tier cannot give a tensor of {size} {dtype}: {error}") from error
        self.used_bytes += tensor.nbytes
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        return tensor

    def free(self, tensor: torch.Tensor) -> None:
        """Counts the tensor's bytes as given back; the memory itself goes with the last reference."""
        self.used_bytes -= tensor.nbytes
