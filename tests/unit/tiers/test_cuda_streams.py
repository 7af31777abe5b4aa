"""What is written for CUDA's streams, run on a fake of them: right calls and right order; races are tests/gpu's."""

from __future__ import annotations

import tempfile
from contextlib import closing

import pytest
import torch

from tests.support import fake_cuda
from tiers.base import BlockShape
from tiers.block_writer import BlockWriter
from tiers.device_tier import DeviceTier
from tiers.disk_tier import DiskTier
from tiers.pinned_host_tier import PinnedHostTier
from tiers.transfer import CudaBlockStreamer

CPU = torch.device("cpu")
SHAPE = BlockShape(num_kv_heads=2, num_tokens=16, head_dim=8, dtype=torch.float32)


@pytest.mark.parametrize("num_buffers", [2, 3])
@pytest.mark.parametrize("checksums", [False, True])
@pytest.mark.parametrize("kind", ["host", "disk"])
def test_blocks_come_whole_and_in_order_pass_after_pass(monkeypatch, kind, checksums, num_buffers):
    fake_cuda.install(monkeypatch)
    host = PinnedHostTier(pin=False, checksums=checksums)
    disk = DiskTier(tempfile.gettempdir())
    store = (disk if kind == "disk" else host).blocks(SHAPE, 7)
    staging = [host.allocate(*SHAPE.size, dtype=SHAPE.dtype) for _ in range(num_buffers)]
    for index in range(7):
        store.write(index, torch.full(SHAPE.size, float(index)))
    tier = DeviceTier(CPU)
    with closing(CudaBlockStreamer(SHAPE.size, SHAPE.dtype, num_buffers, tier, staging=staging)) as streamer:
        for first in (0, 3):
            streamer.begin([store.source(index) for index in range(first, 7)])
            taken = [float(block.unique()) for count in (2, 5 - first) for block in streamer.take(count)]
            assert taken == list(range(first, 7))
        streamer.begin([store.source(index) for index in range(7)])
        next(iter(streamer.take(7)))
        streamer.cancel()
        streamer.begin([store.source(5)])
        assert [float(block.unique()) for block in streamer.take(1)] == [5]
        stats = streamer.stats
        assert stats.num_bytes >= (7 + 4 + 1) * SHAPE.num_bytes
        assert stats.seconds > 0
    disk.close()


def test_blocks_are_written_behind_the_computation(monkeypatch):
    fake_cuda.install(monkeypatch)
    with closing(BlockWriter(CPU)) as writer:
        writer._stream = torch.cuda.Stream(CPU)
        written = []
        for number in range(5):
            writer.submit(lambda number=number: written.append(number))
        writer.drain()
        assert written == list(range(5))
        writer.submit(lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            writer.drain()
