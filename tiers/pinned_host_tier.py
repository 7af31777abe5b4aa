"""The host tier: page-locked memory for copies at link speed, exact in size. The only importer of cupy.

torch's pinned allocator and cupy's pool round sizes up to a power of two; a mapping of our own, which CUDA is told to
lock, has the size asked for. Locking takes a second for some GiB, nearly all of it for finding the pages, so blocks are
locked in pieces, several at a time. No copy may reach from one piece into the next: a piece is whole blocks.

Without CUDA the same tier is plain memory.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress

import torch

from tiers.base import PAGE_BYTES, BlockInMemory, BlockShape, BlockSource
from tiers.checksum import CheckedBlock, checksum
from tiers.errors import DamagedBlockError, OutOfTierMemoryError

PIECE_BYTES = 256 << 20
"""Bytes locked together, at most, if blocks are not larger."""
LOCKING_THREADS = 8


class PinnedHostTier:
    """A tiers.base.Tier of host memory, page-locked if `pin`. With `checksums`, blocks are checked when read.

    `on_locked(num_bytes)` is called as memory is locked, with the bytes of all that was so far.
    """

    def __init__(
        self, *, pin: bool, checksums: bool = False, on_locked: Callable[[int], None] = lambda num_bytes: None
    ):
        self.name, self.pin, self.checksums, self._on_locked = "host", pin, checksums, on_locked
        self._locked_bytes = 0
        self.num_damaged = 0
        self.used_bytes = self.peak_bytes = 0

    def allocate(self, *size: int, dtype: torch.dtype) -> torch.Tensor:
        """A tensor in one piece. Raises OutOfTierMemoryError."""
        return self._allocate(size, dtype, math.prod(size) * dtype.itemsize)

    def _allocate(self, size: tuple[int, ...], dtype: torch.dtype, piece_bytes: int) -> torch.Tensor:
        num_bytes = math.prod(size) * dtype.itemsize
        try:
            if self.pin and num_bytes:
                memory = _LockedMemory(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                for locked_bytes in memory.lock(piece_bytes):
                    self._locked_bytes += locked_bytes
                    self._on_locked(self._locked_bytes)
                # The tensor keeps the mapping: frombuffer holds a reference to its buffer.
                tensor = torch.frombuffer(memory, dtype=dtype, count=math.prod(size)).view(size)
            else:
                tensor = torch.empty(size, dtype=dtype)
        except (RuntimeError, MemoryError, OSError) as error:
            gib = num_bytes / 2**30
            raise OutOfTierMemoryError(
                f"the host tier cannot give {gib:.2f} GiB, pinned={self.pin}: {error}"
            ) from error
        self.used_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        return tensor

    def blocks(self, shape: BlockShape, count: int) -> HostBlocks:
        """Room for `count` blocks of `shape`. Raises OutOfTierMemoryError."""
        whole_pages = math.lcm(shape.num_bytes, PAGE_BYTES)
        piece_bytes = max(1, PIECE_BYTES // whole_pages) * whole_pages
        memory = self._allocate((count, *shape.size), shape.dtype, piece_bytes)
        return CheckedHostBlocks(shape, memory, self) if self.checksums else HostBlocks(shape, memory)

    def free(self, tensor: torch.Tensor) -> None:
        """Counts the tensor's bytes as given back; the memory itself goes with the last reference."""
        self.used_bytes -= tensor.nbytes


class _LockedMemory(mmap.mmap):
    """Memory that CUDA knows to be locked, until it is given back."""

    _unlock: Callable[[int], None] | None = None
    _locked: list[int]
    """Addresses of the pieces that are locked."""

    def lock(self, piece_bytes: int) -> Iterator[int]:
        """Locks pieces of `piece_bytes` each; yields the bytes of each when it is done. Raises RuntimeError."""
        from cupy.cuda import runtime

        address = ctypes.addressof(ctypes.c_char.from_buffer(self))
        self._unlock, self._locked = runtime.hostUnregister, []

        def lock_piece(start: int) -> int:
            num_bytes = min(piece_bytes, len(self) - start)
            ctypes.memset(address + start, 0, num_bytes)  # finds the pages, which several threads do faster than CUDA
            runtime.hostRegister(address + start, num_bytes, 0)
            self._locked.append(address + start)
            return num_bytes

        with ThreadPoolExecutor(LOCKING_THREADS) as threads:
            for piece in as_completed([threads.submit(lock_piece, at) for at in range(0, len(self), piece_bytes)]):
                yield piece.result()

    def __del__(self) -> None:
        if self._unlock is not None:
            for address in self._locked:
                with suppress(RuntimeError):  # where the program ends, CUDA may have ended before
                    self._unlock(address)


class HostBlocks:
    """The blocks of one layer, one after another; a tiers.base.BlockStore."""

    def __init__(self, shape: BlockShape, memory: torch.Tensor):
        self.shape, self._memory = shape, memory

    def write(self, index: int, rows: torch.Tensor) -> None:
        self._memory[index].copy_(rows, non_blocking=True)

    def source(self, index: int) -> BlockSource:
        return BlockInMemory(self._memory[index])

    def read(self, index: int, begin: int, end: int) -> torch.Tensor:
        return self._memory[index][:, :, begin:end]

    def gather(self, heads: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        block, offset = tokens // self.shape.num_tokens, tokens % self.shape.num_tokens
        return torch.stack([self._memory[block, side, heads, offset] for side in (0, 1)])


class CheckedHostBlocks(HostBlocks):
    """Holds each block it reads against the checksum of its newest write: to find faulty memory, or a bug."""

    def __init__(self, shape: BlockShape, memory: torch.Tensor, tier: PinnedHostTier):
        super().__init__(shape, memory)
        self._tier = tier
        self._checksums: list[int | None] = [None] * len(memory)

    def write(self, index: int, rows: torch.Tensor) -> None:
        self._memory[index].copy_(rows)
        self._checksums[index] = checksum(self._memory[index])

    def source(self, index: int) -> BlockSource:
        return CheckedBlock(self, index)

    def read(self, index: int, begin: int, end: int) -> torch.Tensor:
        self.check(index, self._memory[index])
        return super().read(index, begin, end)

    def gather(self, heads: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        for index in torch.unique(tokens // self.shape.num_tokens).tolist():
            self.check(index, self._memory[index])
        return super().gather(heads, tokens)

    def read_into(self, index: int, buffer: torch.Tensor) -> None:
        """Copies block `index` to `buffer`, on the host, and checks the copy. Raises DamagedBlockError."""
        buffer.copy_(self._memory[index])
        self.check(index, buffer)

    def check(self, index: int, block: torch.Tensor) -> None:
        """Holds `block`, on the host, against the checksum of block `index`. Raises DamagedBlockError."""
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
