"""Measures the stream of blocks against a plain read of the same bytes: python -m launch.measure.stream key=value ...

A plain read is a copy of block after block by one thread; from disk, direct reads of
the same file in order, by one thread, without checksums; to a GPU, one copy of all blocks from page-locked memory.
Reads and streams take turns, so that both meet the same machine. With attention over each block, the stalls are those
that computation could not hide. Keys: conf/measure_stream.yaml and `MeasureStreamConfig`. Exit codes: 0 measured; 2 a
bad configuration; 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import partial
from itertools import product
from statistics import median
from typing import TypeAlias

import torch
from hydra.core.config_store import ConfigStore

from conf.schema import ConfigError, expand_home, require
from launch.command_line.outcome import ExitCode
from launch.command_line.overrides import compose_program
from launch.command_line.program import program
from launch.command_line.tables import markdown_head, markdown_row, shown
from launch.command_line.timing import median_or_none, seconds_of
from tiers.base import BlockShape, BlockSource, BlockStore, Segment
from tiers.device_tier import DeviceTier
from tiers.disk_tier import DiskTier
from tiers.errors import OutOfTierMemoryError
from tiers.pinned_host_tier import PinnedHostTier, can_pin
from tiers.transfer import make_streamer
from workers.attention.attend import attend

HEADS = ("tier", "block", "in flight", "plain GB/s", "stream GB/s", "ratio", "least", "behind attention")


class StoredIn(StrEnum):
    """The tier that blocks are streamed from."""

    host = "host"
    disk = "disk"


@dataclass(kw_only=True, slots=True)
class MeasureStreamConfig:
    """Streams to measure: each tier with each size of a block, number of buffers and of readers."""

    tiers: list[StoredIn] = field(default_factory=lambda: list(StoredIn))
    folder: str = "."
    """Folder of the disk tier."""
    mib: int = 512
    """Streamed in each pass."""
    num_kv_heads: int = 2
    head_dim: int = 128
    block_mib: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    buffers: list[int] = field(default_factory=lambda: [4])
    """Blocks in flight to the device."""
    readers: list[int] = field(default_factory=lambda: [1, 2, 4])
    """Reads of the disk in flight."""
    num_new: int = 9
    """Tokens whose attention is computed over the blocks, for the overlap."""
    threads: int = 1
    """Threads of plain copies and of attention; a stream's copies have their own."""
    repetitions: int = 7
    """Plain reads and streams, in turns."""

    def __post_init__(self) -> None:
        expand_home(self, "", "folder")
        for key in ("mib", "num_kv_heads", "head_dim", "num_new", "threads", "repetitions"):
            require(getattr(self, key) >= 1, key, getattr(self, key), ">= 1")
        for key in ("block_mib", "buffers", "readers"):
            values = getattr(self, key)
            require(bool(values) and min(values) >= 1, key, values, f"numbers >= 1, for example {key}=[2,4]")
        require(max(self.block_mib) <= self.mib, "block_mib", self.block_mib, f"at most mib={self.mib}")

    def block_shape(self, block_mib: int) -> BlockShape:
        """A block of so many MiB, in bf16."""
        row_bytes = 2 * self.num_kv_heads * self.head_dim * torch.bfloat16.itemsize
        num_tokens = (block_mib << 20) // row_bytes
        return BlockShape(
            num_kv_heads=self.num_kv_heads, num_tokens=num_tokens, head_dim=self.head_dim, dtype=torch.bfloat16
        )


ConfigStore.instance().store(name="measure_stream_schema", node=MeasureStreamConfig)


@dataclass(kw_only=True, slots=True)
class Rates:
    """Medians over the repetitions."""

    plain_gb_per_s: float
    stream_gb_per_s: float
    ratio: float
    """The stream's rate over that of the plain read beside it."""
    least_ratio: float
    overlap: float | None
    """Share of the stream's seconds in which attention did not wait for it."""


Stored: TypeAlias = tuple[list[BlockSource], Callable[[], None]]
"""Blocks of a tier, and a function that reads them plainly to the device."""


@contextmanager
def host_blocks(shape: BlockShape, count: int, buffers: list[torch.Tensor]) -> Iterator[Stored]:
    """Blocks on the host, page-locked where it can be; a plain read copies them to the buffers in turn."""
    blocks = PinnedHostTier(pin=buffers[0].is_cuda and can_pin()).blocks(shape, count)
    _fill(blocks, shape, count)
    rows = [blocks.read(index, 0, shape.num_tokens) for index in range(count)]  # the blocks' own memory

    def read() -> None:
        for index, block in enumerate(rows):
            buffers[index % len(buffers)].copy_(block, non_blocking=True)

    yield [blocks.source(index) for index in range(count)], read


@contextmanager
def disk_blocks(shape: BlockShape, count: int, folder: str) -> Iterator[Stored]:
    """Blocks in a file of the folder; a plain read brings them to memory."""
    disk = DiskTier(folder)
    try:
        blocks = disk.blocks(shape, count)
        _fill(blocks, shape, count)
        pages = disk.page_buffer(shape.num_bytes).numpy().data

        def read() -> None:
            for index in range(count):
                assert os.preadv(blocks.file, [pages], index * len(pages)) == len(pages)

        yield [blocks.source(index) for index in range(count)], read
    finally:
        disk.close()


def _fill(blocks: BlockStore, shape: BlockShape, count: int) -> None:
    for index in range(count):
        blocks.write(index, torch.randn(shape.size).to(shape.dtype))


def measure(config: MeasureStreamConfig, tier: StoredIn, block_mib: int, num_buffers: int, num_readers: int) -> Rates:
    """Plain reads, streams, and streams with attention over them, in turns."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = config.block_shape(block_mib)
    count = (config.mib << 20) // shape.num_bytes
    buffers = [torch.empty(shape.size, dtype=shape.dtype, device=device) for _ in range(max(config.buffers))]
    stored: AbstractContextManager[Stored] = {
        StoredIn.host: partial(host_blocks, buffers=buffers),
        StoredIn.disk: partial(disk_blocks, folder=config.folder),
    }[tier](shape, count)
    q = torch.randn(config.num_kv_heads, 1, config.num_new, config.head_dim, device=device).bfloat16()
    with stored as (sources, read):
        streamer = make_streamer(
            shape.size,
            shape.dtype,
            num_buffers,
            DeviceTier(device),
            device,
            num_threads=num_readers,
            staging_tier=PinnedHostTier(pin=can_pin()) if tier is StoredIn.disk else None,
        )

        def stream() -> None:
            streamer.begin(sources)
            for _ in streamer.take(len(sources)):
                """Each buffer is given back at once."""

        def stream_attended() -> None:
            streamer.begin(sources)
            blocks = streamer.take(len(sources))
            segments = (Segment(k, v, start=i * k.shape[1]) for i, (k, v) in enumerate(blocks))
            attend(q, segments, first_position=len(sources) * shape.num_tokens, scale=config.head_dim**-0.5)

        num_bytes = len(sources) * shape.num_bytes
        plain: list[float] = []
        streamed: list[float] = []
        hidden: list[float | None] = []
        for _ in range(config.repetitions + 1):
            plain.append(num_bytes / seconds_of(read, device) / 1e9)
            streamed.append(num_bytes / seconds_of(stream, device) / 1e9)
            before = copy(streamer.stats)  # which counts on
            seconds_of(stream_attended, device)
            hidden.append(streamer.stats.since(before).hidden_share)
        streamer.close()
    del plain[0], streamed[0], hidden[0]  # the first one warms up
    ratios = [mine / other for mine, other in zip(streamed, plain, strict=True)]
    return Rates(
        plain_gb_per_s=median(plain),
        stream_gb_per_s=median(streamed),
        ratio=median(ratios),
        least_ratio=min(ratios),
        overlap=median_or_none(hidden),
    )


def cases(config: MeasureStreamConfig) -> Iterator[tuple[StoredIn, int, int, int]]:
    """Tier, MiB of a block, buffers and readers; a stream from the host has no reads, and is measured once for all."""
    for tier in config.tiers:
        readers: Sequence[int] = config.readers if tier is StoredIn.disk else config.readers[:1]
        for block_mib, num_buffers, num_readers in product(config.block_mib, config.buffers, readers):
            yield tier, block_mib, num_buffers, num_readers


@partial(program, prints_result=True)
def main(argv: list[str]) -> int:
    config: MeasureStreamConfig = compose_program("measure_stream", argv, "launch/measure/stream.py")
    torch.set_num_threads(config.threads)
    rows = []
    print(markdown_head(HEADS))
    for tier, block_mib, num_buffers, readers in cases(config):
        try:
            rates = measure(config, tier, block_mib, num_buffers, readers if tier is StoredIn.disk else 1)
        except OutOfTierMemoryError as error:
            raise ConfigError(f"mib is {config.mib}, for which there is no room: {error}") from error
        rows.append({"tier": tier, "block_mib": block_mib, "buffers": num_buffers, "readers": readers} | asdict(rates))
        in_flight = f"{readers} reads, {num_buffers} buffers" if tier is StoredIn.disk else f"{num_buffers} copies"
        numbers = (rates.plain_gb_per_s, rates.stream_gb_per_s, rates.ratio, rates.least_ratio)
        cells = [*(f"{number:.2f}" for number in numbers), shown(rates.overlap, ".0%")]
        print(markdown_row([tier, f"{block_mib} MiB", in_flight, *cells]), flush=True)
    print("\n" + json.dumps(rows))
    return ExitCode.done


if __name__ == "__main__":
    sys.exit(main())
