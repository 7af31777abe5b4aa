"""Times copies from host to device, in turns: plain ones, our streamer, and scattered pieces. GB are 1e9 bytes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from statistics import median

import torch

from launch.command_line.timing import seconds_of
from launch.measure.gpu_results import Cells
from launch.measure.gpu_setting import SAMPLE_SECONDS, Setting
from tiers.base import BlockInMemory, BlockShape, Segment
from tiers.device_tier import DeviceTier
from tiers.pinned_host_tier import PinnedHostTier, can_pin
from tiers.transfer import make_streamer
from workers.attention.attend import attend
from workers.attention.chunk_mass import ChunkMass

NUM_HEADS, HEAD_DIM = 32, 128
BYTES_PER_TOKEN = 2 * NUM_HEADS * HEAD_DIM * 2
NUM_BUFFERS = 4
PIECES_BYTES = 64 << 20
OF_PIECES = ("one by one", "gathered on the host")
VERIFIED_ROWS, CHUNK_SIZE = 17, 8


def measure_copies(setting: Setting) -> None:
    """Tables of rates by size of a block, and by size of a piece; each repetition adds to all of them."""
    config, results = setting.config, setting.results
    copies = Copies(setting.device, config.copied_mib << 20)
    if setting.device.type == "cuda" and not can_pin():
        results.note("host memory is not page-locked (cupy is missing): copies are slow")
    for number in range(config.repetitions):
        for mib in config.block_mib:
            copies.measure_blocks(int(mib * 2**20))
        for kib in config.piece_kib:
            copies.measure_pieces(kib << 10)
        results.set_table("Blocks from host to device, GB/s", copies.block_rows())
        results.set_table("Scattered pieces from host to device, GB/s", copies.piece_rows())
        if not setting.deadline.leaves(SAMPLE_SECONDS):
            results.note(f"copies: {number + 1} of {config.repetitions} repetitions")
            return


class Copies:
    """Copies from `num_bytes` of host memory, page-locked where it can be, to `device`."""

    def __init__(self, device: torch.device, num_bytes: int):
        self._device, self._num_bytes = device, num_bytes
        self._host, self._device_tier = PinnedHostTier(pin=can_pin()), DeviceTier(device)
        self._memory = self._host.allocate(num_bytes // 2, dtype=torch.bfloat16)
        self._memory.view(torch.int16).fill_(0x3C00)  # a small number; pages that were never written are no memory
        self._rates: dict[tuple[int, str], list[float]] = {}
        self._warmed_up: set[tuple[int, str]] = set()

    def measure_blocks(self, block_bytes: int) -> None:
        """One repetition: plainly, then through the streamer, with nothing to do and with attention over each block."""
        tokens = max(1, block_bytes // BYTES_PER_TOKEN)
        shape = BlockShape(num_kv_heads=NUM_HEADS, num_tokens=tokens, head_dim=HEAD_DIM, dtype=torch.bfloat16)
        count = max(1, self._num_bytes // shape.num_bytes)
        blocks = list(self._memory[: count * shape.num_bytes // 2].view(count, *shape.size))
        buffers = [self._device_tier.allocate(*shape.size, dtype=shape.dtype) for _ in range(NUM_BUFFERS)]
        total = count * shape.num_bytes

        def plainly() -> None:
            for index, block in enumerate(blocks):
                buffers[index % NUM_BUFFERS].copy_(block, non_blocking=True)

        self._note((block_bytes, "plain copy"), total, plainly)
        with closing(make_streamer(shape.size, shape.dtype, NUM_BUFFERS, self._device_tier, self._device)) as streamer:

            def streamed(num_rows: int, mass: ChunkMass | None = None) -> None:
                q = torch.ones(NUM_HEADS, 1, max(1, num_rows), HEAD_DIM, device=self._device, dtype=shape.dtype)
                streamer.begin([BlockInMemory(block) for block in blocks])
                taken = enumerate(streamer.take(count))
                segments = (Segment(block[0], block[1], start=index * tokens) for index, block in taken)
                if num_rows:
                    attend(q, segments, first_position=count * tokens, scale=HEAD_DIM**-0.5, mass=mass)
                for _ in segments:
                    pass

            self._note((block_bytes, "streamer"), total, lambda: streamed(0))
            self._note((block_bytes, "with attention of 1 row"), total, lambda: streamed(1))
            name = f"of {VERIFIED_ROWS} rows, with its mass"
            self._note((block_bytes, name), total, lambda: streamed(VERIFIED_ROWS, ChunkMass(CHUNK_SIZE)))

    def measure_pieces(self, piece_bytes: int) -> None:
        """One repetition: each piece a copy of its own, then gathered on the host and copied in one."""
        total = min(PIECES_BYTES, self._num_bytes)
        rows = self._memory[: self._num_bytes // piece_bytes * piece_bytes // 2].view(-1, piece_bytes // 2)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[: total // piece_bytes]
        staging = self._host.allocate(len(order), piece_bytes // 2, dtype=torch.bfloat16)
        out = self._device_tier.allocate(len(order), piece_bytes // 2, dtype=torch.bfloat16)
        sources = order.tolist()

        def one_by_one() -> None:
            for index, source in enumerate(sources):
                out[index].copy_(rows[source], non_blocking=True)

        def gathered() -> None:
            torch.index_select(rows, 0, order, out=staging)
            out.copy_(staging, non_blocking=True)

        num_bytes = len(order) * piece_bytes
        for name, action in zip(OF_PIECES, (one_by_one, gathered), strict=True):
            self._note((piece_bytes, name), num_bytes, action)

    def _note(self, key: tuple[int, str], num_bytes: int, action: Callable[[], None]) -> None:
        if key not in self._warmed_up:
            self._warmed_up.add(key)
            action()
        self._rates.setdefault(key, []).append(num_bytes / seconds_of(action, self._device) / 1e9)

    def block_rows(self) -> list[Cells]:
        """A row of medians for each size of a block; the streamer's share of the plain copy beside it."""
        rows = self._rows("block, MiB", 2**20, lambda name: name not in OF_PIECES)
        for row in rows:
            row["streamer / plain"] = row["streamer"] / row["plain copy"]
        return rows

    def piece_rows(self) -> list[Cells]:
        """A row of medians for each size of a piece."""
        return self._rows("piece, KiB", 2**10, lambda name: name in OF_PIECES)

    def _rows(self, unit: str, unit_bytes: int, belongs: Callable[[str], bool]) -> list[Cells]:
        rows: dict[int, Cells] = {}
        for (size, name), rates in self._rates.items():
            if belongs(name):
                rows.setdefault(size, {unit: size / unit_bytes})[name] = median(rates)
        return list(rows.values())
