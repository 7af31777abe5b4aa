"""Sums over ranks: right, the same bits everywhere, and never waiting for ever."""

from __future__ import annotations

import os
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.multiprocess.process_group import run_ranks
from workers.parallel import collectives
from workers.parallel.collectives import SLOT_BYTES, GroupAllReduce, SharedMemoryAllReduce, has_ordered_stores
from workers.parallel.shard import Shard

TIMEOUT_SECONDS = 60.0
NUMELS = (1, 7, 4096, SLOT_BYTES // 4, SLOT_BYTES + 3)
"""The last ones take a slot exactly, and more than one."""
NEEDS_X86 = pytest.mark.skipif(not has_ordered_stores(), reason="Requires: an x86 processor")


@pytest.fixture
def folder():
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield folder


def shared_memory(folder: str, rank: int, size: int, timeout_seconds: float = TIMEOUT_SECONDS):
    return SharedMemoryAllReduce(
        Path(folder, "sums"), Shard(rank, size), timeout_seconds=timeout_seconds, start_timeout_seconds=TIMEOUT_SECONDS
    )


def over_group(folder: str, rank: int, size: int):
    store, timeout = dist.FileStore(f"{folder}/store", size), timedelta(seconds=TIMEOUT_SECONDS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
    return GroupAllReduce(dist.group.WORLD)


def numbers_of(step: int, rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(1000 * step + rank)).to(dtype)


def sum_often(rank: int, size: int, folder: str, make, num_steps: int) -> None:
    """Checks sums of random numbers; those of step s are known to all ranks."""
    torch.set_num_threads(1)
    all_reduce = make(folder, rank, size)
    for step in range(num_steps):
        numel, dtype = NUMELS[step % 3 if step >= 20 else step % 5], (torch.float32, torch.bfloat16)[step // 5 % 2]
        parts = [numbers_of(step, other, numel, dtype) for other in range(size)]
        ours = parts[rank].clone()
        all_reduce.all_reduce(ours)
        wanted = torch.stack(parts).double().sum(0)
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(ours.double(), wanted, rtol=tolerance, atol=tolerance)
        if step < 20:
            torch.save(ours, Path(folder, f"{step}-{rank}"))


@NEEDS_X86
@pytest.mark.parametrize("size", [2, 3])
def test_shared_memory_sums_many_times(folder, size):
    run_ranks(sum_often, size, size, folder, shared_memory, 1000)
    for step in range(20):
        first, *others = [torch.load(Path(folder, f"{step}-{rank}")) for rank in range(size)]
        assert all(torch.equal(first, other) for other in others)
    assert not Path(folder, "sums").exists()


def test_a_group_sums(folder):
    run_ranks(sum_often, 2, 2, folder, over_group, 20)
    for step in range(20):
        first, second = (torch.load(Path(folder, f"{step}-{rank}")) for rank in range(2))
        assert torch.equal(first, second)


def leave_after_three(rank: int, folder: str) -> None:
    all_reduce, numbers = shared_memory(folder, rank, 2, timeout_seconds=0.5), torch.ones(4)
    for _ in range(3):
        all_reduce.all_reduce(numbers)
    if rank == 0:
        began = time.monotonic()
        with pytest.raises(TimeoutError, match=r"rank 1 of 2 did not come to step 5 .* but 4 within 0\.5 s"):
            all_reduce.all_reduce(numbers)
        assert 0.5 <= time.monotonic() - began < 5
    else:
        Path(folder, "left").touch()


@NEEDS_X86
def test_a_rank_that_does_not_arrive_is_named_at_the_deadline(folder):
    run_ranks(leave_after_three, 2, folder)
    assert Path(folder, "left").exists()


def on_one_core(rank: int, folder: str) -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    all_reduce, numbers = shared_memory(folder, rank, 2), torch.ones(4096)
    all_reduce.all_reduce(numbers)
    began = time.monotonic()
    for _ in range(500):
        numbers.fill_(rank + 1)
        all_reduce.all_reduce(numbers)
        assert (numbers == 3).all()
    # A time slice is milliseconds: ranks that waited for theirs to end would take seconds.
    if rank == 0:
        Path(folder, "seconds").write_text(str(time.monotonic() - began))


@NEEDS_X86
def test_ranks_may_share_a_core(folder):
    run_ranks(on_one_core, 2, folder)
    assert float(Path(folder, "seconds").read_text()) < 20


@NEEDS_X86
def test_a_rank_that_never_starts_is_named_and_nothing_is_left(folder):
    path = Path(folder, "sums")
    with pytest.raises(TimeoutError, match="rank 1 of 2 did not come to step 1"):
        SharedMemoryAllReduce(path, Shard(0, 2), timeout_seconds=1, start_timeout_seconds=0.05)
    assert not path.exists()


@NEEDS_X86
def test_too_little_shared_memory_is_said_with_a_way_out(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(collectives.os, "posix_fallocate", full)
    with pytest.raises(OSError, match="MiB of shared memory are lacking; in Docker --shm-size"):
        shared_memory(folder, 0, 2)
    assert not Path(folder, "sums").exists()
