"""How the processes of a run find its orchestrator: by the store that torchrun keeps for them."""

from __future__ import annotations

import os
from datetime import timedelta

import msgspec
import torch.distributed as dist

from workers.process.channel import Endpoints

KEY = "tierforce/endpoints"


def publish_endpoints(endpoints: Endpoints, timeout_s: float) -> dist.Store:
    """By the orchestrator, which keeps the store as long as others may come.

    Raises torch's DistNetworkError, which names host and port, where there is none.
    """
    store = _store(timeout_s)
    store.set(_key(), msgspec.json.encode(endpoints))
    return store


def wait_for_endpoints(timeout_s: float) -> Endpoints:
    """By everyone else. Raises TimeoutError, which names host and port."""
    try:
        return msgspec.json.decode(_store(timeout_s).get(_key()), type=Endpoints)
    except dist.DistError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} (MASTER_ADDR, MASTER_PORT)"
        raise TimeoutError(
            f"no orchestrator found by the store at {where} within {timeout_s:g} s (placement.start_timeout_s)"
        ) from error


def _key() -> str:
    return f"{KEY}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _store(timeout_s: float) -> dist.Store:
    """torchrun's own; started by hand without torchrun, rank 0 keeps it."""
    is_kept_by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=not is_kept_by_agent and os.environ.get("RANK") == "0",
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
    )
