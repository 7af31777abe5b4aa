"""The disk tier: blocks of keys and values in files without a name, read past the system's page cache.

A file has no name (or loses it at once, where the file system knows no nameless ones): the system frees its space when
the process ends, however it ends, so that no run leaves files behind and no run finds another's.

The checksum of each block's newest write stays in memory. A block that was damaged, cut short, or is a stale one
because a write was lost, does not have it: `DamagedBlockError`, and none of its bytes is used.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from tiers.base import PAGE_BYTES, BlockShape, padded_to_pages, page_aligned
from tiers.checksum import CheckedBlock, checksum
from tiers.errors import DamagedBlockError, OutOfTierMemoryError

MEASURED_BYTES = 64 << 20
"""Bytes read to measure a number of readers."""
NUMS_OF_READERS = (1, 2, 4, 8, 16)
WORTH_MORE_READERS = 1.15
"""Speed-up that is worth twice as many readers."""
NO_NAMELESS_FILES = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL)
"""Errors of file systems that know no nameless files."""


class DiskTier:
    """Files in `folder`; keeps count of their bytes and of damaged blocks.

    `is_direct`: whether all of them are read past the page cache.
    """

    def __init__(self, folder: Path | str):
        self.name, self.folder = "disk", Path(folder)
        self.used_bytes = self.peak_bytes = 0
        self.num_damaged = 0
        self.is_direct = True
        self._files: list[int] = []
        self._own = threading.local()

    def blocks(self, shape: BlockShape, count: int) -> DiskBlocks:
        """Room for `count` blocks of `shape`. Raises OutOfTierMemoryError."""
        num_bytes = count * padded_to_pages(shape.num_bytes)
        try:
            file = self._open()
            self._files.append(file)
            if num_bytes:
                _reserve(file, num_bytes)
        except OSError as error:
            gib = num_bytes / 2**30
            raise OutOfTierMemoryError(
                f"the disk tier cannot give {gib:.2f} GiB in {self.folder}: {error.strerror}"
            ) from error
        self.used_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        return DiskBlocks(self, file, shape, count)

    def _open(self) -> int:
        """A file without a name, for direct reads if the file system has them."""
        direct = getattr(os, "O_DIRECT", 0)
        for flags in (direct, 0) if direct else (0,):
            try:
                file = self._open_nameless(flags)
            except OSError as error:
                if error.errno != errno.EINVAL or not flags:
                    raise
            else:
                self.is_direct &= bool(flags)
                return file
        raise AssertionError("unreachable: the last flags either open or raise")

    def _open_nameless(self, flags: int) -> int:
        if hasattr(os, "O_TMPFILE"):
            try:
                return os.open(self.folder, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC | flags, 0o600)
            except OSError as error:
                if error.errno not in NO_NAMELESS_FILES or not self.folder.is_dir():
                    raise
        file, path = tempfile.mkstemp(prefix="tierforce-", suffix=".kv", dir=self.folder)
        os.unlink(path)
        if flags:
            import fcntl

            try:
                fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) | flags)
            except OSError:
                os.close(file)
                raise
        return file

    def page_buffer(self, num_bytes: int) -> torch.Tensor:
        """Buffer of this thread, for one block at a time: blocks of all layers have the same size."""
        pages = getattr(self._own, "pages", None)
        if pages is None or len(pages) != num_bytes:
            pages = self._own.pages = page_aligned(num_bytes).zero_()
        return pages

    def close(self) -> None:
        """Gives the space of all files back."""
        for file in self._files:
            with contextlib.suppress(OSError):
                os.close(file)
        self._files.clear()
        self.used_bytes = 0


def _reserve(file: int, num_bytes: int) -> None:
    """Takes space that cannot be missing later; where the file system reserves none, only sets the file's length."""
    try:
        os.posix_fallocate(file, 0, num_bytes)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        os.ftruncate(file, num_bytes)


class DiskBlocks:
    """The blocks of one layer in one file; a tiers.base.BlockStore. Threads may read and write different blocks.

    `file` is the file's descriptor, for whoever reads the same bytes without this class: one block after another, each
    of whole pages.
    """

    def __init__(self, tier: DiskTier, file: int, shape: BlockShape, count: int):
        self.shape = shape
        self.file = file
        self._tier = tier
        self._checksums: list[int | None] = [None] * count

    def write(self, index: int, rows: torch.Tensor) -> None:
        """Stores `rows` [2, H, B, D] as block `index`. Raises OSError where the disk is full after all."""
        page_buffer = self._page_buffer()
        block = self._as_block(page_buffer)
        block.copy_(rows)
        data = page_buffer.numpy().data
        self._checksums[index] = None
        at = 0
        while at < len(data):
            at += os.pwrite(self.file, data[at:], index * len(data) + at)
        self._checksums[index] = checksum(block)

    def source(self, index: int) -> CheckedBlock:
        return CheckedBlock(self, index)

    def read_into(self, index: int, buffer: torch.Tensor) -> None:
        """Fills `buffer`, contiguous and of the block's size, on the host. Raises DamagedBlockError."""
        fits = buffer.data_ptr() % PAGE_BYTES == 0 and buffer.nbytes % PAGE_BYTES == 0
        pages = buffer.view(-1).view(torch.uint8) if fits else self._page_buffer()
        data = pages.numpy().data
        at = 0
        while at < len(data):
            try:
                count = os.preadv(self.file, [data[at:]], index * len(data) + at)
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                raise self._damaged(index, f"cannot be read ({error.strerror})") from error
            if not count:
                raise self._damaged(index, f"ends after {at} of {len(data)} bytes")
            at += count
        block = self._as_block(pages)
        if checksum(block) != self._checksums[index]:
            raise self._damaged(index, "has another checksum than what was written")
        if not fits:
            buffer.copy_(block)

    def read(self, index: int, begin: int, end: int) -> torch.Tensor:
        """Reads the whole block, which alone has a checksum; returns the tokens `begin` to `end`. See BlockStore."""
        block = self._read_block(index)
        return block[:, :, begin:end].clone()

    def gather(self, heads: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Reads each block that has one of the tokens, once. See BlockStore."""
        size = self.shape.num_tokens
        rows = torch.empty(2, len(tokens), self.shape.head_dim, dtype=self.shape.dtype)
        which = tokens // size
        for index in torch.unique(which).tolist():
            chosen = which == index
            block = self._read_block(index)
            rows[:, chosen] = block[:, heads[chosen], tokens[chosen] - index * size]
        return rows

    def check(self, index: int) -> None:
        """Reads a block as `read_into` does, to this thread's memory. Raises DamagedBlockError."""
        self._read_block(index)

    def _read_block(self, index: int) -> torch.Tensor:
        """Block `index` in this thread's buffer, valid until its next use. Raises DamagedBlockError."""
        block = self._as_block(self._page_buffer())
        self.read_into(index, block)
        return block

    def _page_buffer(self) -> torch.Tensor:
        """Buffer of this thread, with whole pages for one block."""
        return self._tier.page_buffer(padded_to_pages(self.shape.num_bytes))

    def _as_block(self, pages: torch.Tensor) -> torch.Tensor:
        """The block [2, H, B, D] in the bytes of whole pages."""
        return pages[: self.shape.num_bytes].view(self.shape.dtype).view(self.shape.size)

    def _damaged(self, index: int, what: str) -> DamagedBlockError:
        """Counts a damaged block; returns the error that says what is wrong with it."""
        self._tier.num_damaged += 1
        return DamagedBlockError(f"block {index} of {len(self._checksums)} in {self._tier.folder} {what}")


def best_num_readers(folder: Path | str, shape: BlockShape, most: int) -> tuple[int, float]:
    """Number of reads in flight that a disk wants for blocks of `shape`, at `most`, and the GB/s it then gives.

    Writes some blocks to `folder` and reads them by ever more threads, as long as that is a good deal faster: where the
    disk is as fast with fewer, they leave the processor to attention. Raises OutOfTierMemoryError.
    """
    count = max(NUMS_OF_READERS[-1], MEASURED_BYTES // shape.num_bytes)
    tier = DiskTier(folder)
    try:
        blocks = tier.blocks(shape, count)
        rows = torch.zeros(shape.size, dtype=shape.dtype)
        for index in range(count):
            blocks.write(index, rows)
        best, best_seconds = 0, float("inf")
        for num_readers in (number for number in NUMS_OF_READERS if number <= most):
            with ThreadPoolExecutor(num_readers) as threads:
                list(threads.map(blocks.check, range(min(num_readers, count))))  # starts the threads
                began = time.perf_counter()
                list(threads.map(blocks.check, range(count)))
                seconds = time.perf_counter() - began
            if seconds > best_seconds / WORTH_MORE_READERS:
                break
            best, best_seconds = num_readers, seconds
    finally:
        tier.close()
    return best, count * shape.num_bytes / best_seconds / 1e9
