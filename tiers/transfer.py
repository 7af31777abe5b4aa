"""Copies between tiers: blocks of the host tier stream through a few device buffers while attention computes.

Why no copy races with its use:
- A buffer is handed to the consumer only after the copy into it is done: on CUDA the compute stream waits for the
  event recorded behind the copy; on a CPU the consumer takes the block from a queue that the copy thread fills
  afterwards. There is no other way to a buffer.
- A buffer is overwritten only after its consumer asked for the next block: on CUDA the copy stream waits for the event
  recorded on the compute stream at that moment; on a CPU the copy thread waits for a semaphore.
- A host block is read only if it was complete when the pass began: the copy stream first waits for all work then
  queued on the compute stream, among it the writes to the host; on a CPU writes are done when they return.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from tiers.base import Tier


@dataclass(slots=True)
class StreamStats:
    """What was streamed: copy seconds, and seconds in which attention waited for a copy."""

    num_bytes: int = 0
    seconds: float = 0.0
    stall_seconds: float = 0.0


class CpuBlockStreamer:
    """A copy thread that runs ahead of the consumer by as many blocks as there are buffers."""

    def __init__(self, block_size: Sequence[int], dtype: torch.dtype, num_buffers: int, tier: Tier):
        self._buffers = [tier.allocate(*block_size, dtype=dtype) for _ in range(num_buffers)]
        self.stats = StreamStats()
        self._passes: queue.SimpleQueue = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._ready: queue.SimpleQueue = queue.SimpleQueue()
        self._free = threading.Semaphore(0)
        self._cancelled = threading.Event()
        self._num_left = 0

    def begin(self, blocks: list[torch.Tensor]) -> None:
        """A pass begins that will take `blocks`, in this order."""
        assert not self._num_left, f"a pass begins with {self._num_left} blocks of the last one not taken"
        if self._thread is None:
            self._thread = threading.Thread(target=self._copy_passes, name="tierforce-stream", daemon=True)
            self._thread.start()
        # Fresh ones for each pass: an aborted pass leaves nothing behind.
        self._ready, self._free = queue.SimpleQueue(), threading.Semaphore(len(self._buffers))
        self._cancelled = threading.Event()
        self._num_left = len(blocks)
        if blocks:
            self._passes.put((blocks, self._ready, self._free, self._cancelled))

    def take(self, count: int) -> Iterator[torch.Tensor]:
        """The next `count` blocks, on the device; each is valid until the next one is asked for."""
        assert count <= self._num_left, f"{count} blocks asked for, {self._num_left} left of the pass"
        for _ in range(count):
            began = time.perf_counter()
            block = self._ready.get()
            self.stats.stall_seconds += time.perf_counter() - began
            if isinstance(block, BaseException):
                raise block
            self._num_left -= 1
            yield block
            self._free.release()

    def cancel(self) -> None:
        """The pass failed: what is left of it will not be taken."""
        self._num_left = 0
        self._cancelled.set()
        self._free.release()

    def close(self) -> None:
        """Ends the copy thread."""
        if self._thread is not None:
            self.cancel()
            self._passes.put(None)
            self._thread.join()
            self._thread = None

    def _copy_passes(self) -> None:
        torch.set_num_threads(1)  # of this thread: the compute threads need the cores
        while (job := self._passes.get()) is not None:
            blocks, ready, free, cancelled = job
            for index, block in enumerate(blocks):
                free.acquire()
                if cancelled.is_set():
                    break
                try:
                    began = time.perf_counter()
                    buffer = self._buffers[index % len(self._buffers)].copy_(block)
                    self.stats.seconds += time.perf_counter() - began
                    self.stats.num_bytes += block.nbytes
                    ready.put(buffer)
                except BaseException as error:
                    ready.put(error)
                    break


class CudaBlockStreamer:
    """A copy stream; the host issues copies as buffers become free, without waiting for either stream."""

    def __init__(self, block_size: Sequence[int], dtype: torch.dtype, num_buffers: int, tier: Tier):
        self._buffers = [tier.allocate(*block_size, dtype=dtype) for _ in range(num_buffers)]
        self._device = self._buffers[0].device
        self._copy_stream = torch.cuda.Stream(self._device)
        self._copied = [torch.cuda.Event() for _ in self._buffers]
        self._used = [torch.cuda.Event() for _ in self._buffers]
        self._stats = StreamStats()
        self._blocks: list[torch.Tensor] = []
        self._num_issued = self._num_taken = 0
        self._began: torch.cuda.Event | None = None
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []  # of passes all of whose copies are issued

    def begin(self, blocks: list[torch.Tensor]) -> None:
        """See CpuBlockStreamer.begin."""
        assert self._num_taken == len(self._blocks), "a pass begins with blocks of the last one not taken"
        self._blocks, self._num_issued, self._num_taken = blocks, 0, 0
        if not blocks:
            return
        self._copy_stream.wait_stream(torch.cuda.current_stream(self._device))
        self._began = torch.cuda.Event(enable_timing=True)
        self._began.record(self._copy_stream)
        for _ in range(min(len(self._buffers), len(blocks))):
            self._issue()

    def _issue(self) -> None:
        index = self._num_issued
        slot = index % len(self._buffers)
        with torch.cuda.stream(self._copy_stream):
            if index >= len(self._buffers):
                self._copy_stream.wait_event(self._used[slot])
            self._buffers[slot].copy_(self._blocks[index], non_blocking=True)
            self._copied[slot].record(self._copy_stream)
        self._stats.num_bytes += self._blocks[index].nbytes
        self._num_issued += 1
        if self._num_issued == len(self._blocks):
            ended = torch.cuda.Event(enable_timing=True)
            ended.record(self._copy_stream)
            self._spans.append((self._began, ended))

    def take(self, count: int) -> Iterator[torch.Tensor]:
        """See CpuBlockStreamer.take."""
        num_left = len(self._blocks) - self._num_taken
        assert count <= num_left, f"{count} blocks asked for, {num_left} left of the pass"
        compute_stream = torch.cuda.current_stream(self._device)
        for _ in range(count):
            slot = self._num_taken % len(self._buffers)
            compute_stream.wait_event(self._copied[slot])
            self._num_taken += 1
            yield self._buffers[slot]
            self._used[slot].record(compute_stream)
            if self._num_issued < len(self._blocks):
                self._issue()

    @property
    def stats(self) -> StreamStats:
        """Waits for the device. Stalls are not told apart from compute on CUDA: `seconds` spans the whole pass."""
        torch.cuda.synchronize(self._device)
        self._stats.seconds += sum(start.elapsed_time(end) for start, end in self._spans) / 1e3
        self._spans.clear()
        return self._stats

    def cancel(self) -> None:
        """See CpuBlockStreamer.cancel."""
        self._copy_stream.synchronize()
        self._blocks, self._num_issued, self._num_taken = [], 0, 0

    def close(self) -> None:
        """Waits for copies under way."""
        self._copy_stream.synchronize()


def make_streamer(block_size: Sequence[int], dtype: torch.dtype, num_buffers: int, tier: Tier, device: torch.device):
    """The streamer for blocks of this size to `device`, whose buffers come from `tier`."""
    kind = CudaBlockStreamer if device.type == "cuda" else CpuBlockStreamer
    return kind(block_size, dtype, num_buffers, tier)
