"""Blocks on disk come back bit for bit, or not at all: damage is found, counted and never used."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tiers.base import PAGE_BYTES, BlockShape, page_aligned
from tiers.disk_tier import DiskBlocks, DiskTier, best_num_readers
from tiers.errors import DamagedBlockError, OutOfTierMemoryError

# Of whole pages, and of a part of one.
SHAPES = {
    "pages": BlockShape(num_kv_heads=2, num_tokens=64, head_dim=16, dtype=torch.float32),
    "bytes": BlockShape(num_kv_heads=3, num_tokens=5, head_dim=7, dtype=torch.bfloat16),
}
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
NUM_BLOCKS = 6


@pytest.fixture
def tier(tmp_path) -> Iterator[DiskTier]:
    tier = DiskTier(tmp_path)
    yield tier
    tier.close()


def rows_of(shape: BlockShape, index: int) -> torch.Tensor:
    """A block's content; for each index another."""
    return torch.randn(shape.size, generator=torch.Generator().manual_seed(index)).to(shape.dtype)


def filled(tier: DiskTier, shape: BlockShape) -> DiskBlocks:
    blocks = tier.blocks(shape, NUM_BLOCKS)
    for index in range(NUM_BLOCKS):
        blocks.write(index, rows_of(shape, index))
    return blocks


def buffer_for(shape: BlockShape) -> torch.Tensor:
    return page_aligned(shape.num_bytes).view(shape.dtype).view(shape.size).fill_(7)


@EVERY_SHAPE
def test_blocks_come_back_bit_for_bit(tier, shape):
    blocks = filled(tier, shape)
    for index in (3, 0, 5, 3):
        for buffer in (buffer_for(shape), torch.empty(shape.num_bytes + 64, dtype=torch.uint8)[64:]):
            buffer = buffer.view(shape.dtype).view(shape.size)
            source = blocks.source(index)
            assert source.nbytes == shape.num_bytes
            source.read_into(buffer)
            assert torch.equal(buffer, rows_of(shape, index))
        assert torch.equal(blocks.read(index, 1, 4), rows_of(shape, index)[:, :, 1:4])
    assert tier.num_damaged == 0


@EVERY_SHAPE
def test_a_view_of_larger_rows_is_written_as_it_looks(tier, shape):
    blocks = tier.blocks(shape, 1)
    wide = torch.randn(2, shape.num_kv_heads, 3 * shape.num_tokens, shape.head_dim).to(shape.dtype)
    rows = wide[:, :, shape.num_tokens : 2 * shape.num_tokens]
    blocks.write(0, rows)
    assert torch.equal(blocks.read(0, 0, shape.num_tokens), rows)


@EVERY_SHAPE
def test_tokens_are_gathered_from_any_blocks_for_each_head(tier, shape):
    blocks = filled(tier, shape)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, NUM_BLOCKS * shape.num_tokens, (40,), generator=generator)
    heads = torch.randint(0, shape.num_kv_heads, (40,), generator=generator)
    got = blocks.gather(heads, tokens)
    for at, (head, token) in enumerate(zip(heads.tolist(), tokens.tolist(), strict=True)):
        index, offset = divmod(token, shape.num_tokens)
        assert torch.equal(got[:, at], rows_of(shape, index)[:, head, offset])
    assert blocks.gather(heads[:0], tokens[:0]).shape == (2, 0, shape.head_dim)


@EVERY_SHAPE
def test_threads_may_write_and_read_different_blocks_at_once(tier, shape):
    blocks = tier.blocks(shape, 40)

    def write_and_read(index: int) -> bool:
        blocks.write(index, rows_of(shape, index))
        buffer = buffer_for(shape)
        blocks.read_into(index, buffer)
        return torch.equal(buffer, rows_of(shape, index))

    with ThreadPoolExecutor(6) as threads:
        assert all(threads.map(write_and_read, range(40)))


def flip_one_bit(file: int, at: int) -> None:
    """Of a byte of the file, also where it was opened for direct access: whole pages are written."""
    start = at // PAGE_BYTES * PAGE_BYTES
    page = page_aligned(PAGE_BYTES)
    data = memoryview(page.numpy())
    os.preadv(file, [data], start)
    page[at - start] ^= 4
    os.pwrite(file, data, start)


def assert_refused(tier: DiskTier, blocks: DiskBlocks, index: int, match: str) -> None:
    """By every way to it, and counted each time."""
    shape, before = blocks.shape, tier.num_damaged
    first_token = index * shape.num_tokens
    ways = (
        lambda: blocks.read_into(index, buffer_for(shape)),
        lambda: blocks.read(index, 0, 1),
        lambda: blocks.gather(torch.tensor([0]), torch.tensor([first_token])),
        lambda: blocks.source(index).read_into(buffer_for(shape)),
    )
    for count, read in enumerate(ways, start=1):
        with pytest.raises(DamagedBlockError, match=match):
            read()
        assert tier.num_damaged == before + count


@EVERY_SHAPE
def test_one_flipped_bit_is_found_and_other_blocks_are_not_touched(tier, shape):
    blocks = filled(tier, shape)
    stride = -(-shape.num_bytes // PAGE_BYTES) * PAGE_BYTES
    flip_one_bit(blocks.file, 2 * stride + shape.num_bytes - 3)
    assert_refused(tier, blocks, 2, "block 2 of 6 .* has another checksum")
    for index in (0, 1, 3, 4, 5):
        assert torch.equal(blocks.read(index, 0, shape.num_tokens), rows_of(shape, index))
    blocks.write(2, rows_of(shape, 9))
    assert torch.equal(blocks.read(2, 0, shape.num_tokens), rows_of(shape, 9))


@EVERY_SHAPE
def test_nothing_of_a_damaged_block_reaches_the_buffer_of_part_pages(tier, shape):
    if shape.num_bytes % PAGE_BYTES == 0:
        pytest.skip("whole pages are read straight into the buffer, which is handed to nobody then")
    blocks, buffer = filled(tier, shape), buffer_for(shape)
    flip_one_bit(blocks.file, 0)
    with pytest.raises(DamagedBlockError):
        blocks.read_into(0, buffer)
    assert (buffer == 7).all()


@EVERY_SHAPE
def test_a_file_cut_short_is_found(tier, shape):
    blocks = filled(tier, shape)
    os.ftruncate(blocks.file, 3 * PAGE_BYTES)
    assert_refused(tier, blocks, NUM_BLOCKS - 1, "ends after 0 of")


def test_a_block_that_the_disk_cannot_read_is_damaged_and_other_errors_are_not(tier, monkeypatch):
    blocks = filled(tier, SHAPES["pages"])

    def fails_with(number):
        def preadv(*args):
            raise OSError(number, os.strerror(number))

        return preadv

    monkeypatch.setattr(os, "preadv", fails_with(errno.EIO))
    assert_refused(tier, blocks, 1, "cannot be read")
    monkeypatch.setattr(os, "preadv", fails_with(errno.EBADF))
    with pytest.raises(OSError, match="Bad file descriptor"):
        blocks.read(1, 0, 1)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_file_systems_that_reserve_no_space_do(tier, monkeypatch, number):
    """The C library's substitute for it fails on files opened for direct access."""

    def refusing(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", refusing)
    blocks = filled(tier, SHAPES["pages"])
    assert torch.equal(blocks.read(3, 0, 64), rows_of(SHAPES["pages"], 3))


def test_a_block_that_was_written_in_part_is_never_read(tier, monkeypatch):
    blocks, write = filled(tier, SHAPES["pages"]), os.pwrite

    def full_after_a_page(file, data, at):
        monkeypatch.setattr(os, "pwrite", full)
        return write(file, data[:PAGE_BYTES], at)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full_after_a_page)
    with pytest.raises(OSError, match="No space left"):
        blocks.write(1, rows_of(SHAPES["pages"], 9))
    assert_refused(tier, blocks, 1, "has another checksum")


@EVERY_SHAPE
def test_a_stale_block_is_found(tier, shape):
    """A write that the disk lost: the block is whole, but it is the one from before."""
    blocks = filled(tier, shape)
    stride = -(-shape.num_bytes // PAGE_BYTES) * PAGE_BYTES
    before = page_aligned(stride)
    os.preadv(blocks.file, [memoryview(before.numpy())], stride)
    blocks.write(1, rows_of(shape, 77))
    os.pwrite(blocks.file, memoryview(before.numpy()), stride)
    assert_refused(tier, blocks, 1, "has another checksum")


@EVERY_SHAPE
def test_a_block_never_written_is_refused(tier, shape):
    blocks = tier.blocks(shape, 2)
    assert_refused(tier, blocks, 1, "has another checksum")


def test_files_have_no_name_and_their_space_is_given_back(tier, tmp_path):
    blocks = filled(tier, SHAPES["pages"])
    assert list(tmp_path.iterdir()) == []
    size = os.fstat(blocks.file).st_size
    assert size == tier.used_bytes == tier.peak_bytes == NUM_BLOCKS * SHAPES["pages"].num_bytes
    tier.close()
    assert tier.used_bytes == 0 and tier.peak_bytes == size
    with pytest.raises(OSError):
        os.fstat(blocks.file)
    tier.close()


def test_a_full_disk_is_an_error_that_names_the_folder_and_the_size(tier, tmp_path, monkeypatch):
    def no_space(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", no_space)
    shape = BlockShape(num_kv_heads=8, num_tokens=1024, head_dim=128, dtype=torch.bfloat16)
    with pytest.raises(OutOfTierMemoryError, match=rf"1\.00 GiB in {tmp_path}: No space left"):
        tier.blocks(shape, 256)
    assert tier.used_bytes == 0


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(OutOfTierMemoryError, match="No such file"):
        DiskTier(tmp_path / "nowhere").blocks(SHAPES["pages"], 1)


@pytest.mark.parametrize("lacking", ["O_TMPFILE", "O_DIRECT", "both"])
def test_file_systems_without_nameless_files_or_direct_access_do(tmp_path, monkeypatch, lacking):
    real_open = os.open
    nameless = getattr(os, "O_TMPFILE", 0)

    def refusing(path, flags, *args, **kwargs):
        if lacking in ("O_TMPFILE", "both") and flags & nameless == nameless:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        if lacking in ("O_DIRECT", "both") and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flags, *args, **kwargs)

    import fcntl

    def refusing_fcntl(file, command, flags=0):
        if lacking != "O_TMPFILE" and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_fcntl(file, command, flags)

    real_fcntl = fcntl.fcntl
    monkeypatch.setattr(os, "open", refusing)
    monkeypatch.setattr(fcntl, "fcntl", refusing_fcntl)
    tier = DiskTier(tmp_path)
    blocks = filled(tier, SHAPES["pages"])
    assert list(tmp_path.iterdir()) == []
    assert tier.is_direct == (lacking == "O_TMPFILE")
    for index in range(NUM_BLOCKS):
        assert torch.equal(blocks.read(index, 0, 64), rows_of(SHAPES["pages"], index))
    tier.close()


def slow_reads(monkeypatch, seconds: float, num_at_once: int) -> None:
    """A disk that serves so many reads at a time, each in so many seconds."""
    gate, check = threading.Semaphore(num_at_once), DiskBlocks.check

    def slow(blocks, index):
        with gate:
            time.sleep(seconds)
            check(blocks, index)

    monkeypatch.setattr(DiskBlocks, "check", slow)


@pytest.mark.parametrize(("num_at_once", "most", "wanted"), [(1, 16, 1), (4, 16, 4), (4, 3, 2)])
def test_as_many_readers_are_chosen_as_the_disk_serves_at_once(tmp_path, monkeypatch, num_at_once, most, wanted):
    slow_reads(monkeypatch, 0.05, num_at_once)
    shape = BlockShape(num_kv_heads=2, num_tokens=4096, head_dim=128, dtype=torch.bfloat16)
    num_readers, gb_per_s = best_num_readers(tmp_path, shape, most)
    assert num_readers == wanted
    assert 0 < gb_per_s < num_at_once * shape.num_bytes / 0.05 / 1e9
    assert not list(tmp_path.iterdir())
