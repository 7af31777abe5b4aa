"""Copies of blocks to the device: they stream through a few buffers there while attention computes.

Why no copy races with its use:
- A buffer is handed to the consumer only after the copy into it is done: on CUDA the compute stream waits for the
  event recorded behind the copy; on a CPU the consumer waits for the copy's future. There is no other way to a buffer.
- A copy into a buffer is issued only when its consumer asked for the next block: on CUDA the copy stream waits for the
  event recorded on the compute stream at that moment; on a CPU the consumer's work is done when it asks.
- A block is read only if it was complete when the pass began: on CUDA the copy stream first waits for all work then
  queued on the compute stream, among it the writes to the host; on a CPU writes (tiers.block_writer) are done when
  `drain` returns.
- From disk to a CUDA device a block goes through a page-locked buffer, which is read into only after the copy out of
  it is done: the reading thread waits for that copy's event.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Protocol

import torch

from tiers.base import BlockSource, Tier
from tiers.errors import DamagedBlockError
from tiers.link import AS_FAST_AS_IT_IS, Link

COPY_THREAD = "tierforce-stream"
"""Prefix of the names of threads that copy."""


@dataclass(slots=True)
class StreamStats:
    """Bytes streamed, seconds in which a copy was under way, and seconds in which attention waited for one."""

    num_bytes: int = 0
    seconds: float = 0.0
    stall_seconds: float = 0.0

    @property
    def gb_per_s(self) -> float:
        """Rate of the copies while any was under way; 0 where there was none."""
        return self.num_bytes / self.seconds / 1e9 if self.seconds else 0.0

    @property
    def hidden_share(self) -> float | None:
        """Share of the seconds with a copy under way in which attention did not wait for it; None without a copy."""
        return max(0.0, 1 - self.stall_seconds / self.seconds) if self.seconds else None

    def since(self, before: StreamStats) -> StreamStats:
        """What was counted after the counts stood as they do in `before`."""
        return StreamStats(
            self.num_bytes - before.num_bytes,
            self.seconds - before.seconds,
            self.stall_seconds - before.stall_seconds,
        )


class BlockStreamer(Protocol):
    """Brings blocks to the device, ahead of the consumer by as many as there are buffers."""

    @property
    def stats(self) -> StreamStats:
        """Counts since the streamer was made."""

    def begin(self, blocks: list[BlockSource]) -> None:
        """Begins a pass that will take `blocks`, in this order."""

    def take(self, count: int) -> Iterator[torch.Tensor]:
        """Yields the next `count` blocks, on the device; each is valid until the next one is asked for."""

    def end(self) -> None:
        """Ends a pass all of whose blocks were taken. Raises DamagedBlockError for one that zeros have stood for.

        Not before: where ranks compute together, the others would wait for one that leaves the pass.
        """

    def cancel(self) -> None:
        """Gives up a pass that failed: what is left of it will not be taken."""

    def close(self) -> None:
        """Waits for copies under way, and ends the copy threads."""


def copy_threads(count: int) -> ThreadPoolExecutor:
    """Threads that copy, each of one torch thread: compute threads need the cores. They start with their first copy."""
    return ThreadPoolExecutor(count, thread_name_prefix=COPY_THREAD, initializer=lambda: torch.set_num_threads(1))


def _read(block: BlockSource, buffer: torch.Tensor) -> DamagedBlockError | None:
    """Fills `buffer` with the block; with zeros if it is damaged, and returns the error."""
    try:
        block.read_into(buffer)
    except DamagedBlockError as error:
        buffer.zero_()
        return error
    return None


class CpuBlockStreamer:
    """A BlockStreamer whose copies run ahead of the consumer in threads."""

    def __init__(
        self,
        block_size: Sequence[int],
        dtype: torch.dtype,
        num_buffers: int,
        tier: Tier,
        *,
        num_threads: int = 1,
        link: Link = AS_FAST_AS_IT_IS,
    ):
        self._buffers = [tier.allocate(*block_size, dtype=dtype) for _ in range(num_buffers)]
        self._link, self._threads = link, copy_threads(num_threads)
        self._damage: DamagedBlockError | None = None
        self.stats = StreamStats()
        self._blocks: list[BlockSource] = []
        self._num_taken = 0
        self._copies: deque[Future[tuple[torch.Tensor, float, float]]] = deque()
        self._counted_until = 0.0

    def begin(self, blocks: list[BlockSource]) -> None:
        num_left = len(self._blocks) - self._num_taken
        assert not num_left, f"a pass begins with {num_left} blocks of the last one not taken"
        self._blocks, self._num_taken = blocks, 0
        for _ in range(min(len(self._buffers), len(blocks))):
            self._issue()

    def _issue(self) -> None:
        index = self._num_taken + len(self._copies)
        buffer = self._buffers[index % len(self._buffers)]
        self._copies.append(self._threads.submit(self._copy, self._blocks[index], buffer))

    def _copy(self, block: BlockSource, buffer: torch.Tensor) -> tuple[torch.Tensor, float, float]:
        """Copies `block`; returns the buffer, and when the copy began and ended, in seconds of time.perf_counter()."""
        began = time.perf_counter()
        if (damage := _read(block, buffer)) is not None:
            self._damage = damage
        self._link.pace(began, block.nbytes)
        return buffer, began, time.perf_counter()

    def take(self, count: int) -> Iterator[torch.Tensor]:
        num_left = len(self._blocks) - self._num_taken
        assert count <= num_left, f"{count} blocks asked for, {num_left} left of the pass"
        for _ in range(count):
            began = time.perf_counter()
            block, *span = self._copies.popleft().result()
            self.stats.stall_seconds += time.perf_counter() - began
            self._count(block.nbytes, *span)
            self._num_taken += 1
            yield block
            if self._num_taken + len(self._copies) < len(self._blocks):
                self._issue()

    def end(self) -> None:
        damage, self._damage = self._damage, None
        if damage is not None:
            raise damage

    def _count(self, num_bytes: int, began: float, ended: float) -> None:
        """Counts a copy from `began` to `ended`; time in which several were under way counts once."""
        self.stats.num_bytes += num_bytes
        self.stats.seconds += max(0.0, ended - max(began, self._counted_until))
        self._counted_until = max(self._counted_until, ended)

    def cancel(self) -> None:
        for copy in self._copies:
            copy.cancel()
        wait(self._copies)
        self._copies.clear()
        self._blocks, self._num_taken, self._damage = [], 0, None

    def close(self) -> None:
        self.cancel()
        self._threads.shutdown()


class CudaBlockStreamer:
    """A BlockStreamer with a copy stream: the host issues copies as buffers become free, and waits for no stream.

    `staging` are page-locked buffers, as many as device buffers, through which blocks from disk go; or none.
    """

    def __init__(
        self,
        block_size: Sequence[int],
        dtype: torch.dtype,
        num_buffers: int,
        tier: Tier,
        *,
        num_threads: int = 1,
        staging: Sequence[torch.Tensor] = (),
    ):
        self._buffers = [tier.allocate(*block_size, dtype=dtype) for _ in range(num_buffers)]
        self._staging, self._threads = staging, copy_threads(num_threads)
        self._damage: DamagedBlockError | None = None
        self._device = self._buffers[0].device
        self._copy_stream = cuda_stream(self._device)
        self._copied = [cuda_event() for _ in self._buffers]
        self._used = [cuda_event() for _ in self._buffers]
        self._stats = StreamStats()
        self._blocks: list[BlockSource] = []
        self._reads: list[Future[None] | None] = [None] * num_buffers
        self._num_issued = self._num_taken = 0
        self._began = cuda_event(enable_timing=True)  # of this pass
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []  # on the compute stream, of this pass
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []  # of passes all of whose copies are issued

    def begin(self, blocks: list[BlockSource]) -> None:
        assert self._num_taken == len(self._blocks), "a pass begins with blocks of the last one not taken"
        self._count_waits()
        self._blocks, self._num_issued, self._num_taken = blocks, 0, 0
        if not blocks:
            return
        self._copy_stream.wait_stream(torch.cuda.current_stream(self._device))
        self._began = cuda_event(enable_timing=True)
        self._began.record(self._copy_stream)
        for _ in range(min(len(self._buffers), len(blocks))):
            self._issue()

    def _issue(self) -> None:
        index = self._num_issued
        slot, block = index % len(self._buffers), self._blocks[index]
        if index >= len(self._buffers):
            self._copy_stream.wait_event(self._used[slot])
        if block.memory is not None:
            self._copy(block.memory, slot)
        else:
            self._reads[slot] = self._threads.submit(self._read_and_copy, block, slot)
        self._stats.num_bytes += block.nbytes
        self._num_issued += 1

    def _copy(self, block: torch.Tensor, slot: int) -> None:
        with torch.cuda.stream(self._copy_stream):
            self._buffers[slot].copy_(block, non_blocking=True)
            self._copied[slot].record(self._copy_stream)

    def _read_and_copy(self, block: BlockSource, slot: int) -> None:
        with torch.cuda.device(self._device):
            self._copied[slot].synchronize()  # the last copy out of the staging buffer; at first there was none
            if (damage := _read(block, self._staging[slot])) is not None:
                self._damage = damage
            self._copy(self._staging[slot], slot)

    def take(self, count: int) -> Iterator[torch.Tensor]:
        num_left = len(self._blocks) - self._num_taken
        assert count <= num_left, f"{count} blocks asked for, {num_left} left of the pass"
        compute_stream = torch.cuda.current_stream(self._device)
        for _ in range(count):
            slot = self._num_taken % len(self._buffers)
            reached, ready = (cuda_event(enable_timing=True) for _ in range(2))
            reached.record(compute_stream)
            self._finish_read(slot)
            compute_stream.wait_event(self._copied[slot])
            ready.record(compute_stream)
            self._waits.append((reached, ready))
            self._num_taken += 1
            if self._num_taken == len(self._blocks):
                ended = cuda_event(enable_timing=True)
                ended.record(self._copy_stream)
                self._spans.append((self._began, ended))
            yield self._buffers[slot]
            self._used[slot].record(compute_stream)
            if self._num_issued < len(self._blocks):
                self._issue()

    def end(self) -> None:
        damage, self._damage = self._damage, None
        if damage is not None:
            raise damage

    def _finish_read(self, slot: int) -> None:
        """Waits until a copy from disk is on its stream: only then can another stream wait for it."""
        read, self._reads[slot] = self._reads[slot], None
        if read is not None:
            read.result()

    def _count_waits(self) -> None:
        """Counts the waits of the last pass, whose result the host has seen by now: this waits for nothing."""
        if self._waits:
            self._waits[-1][1].synchronize()
        self._stats.stall_seconds += sum(reached.elapsed_time(ready) for reached, ready in self._waits) / 1e3
        self._waits.clear()

    @property
    def stats(self) -> StreamStats:
        """Counts, for which this waits for the device; `seconds` span whole passes, stalls are the compute stream's."""
        torch.cuda.synchronize(self._device)
        self._count_waits()
        self._stats.seconds += sum(start.elapsed_time(end) for start, end in self._spans) / 1e3
        self._spans.clear()
        return self._stats

    def cancel(self) -> None:
        wait([read for read in self._reads if read is not None])
        self._reads = [None] * len(self._buffers)
        self._copy_stream.synchronize()
        self._blocks, self._num_issued, self._num_taken = [], 0, 0

    def close(self) -> None:
        self.cancel()
        self._threads.shutdown()


def make_streamer(
    block_size: Sequence[int],
    dtype: torch.dtype,
    num_buffers: int,
    device_tier: Tier,
    device: torch.device,
    *,
    num_threads: int = 1,
    link: Link = AS_FAST_AS_IT_IS,
    staging_tier: Tier | None = None,
) -> BlockStreamer:
    """The streamer for blocks of this size to `device`, whose buffers come from `device_tier`.

    Blocks from disk need `staging_tier`, of host memory. `link` is emulated on a CPU only.
    """
    if device.type != "cuda":
        return CpuBlockStreamer(block_size, dtype, num_buffers, device_tier, num_threads=num_threads, link=link)
    staging = []
    if staging_tier is not None:
        staging = [staging_tier.allocate(*block_size, dtype=dtype) for _ in range(num_buffers)]
    return CudaBlockStreamer(block_size, dtype, num_buffers, device_tier, num_threads=num_threads, staging=staging)


def cuda_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream of its own on `device`."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch has no types for it


def cuda_event(*, enable_timing: bool = False) -> torch.cuda.Event:
    """A new event of a stream, not yet recorded."""
    return torch.cuda.Event(enable_timing=enable_timing)  # type: ignore[no-untyped-call]  # torch has no types for it
