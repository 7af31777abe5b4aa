"""Memory that several processes of one machine have in common, and that nobody can leave behind.

On the CPU it is a file without a name (memfd): others map it through the maker's /proc entry, and it is gone with the
last process that has it. It is not in /dev/shm, so a small one (64 MB in a Docker container) does not limit it. On a
GPU the driver's handle (CUDA IPC) stands for it; there the maker must outlive the others.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch

from tiers.errors import OutOfTierMemoryError

ALIGNMENT = 512
"""Bytes of which the start of each tensor is a multiple."""


class SharedArena:
    """A tier (see tiers.base.Tier) of `num_bytes` on `device`, cut into tensors one after another."""

    def __init__(self, num_bytes: int, device: torch.device):
        self.name = "device"
        self.used_bytes = self.peak_bytes = 0
        self._file: int | None = None
        if device.type == "cuda":
            self._bytes = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        else:
            self._bytes = self._mapped(num_bytes)
        self._places: list[dict[str, Any]] = []

    def _mapped(self, num_bytes: int) -> torch.Tensor:
        self._file = os.memfd_create("tierforce")
        try:
            # Reserved now: a page that is missing later would be a SIGBUS in the middle of a computation.
            os.posix_fallocate(self._file, 0, max(1, num_bytes))
            return _map(f"/proc/self/fd/{self._file}", num_bytes)
        except (OSError, RuntimeError) as error:
            os.close(self._file)
            raise OutOfTierMemoryError(
                f"shared memory of {num_bytes / 2**30:.2f} GiB cannot be had: {error}"
            ) from error

    def allocate(self, *size: int, dtype: torch.dtype) -> torch.Tensor:
        """The next tensor of the arena. Raises OutOfTierMemoryError where the arena was made too small."""
        num_bytes = math.prod(size) * dtype.itemsize
        start = -(-self.used_bytes // ALIGNMENT) * ALIGNMENT
        if start + num_bytes > self._bytes.numel():
            raise OutOfTierMemoryError(f"the shared arena has {self._bytes.numel()} bytes, needed {start + num_bytes}")
        self.used_bytes = self.peak_bytes = start + num_bytes
        self._places.append({"start": start, "size": list(size), "dtype": str(dtype).removeprefix("torch.")})
        return self._bytes[start : start + num_bytes].view(dtype).view(size)

    def free(self, tensor: torch.Tensor) -> None:
        """Does nothing: all tensors of an arena go together."""

    def description(self) -> dict[str, Any]:
        """All that `attached` needs in another process of this machine, of JSON types and bytes."""
        memory: dict[str, Any] = {"num_bytes": self._bytes.numel()}
        if self._file is None:
            memory["cuda"] = _shared_handle(self._bytes)
        else:
            memory |= {"pid": os.getpid(), "file": self._file}
        return {"memory": memory, "places": self._places}


def arena_bytes(*num_bytes: int) -> int:
    """Bytes that tensors of `num_bytes` each take together in an arena."""
    return sum(-(-count // ALIGNMENT) * ALIGNMENT for count in num_bytes)


def attached(description: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors of another process's arena, in the order they were allocated; the same memory, no copy."""
    memory = description["memory"]
    if "cuda" in memory:
        storage = _storage_of(memory["cuda"])
        flat = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)[: memory["num_bytes"]]
    else:
        flat = _map(f"/proc/{memory['pid']}/fd/{memory['file']}", memory["num_bytes"])
    tensors = []
    for place in description["places"]:
        dtype = getattr(torch, place["dtype"])
        end = place["start"] + math.prod(place["size"]) * dtype.itemsize
        tensors.append(flat[place["start"] : end].view(dtype).view(place["size"]))
    return tensors


def cuda_handle(tensor: torch.Tensor) -> dict[str, Any]:
    """All that `from_cuda_handle` needs in another process for this tensor of a GPU, of JSON types and bytes."""
    return {
        "storage": _shared_handle(tensor),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "size": list(tensor.shape),
        "stride": list(tensor.stride()),
        "offset": tensor.storage_offset(),
    }


def from_cuda_handle(handle: dict[str, Any]) -> torch.Tensor:
    """The tensor that `cuda_handle` told of, in the same memory."""
    storage = _storage_of(handle["storage"])
    empty = torch.empty(0, dtype=getattr(torch, handle["dtype"]), device=storage.device)
    return empty.set_(storage, handle["offset"], handle["size"], handle["stride"])


def _shared_handle(tensor: torch.Tensor) -> list[Any]:
    """Handle by which `_storage_of` has the memory of this tensor of a GPU in another process."""
    return list(tensor.untyped_storage()._share_cuda_())  # type: ignore[no-untyped-call]  # torch has no types for it


def _storage_of(handle: list[Any]) -> torch.UntypedStorage:
    """The memory that `_shared_handle` told of, in this process."""
    torch.cuda.init()  # type: ignore[no-untyped-call]  # torch has no types for it
    return torch.UntypedStorage._new_shared_cuda(*handle)


class AttachedPart:
    """A tier whose tensors are those of another process's arena, in the order they were allocated there.

    A tensor asked for with fewer heads than there are is the part from head `first_head` on: the one dimension in which
    the two sizes differ. So a rank of a verifier writes its own heads into a cache that has all of them.
    """

    def __init__(self, description: dict[str, Any], first_head: int):
        self.name = "device"
        self.used_bytes = self.peak_bytes = 0
        self._tensors, self._first_head = iter(attached(description)), first_head

    def allocate(self, *size: int, dtype: torch.dtype) -> torch.Tensor:
        """The next tensor of the arena, or the part of it that has `size`."""
        whole = next(self._tensors)
        differing = [dim for dim, (ours, theirs) in enumerate(zip(size, whole.shape, strict=True)) if ours != theirs]
        assert len(differing) <= 1 and whole.dtype == dtype, f"{size} {dtype} is no part of {whole.shape} {whole.dtype}"
        return whole.narrow(differing[0], self._first_head, size[differing[0]]) if differing else whole

    def free(self, tensor: torch.Tensor) -> None:
        """Does nothing: the memory is its maker's."""


def _map(path: str, num_bytes: int) -> torch.Tensor:
    """Bytes of the file `path`, shared with all who map it."""
    return torch.from_file(path, shared=True, size=num_bytes, dtype=torch.uint8)
