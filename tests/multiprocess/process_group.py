"""Real processes for a test: forked from one that has imported the big libraries, and killed at a deadline."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable

import torch.multiprocessing

PRELOADED = [
    "torch",
    "transformers",
    "workers.models.loading",
    "workers.parallel.collectives",
    "tests.support.tiny_runs",
]


def run_ranks(function: Callable, size: int, *args, deadline_seconds: float = 120.0) -> None:
    """Calls `function(rank, *args)` in `size` processes. Raises what one of them raised, or TimeoutError."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    context = torch.multiprocessing.start_processes(function, args, size, join=False, start_method="forkserver")
    deadline = time.monotonic() + deadline_seconds
    while not context.join(timeout=1.0):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"{size} ranks of {function.__name__} took more than {deadline_seconds:g} s")
