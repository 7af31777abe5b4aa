"""Tensors to raw frames and back, for processes that compute with them."""

from __future__ import annotations

import torch

from workers.process.channel import RawTensor


def to_raw(tensor: torch.Tensor) -> RawTensor:
    """The bytes of a tensor, in this process's memory: its own where it is contiguous on the CPU already."""
    flat = tensor.detach().cpu().contiguous()
    return RawTensor(str(flat.dtype).removeprefix("torch."), list(flat.shape), flat.flatten().view(torch.uint8).numpy())


def from_raw(raw: RawTensor) -> torch.Tensor:
    """A tensor of its own on the CPU. Raises ValueError where bytes and shape disagree."""
    dtype = getattr(torch, raw.dtype)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{raw.dtype!r} is no tensor type")
    if 0 in raw.shape:
        return torch.empty(raw.shape, dtype=dtype)  # frombuffer takes no empty buffer
    return torch.frombuffer(bytearray(raw.data), dtype=dtype).view(raw.shape)
