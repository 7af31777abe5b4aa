"""Measures the stream of blocks against a plain read of the same bytes: python -m launch.measure.stream key=value ...

Keys: conf/measure_stream.yaml. A plain read is a copy of block after block by one thread; from disk, direct reads of
the same file in order, by one thread, without checksums; to a GPU, one copy of all blocks from page-locked memory.
Reads and streams take turns, so that both meet the same machine. With attention over each block, the stalls are those
that computation could not hide.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from statistics import median

import hydra
import torch
from omegaconf import DictConfig

from launch.assembly.role_builder import hidden_share
from tiers.base import BlockShape, Segment
from tiers.device_tier import DeviceTier
from tiers.disk_tier import DiskTier
from tiers.pinned_host_tier import PinnedHostTier, can_pin
from tiers.transfer import make_streamer
from workers.attention.attend import attend


@contextmanager
def stored_blocks(cfg: DictConfig, tier: str, shape: BlockShape, device: torch.device) -> Iterator[tuple]:
    """Blocks in a tier, and a function that reads them plainly to the device."""
    count = (cfg.mib << 20) // shape.num_bytes
    buffers = [torch.empty(shape.size, dtype=shape.dtype, device=device) for _ in range(max(cfg.buffers))]
    if tier == "host":
        blocks = PinnedHostTier(pin=device.type == "cuda" and can_pin()).blocks(shape, count)
        _fill(blocks, count)
        sources = [blocks.source(index) for index in range(count)]
        rows = [blocks.read(index, 0, shape.num_tokens) for index in range(count)]

        def read() -> None:
            for index, block in enumerate(rows):
                buffers[index % len(buffers)].copy_(block, non_blocking=True)

        yield sources, read
        return
    disk = DiskTier(cfg.folder)
    try:
        blocks = disk.blocks(shape, count)
        _fill(blocks, count)
        pages = memoryview(disk.page_buffer(shape.num_bytes).numpy())

        def read() -> None:
            for index in range(count):
                assert os.preadv(blocks.file, [pages], index * len(pages)) == len(pages)

        yield [blocks.source(index) for index in range(count)], read
    finally:
        disk.close()


def _fill(blocks, count: int) -> None:
    for index in range(count):
        blocks.write(index, torch.randn(blocks.shape.size).to(blocks.shape.dtype))


def measure(cfg: DictConfig, tier: str, block_mib: int, num_buffers: int, num_readers: int) -> dict[str, float]:
    """Medians over the repetitions."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    row_bytes = 2 * cfg.num_kv_heads * cfg.head_dim * torch.bfloat16.itemsize
    shape = BlockShape(
        num_kv_heads=cfg.num_kv_heads,
        num_tokens=(block_mib << 20) // row_bytes,
        head_dim=cfg.head_dim,
        dtype=torch.bfloat16,
    )
    q = torch.randn(cfg.num_kv_heads, 1, cfg.num_new, cfg.head_dim, device=device).bfloat16()
    with stored_blocks(cfg, tier, shape, device) as (sources, read):
        streamer = make_streamer(
            shape.size,
            shape.dtype,
            num_buffers,
            DeviceTier(device),
            device,
            num_threads=num_readers,
            staging_tier=PinnedHostTier(pin=can_pin()) if tier == "disk" else None,
        )

        def stream(use: Callable = lambda blocks: [None for _ in blocks]) -> None:
            streamer.begin(sources)
            use(streamer.take(len(sources)))

        def attention(blocks: Iterator[torch.Tensor]) -> None:
            segments = (Segment(k, v, start=i * k.shape[1]) for i, (k, v) in enumerate(blocks))
            attend(q, segments, first_position=len(sources) * shape.num_tokens, scale=cfg.head_dim**-0.5)

        num_bytes = len(sources) * shape.num_bytes
        plain, streamed, hidden = [], [], []
        for _ in range(cfg.repetitions + 1):
            plain.append(num_bytes / _seconds(read, device) / 1e9)
            streamed.append(num_bytes / _seconds(stream, device) / 1e9)
            before = (streamer.stats.seconds, streamer.stats.stall_seconds)
            _seconds(lambda: stream(attention), device)
            after = (streamer.stats.seconds, streamer.stats.stall_seconds)
            hidden.append(hidden_share(after[0] - before[0], after[1] - before[1]))
        streamer.close()
    del plain[0], streamed[0], hidden[0]  # the first one warms up
    ratios = [mine / other for mine, other in zip(streamed, plain, strict=True)]
    return {
        "plain_gb_per_s": median(plain),
        "stream_gb_per_s": median(streamed),
        "ratio": median(ratios),
        "least_ratio": min(ratios),
        "overlap": median(hidden),
    }


def _seconds(action: Callable[[], None], device: torch.device) -> float:
    began = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


@hydra.main(version_base=None, config_path="../conf", config_name="measure_stream")
def main(cfg: DictConfig) -> None:
    torch.set_num_threads(cfg.threads)
    rows = []
    print(
        "| tier | block | in flight | plain GB/s | stream GB/s | ratio | least | behind attention |\n"
        + "|---" * 8
        + "|"
    )
    for tier in cfg.tiers:
        for block_mib, num_buffers, readers in product(cfg.block_mib, cfg.buffers, cfg.readers):
            if tier == "host" and readers != cfg.readers[0]:
                continue
            one = measure(cfg, tier, block_mib, num_buffers, readers if tier == "disk" else 1)
            rows.append({"tier": tier, "block_mib": block_mib, "buffers": num_buffers, "readers": readers} | one)
            in_flight = f"{num_buffers} copies" if tier == "host" else f"{readers} reads, {num_buffers} buffers"
            rates = f"{one['plain_gb_per_s']:.2f} | {one['stream_gb_per_s']:.2f}"
            shares = f"{one['ratio']:.2f} | {one['least_ratio']:.2f} | {one['overlap']:.0%}"
            print(f"| {tier} | {block_mib} MiB | {in_flight} | {rates} | {shares} |", flush=True)
    print("\n" + json.dumps(rows))


if __name__ == "__main__":
    main()
