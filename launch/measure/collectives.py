"""Times sums over the ranks of a tensor-parallel model: `python -m launch.measure.collectives`.

Medians in microseconds for 2 ranks on processors, of one thread each. On a busy machine they show the scheduler's
time slices: read them when nothing else runs.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing

from workers.parallel.collectives import GroupAllReduce, SharedMemoryAllReduce
from workers.parallel.shard import Shard

NUM_RANKS = 2
KIB = (4, 16, 128, 4096)
REPETITIONS = 300
TIMEOUT_SECONDS = 30.0


def main() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        torch.multiprocessing.spawn(_measure, (folder,), nprocs=NUM_RANKS)


def _measure(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    shard = Shard(rank, NUM_RANKS)
    store = dist.FileStore(f"{folder}/store", NUM_RANKS)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=NUM_RANKS, timeout=timedelta(seconds=TIMEOUT_SECONDS)
    )
    of_group = GroupAllReduce(dist.group.WORLD)
    of_memory = SharedMemoryAllReduce(
        Path(folder, "sums"), shard, timeout_seconds=TIMEOUT_SECONDS, start_timeout_seconds=TIMEOUT_SECONDS
    )
    for kib in KIB:
        numbers = torch.zeros(kib << 10 >> 2)
        gloo, memory = (_median_microseconds(one.all_reduce, numbers) for one in (of_group, of_memory))
        if rank == 0:
            print(f"{kib:5} KiB   gloo {gloo:8.1f} us   shared memory {memory:8.1f} us")
    dist.destroy_process_group()


def _median_microseconds(call: Callable[[torch.Tensor], None], numbers: torch.Tensor) -> float:
    times = []
    for _ in range(REPETITIONS):
        began = time.perf_counter()
        call(numbers)
        times.append(time.perf_counter() - began)
    return 1e6 * statistics.median(times)


if __name__ == "__main__":
    main()
