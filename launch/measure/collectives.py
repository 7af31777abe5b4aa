"""Times sums over the ranks of a tensor-parallel model: python -m launch.measure.collectives key=value ...

Medians in microseconds for ranks on processors, of one thread each. On a busy machine they show the scheduler's time
slices: read them when nothing else runs. Keys: conf/measure_collectives.yaml and `MeasureCollectivesConfig`.
Exit codes: 0 measured; 2 a bad configuration; 130 interrupted.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.distributed as dist
from hydra.core.config_store import ConfigStore
from torch._C._distributed_c10d import FileStore  # torch.distributed does not export it by name

from conf.schema import require
from launch.command_line.outcome import ExitCode
from launch.command_line.overrides import compose_program
from launch.command_line.program import program
from launch.command_line.timing import repeated_seconds
from workers.parallel.collectives import GroupAllReduce, SharedMemoryAllReduce
from workers.parallel.shard import Shard


@dataclass(kw_only=True, slots=True)
class MeasureCollectivesConfig:
    """Sums to time."""

    num_ranks: int = 2
    kib: list[int] = field(default_factory=lambda: [4, 16, 128, 4096])
    """Sizes of what is summed."""
    repetitions: int = 300
    timeout_s: float = 30.0
    """Seconds that a rank waits for the others."""

    def __post_init__(self) -> None:
        require(self.num_ranks >= 2, "num_ranks", self.num_ranks, ">= 2")
        require(bool(self.kib) and min(self.kib) >= 1, "kib", self.kib, "sizes >= 1, for example [4,128]")
        require(self.repetitions >= 1, "repetitions", self.repetitions, ">= 1")
        require(self.timeout_s > 0, "timeout_s", self.timeout_s, "above 0")


ConfigStore.instance().store(name="measure_collectives_schema", node=MeasureCollectivesConfig)


@program
def main(argv: list[str]) -> int:
    config: MeasureCollectivesConfig = compose_program("measure_collectives", argv, "launch/measure/collectives.py")
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm") as folder,
        ProcessPoolExecutor(config.num_ranks, get_context("spawn")) as ranks,
    ):
        list(ranks.map(partial(_measure, config, folder), range(config.num_ranks)))  # raises what a rank has raised
    return ExitCode.done


def _measure(config: MeasureCollectivesConfig, folder: str, rank: int) -> None:
    """One rank's part; the first one prints."""
    torch.set_num_threads(1)
    timeout = timedelta(seconds=config.timeout_s)
    store = FileStore(f"{folder}/store", config.num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=config.num_ranks, timeout=timeout)
    assert dist.group.WORLD is not None
    of_group = GroupAllReduce(dist.group.WORLD)
    of_memory = SharedMemoryAllReduce(
        Path(folder, "sums"),
        Shard(rank, config.num_ranks),
        timeout_seconds=config.timeout_s,
        start_timeout_seconds=config.timeout_s,
    )
    for kib in config.kib:
        numbers = torch.zeros(kib << 10 >> 2)
        gloo, memory = (
            1e6 * statistics.median(repeated_seconds(partial(one.all_reduce, numbers), config.repetitions))
            for one in (of_group, of_memory)
        )
        if rank == 0:
            print(f"{kib:5} KiB   gloo {gloo:8.1f} us   shared memory {memory:8.1f} us", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
