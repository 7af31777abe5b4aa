"""Roles that compute side by side on one device: each in a thread, and on CUDA on a stream, of its own."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from tiers.transfer import cuda_stream
from workers.messages import Draft, Verdict
from workers.process.openmp import release_pool


class OwnStream:
    """A stream, and processor threads, for the calls of one role that others compute beside.

    Why nothing races: a call begins when what its caller queued is done, and ends when what it queued itself is done.
    What roles hand each other goes through the caller of both, so the giver's call is over when the taker's begins.
    """

    def __init__(self, device: torch.device, num_threads: int | None = None):
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = cuda_stream(device)
        self._num_threads = num_threads or torch.get_num_threads()

    def enter_thread(self) -> None:
        """Prepares the role's thread, once: it computes with `num_threads` processor threads, else its maker's number.

        A new thread has as many as were set last anywhere in the process, by a thread that copies, perhaps.
        """
        torch.set_num_threads(self._num_threads)

    @contextmanager
    def call(self) -> Iterator[None]:
        """Encloses each call, in the role's thread."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):  # and its device is the thread's
            try:
                yield
            finally:
                self._stream.synchronize()


class VerifyingRole(Protocol):
    """A verifier; what else it can do does not matter here."""

    def verify(self, draft: Draft) -> Verdict: ...


class InBackground:
    """A verifier of this process that verifies in a thread, so that its process can draft meanwhile.

    What else it is asked, it does in the caller's thread, with no verification on. On a CPU the two share the processor
    threads meanwhile, half of them each; a pool of the other that has nothing to do would slow both down.
    """

    def __init__(self, verifier: VerifyingRole, device: torch.device):
        self._verifier, self._device = verifier, device
        self._shares_threads, self._num_threads = device.type == "cpu", torch.get_num_threads()
        self._num_beside = max(1, self._num_threads // 2)
        num_own = max(1, self._num_threads - self._num_beside)
        self._stream = OwnStream(device, num_own if self._shares_threads else self._num_threads)
        self._thread = ThreadPoolExecutor(1, "verifier", initializer=self._stream.enter_thread)
        self._verification: Future[Verdict] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._verifier, name)

    def begin_verify(self, draft: Draft) -> None:
        """Begins to judge `draft`; `finish_verify` gives the verdict, and nothing else may be asked before."""
        if self._shares_threads:
            torch.set_num_threads(self._num_beside)
            release_pool()
        else:
            torch.cuda.current_stream(self._device).synchronize()
        self._verification = self._thread.submit(self._verify, draft)

    def _verify(self, draft: Draft) -> Verdict:
        try:
            with self._stream.call():
                return self._verifier.verify(draft)
        finally:
            if self._shares_threads:
                release_pool()

    def is_verifying(self) -> bool:
        """True as long as the verdict is not known."""
        return not self._begun().done()

    def _begun(self) -> Future[Verdict]:
        assert self._verification is not None, "no verification was begun"
        return self._verification

    def finish_verify(self) -> Verdict:
        """Waits for the verdict. Raises what `verify` raises."""
        try:
            return self._begun().result()
        finally:
            if self._shares_threads:
                torch.set_num_threads(self._num_threads)

    def close(self) -> None:
        """Waits for a verification that an interruption left behind: it reads what is closed next."""
        self._thread.shutdown()
