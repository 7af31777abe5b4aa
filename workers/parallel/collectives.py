"""Sums over the ranks of a tensor-parallel model: workers.parallel.tensor_parallel.AllReduce twice.

GroupAllReduce takes NCCL between GPUs, and gloo between processes. SharedMemoryAllReduce is for ranks on processors of
one x86 machine: launch/measure/collectives.py compares the two.
"""

from __future__ import annotations

import errno
import mmap
import os
import platform
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

from workers.parallel.shard import Shard
from workers.parallel.tensor_parallel import AllReduce

SLOT_BYTES = 1 << 20
"""A rank's place in a buffer; larger tensors pass in slices."""
CACHE_LINE_BYTES = 64
NUM_BUFFERS = 2
SPINS, YIELDING_SECONDS, SLEEP_SECONDS = 64, 2e-3, 1e-4
"""A peer that works on another core is here within microseconds; one that shares ours needs it; and one that is still
elsewhere after milliseconds may have long."""


class GroupAllReduce:
    """Sums over a process group, which has a time-out of its own for the others."""

    def __init__(self, group: dist.ProcessGroup):
        self._group = group

    def all_reduce(self, tensor: torch.Tensor) -> None:
        dist.all_reduce(tensor, group=self._group)


class ByThread:
    """Sums in one way for each thread: two roles of a process, which run side by side, must not mix their sums.

    `ways` are given by the thread's name; `default` is for all other threads.
    """

    def __init__(self, default: AllReduce, ways: dict[str, AllReduce]):
        self._default, self._ways = default, ways
        self.summing: set[str] = set()
        """Threads that are in a sum now, and may wait for other ranks there."""

    def all_reduce(self, tensor: torch.Tensor) -> None:
        name = threading.current_thread().name
        self.summing.add(name)
        self._ways.get(name, self._default).all_reduce(tensor)
        self.summing.discard(name)  # one that raised goes on waiting, in a way: it never had the others' numbers


def has_ordered_stores() -> bool:
    """True where another core sees this processor's stores in their order (x86); SharedMemoryAllReduce needs that."""
    return platform.machine().lower() in ("x86_64", "amd64")


class SharedMemoryAllReduce:
    """Sums over a mapping that the ranks of one machine share.

    The mapping has one counter for each rank, each in a cache line of its own, then two buffers of one slot for each
    rank. In its n-th step a rank copies its numbers to its slot of buffer n mod 2, sets its counter to n, waits until
    all counters are n or more, and adds up the slots in the order of the ranks: so all get the same bits.

    Why nobody reads a slot that is being written: data are written before the counter and read after it, which x86
    keeps in order. The slots of step n are written again in step n + 2, which a rank begins when all counters are
    n + 1 or more; and a rank counts n + 1 after it has read all of step n.
    """

    def __init__(self, path: Path, shard: Shard, *, timeout_seconds: float, start_timeout_seconds: float):
        """Waits for the other ranks, which name the same `path`.

        It is a file in /dev/shm that is not there yet, of which nothing is left when this returns or raises; or one
        that never has a name, by its entry in /proc. Raises TimeoutError, and OSError where memory is lacking.
        """
        assert has_ordered_stores(), f"stores of {platform.machine()} may be seen in another order: use GroupAllReduce"
        self._shard, self._timeout_seconds, self._step = shard, timeout_seconds, 0
        data_start = -(-shard.size * CACHE_LINE_BYTES // mmap.PAGESIZE) * mmap.PAGESIZE
        mapping = _map(path, data_start + NUM_BUFFERS * shard.size * SLOT_BYTES)
        self._counters = memoryview(mapping)[:data_start].cast("q")
        data = torch.frombuffer(mapping, dtype=torch.uint8, offset=data_start)
        self._buffers = data.view(NUM_BUFFERS, shard.size, SLOT_BYTES)
        try:
            self._meet(start_timeout_seconds)
        finally:
            _remove(path)

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sums a contiguous tensor on the CPU in place. Raises TimeoutError, after which no more can be summed."""
        assert tensor.is_contiguous() and tensor.device.type == "cpu"
        flat, slice_numel = tensor.view(-1), SLOT_BYTES // tensor.element_size()
        for start in range(0, flat.numel(), slice_numel):
            self._sum(flat[start : start + slice_numel])

    def _sum(self, numbers: torch.Tensor) -> None:
        """One step: sums the numbers of a slot in place."""
        slots = self._buffers[(self._step + 1) % NUM_BUFFERS, :, : numbers.nbytes].view(numbers.dtype)
        slots[self._shard.rank].copy_(numbers)
        self._meet(self._timeout_seconds)
        if self._shard.size == 2:
            torch.add(slots[0], slots[1], out=numbers)
            return
        # Rounded once, not with each rank.
        total = slots[0].to(torch.promote_types(numbers.dtype, torch.float32), copy=True)
        for slot in slots[1:]:
            total += slot
        numbers.copy_(total)

    def _meet(self, timeout_seconds: float) -> None:
        """Waits until all ranks have called it as often. Raises TimeoutError."""
        self._step += 1
        counters, step, began, spins = self._counters, self._step, None, 0
        counters[self._place_of(self._shard.rank)] = step
        for rank in range(self._shard.size):
            place = self._place_of(rank)
            while counters[place] < step:
                spins += 1
                if spins < SPINS:
                    continue
                now = time.monotonic()
                began = began or now
                if now - began > timeout_seconds:
                    where = f"step {step} of the sums over ranks, but {counters[place]}"
                    raise TimeoutError(
                        f"rank {rank} of {self._shard.size} did not come to {where} within {timeout_seconds:g} s"
                    )
                if now - began < YIELDING_SECONDS:
                    os.sched_yield()
                else:
                    time.sleep(SLEEP_SECONDS)

    @staticmethod
    def _place_of(rank: int) -> int:
        """Index of the rank's counter."""
        return rank * CACHE_LINE_BYTES // 8


def _map(path: Path, num_bytes: int) -> mmap.mmap:
    """The mapping of a file of zeros, which whoever comes first makes. Raises OSError."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(file, 0, num_bytes)  # or a page that is lacking kills the process when it is touched
        return mmap.mmap(file, num_bytes)
    except OSError as error:
        _remove(path)
        if error.errno != errno.ENOSPC:
            raise
        hint = "in Docker --shm-size sets how much there is"
        raise OSError(error.errno, f"{num_bytes >> 20} MiB of shared memory are lacking; {hint}", str(path)) from error
    finally:
        os.close(file)


def _remove(path: Path) -> None:
    if not path.is_relative_to("/proc"):
        path.unlink(missing_ok=True)
