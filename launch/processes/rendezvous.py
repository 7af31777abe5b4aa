"""How the processes of a run find its orchestrator: by the store that torchrun keeps for them."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

import msgspec
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore  # torch.distributed does not export it by name
from torch.distributed.distributed_c10d import Store

from workers.process.channel import Endpoints

KEY = "tierforce/endpoints"
NOTICE_SECONDS = 5.0
"""Who waits longer for others says so."""
KNOCK_SECONDS = 0.25


def print_to_stderr(line: str) -> None:
    """A line on the terminal, of a process that has no display."""
    print(f"tierforce: {line}", file=sys.stderr, flush=True)


def publish_endpoints(endpoints: Endpoints, timeout_s: float, note: Callable[[str], None] = print_to_stderr) -> Store:
    """Publishes where the orchestrator is; it keeps the store that is returned as long as others may come.

    `note(line)` tells the user whom it waits for. Raises TimeoutError, which names host and port, where there is no
    store, and torch's DistNetworkError where it cannot keep one itself.
    """
    if _is_kept_by_agent():
        _wait_for_store(timeout_s, note, "waiting for torchrun's store", f"no store of torchrun found at {_where()}")
    store = _store(timeout_s)
    store.set(_key(), msgspec.json.encode(endpoints).decode())
    return store


def wait_for_endpoints(timeout_s: float) -> Endpoints:
    """Where the orchestrator is, for everyone else. Raises TimeoutError, which names host and port."""
    nobody = f"no orchestrator found by the store at {_where()}"
    _wait_for_store(timeout_s, print_to_stderr, f"rank {os.environ['RANK']} is waiting for rank 0", nobody)
    try:
        return msgspec.json.decode(_store(timeout_s).get(_key()), type=Endpoints)
    except dist.DistError as error:
        raise TimeoutError(f"{nobody} within {_limit(timeout_s)}") from error


def meeting_point() -> str:
    """Where the processes of a run find each other, as host:port."""
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def _where() -> str:
    return f"{meeting_point()} (MASTER_ADDR, MASTER_PORT)"


def _limit(timeout_s: float) -> str:
    return f"{timeout_s:g} s (placement.start_timeout_s)"


def _wait_for_store(timeout_s: float, note: Callable[[str], None], waiting: str, nobody: str) -> None:
    """Waits until something listens where the store is to be: torch's own waiting ends in a page of C++ frames.

    Raises TimeoutError.
    """
    began, has_told = time.monotonic(), False
    while True:
        with suppress(OSError, UnicodeError):  # a name, too, may come into being later
            socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timeout_s).close()
            return
        seconds = time.monotonic() - began
        if seconds > timeout_s:
            raise TimeoutError(f"{nobody} within {_limit(timeout_s)}")
        if seconds > NOTICE_SECONDS and not has_told:
            has_told = True
            note(f"{waiting} at {meeting_point()}, for {_limit(timeout_s)} at most")
        time.sleep(KNOCK_SECONDS)


def _key() -> str:
    """The key of this attempt: a run that torchrun starts again must not find the one before."""
    return f"{KEY}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _is_kept_by_agent() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _store(timeout_s: float) -> Store:
    """The store that torchrun keeps; of a run started by hand without torchrun, rank 0 keeps it."""
    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=not _is_kept_by_agent() and os.environ.get("RANK") == "0",
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
    )
