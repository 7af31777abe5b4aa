"""New blocks on their way from the device to their tier. Why no write races with what it reads: tiers.transfer."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait

import torch

from tiers.transfer import copy_threads, cuda_event, cuda_stream


class BlockWriter:
    """Writes blocks behind the computation: in a thread, and on CUDA over a stream of its own.

    What is written must stay as it is until `drain`.
    """

    def __init__(self, device: torch.device, num_threads: int = 1):
        self._device, self._threads = device, copy_threads(num_threads)
        self._stream = cuda_stream(device) if device.type == "cuda" else None
        self._writes: list[Future[None]] = []

    def submit(self, write: Callable[[], None]) -> None:
        """Queues `write`, which copies what was queued for computation before this call."""
        ready = None
        if self._stream is not None:
            ready = cuda_event()
            ready.record(torch.cuda.current_stream(self._device))
        self._writes.append(self._threads.submit(self._write, write, ready))

    def _write(self, write: Callable[[], None], ready: torch.cuda.Event | None) -> None:
        if self._stream is None or ready is None:
            write()
            return
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            write()

    def drain(self) -> None:
        """Waits until all is written; then raises what a write raised."""
        writes, self._writes = self._writes, []
        wait(writes)
        if self._stream is not None:
            self._stream.synchronize()
        for write in writes:
            write.result()

    def cancel(self) -> None:
        """Drops the writes that have not begun, waits for the others and forgets what they raised."""
        for write in self._writes:
            write.cancel()
        wait(self._writes)
        self._writes = []
        if self._stream is not None:
            self._stream.synchronize()

    def close(self) -> None:
        """Ends the threads."""
        self.cancel()
        self._threads.shutdown()
