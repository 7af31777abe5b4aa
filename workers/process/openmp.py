"""The threads that OpenMP keeps for each thread that computes in parallel.

libgomp counts them over all pools of a process. Are there more than cores, they fall asleep at once wherever they wait,
and what is parallel and short takes several times as long (measured on two cores: 0.10 ms instead of 0.02 for a product
of 768 x 256 with a vector, while another thread's pool had nothing to do). So who stops computing for a while gives
them back.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

PAUSE_SOFT = 1
OPENMP = ("libgomp", "libiomp5", "libomp")


def release_pool() -> None:
    """Ends the calling thread's pool; what is parallel next makes it anew, in 0.1 ms. Does nothing where it cannot."""
    library = _library()
    if library is not None:
        library.omp_pause_resource_all(PAUSE_SOFT)


@lru_cache
def _library() -> ctypes.CDLL | None:
    """The OpenMP library that torch brings, if it is loaded."""
    try:
        loaded = {line.split(maxsplit=5)[-1].strip() for line in Path("/proc/self/maps").read_text().splitlines()}
    except OSError:
        return None
    of_torch = [Path(path) for path in sorted(loaded) if Path(path).parts[-3:-1] == ("torch", "lib")]
    return next((ctypes.CDLL(str(path)) for path in of_torch if path.name.startswith(OPENMP)), None)
