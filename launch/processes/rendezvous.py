"""How the processes of a run find its orchestrator: by the store that torchrun keeps for them."""

from __future__ import annotations

import os
from datetime import timedelta

import msgspec
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore  # torch.distributed does not export it by name
from torch.distributed.distributed_c10d import Store

from workers.process.channel import Endpoints

KEY = "tierforce/endpoints"


def publish_endpoints(endpoints: Endpoints, timeout_s: float) -> Store:
    """Publishes where the orchestrator is; it keeps the store that is returned as long as others may come.

    Raises torch's DistNetworkError, which names host and port, where there is none.
    """
    store = _store(timeout_s)
    store.set(_key(), msgspec.json.encode(endpoints).decode())
    return store


def wait_for_endpoints(timeout_s: float) -> Endpoints:
    """Where the orchestrator is, for everyone else. Raises TimeoutError, which names host and port."""
    try:
        return msgspec.json.decode(_store(timeout_s).get(_key()), type=Endpoints)
    except dist.DistError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} (MASTER_ADDR, MASTER_PORT)"
        raise TimeoutError(
            f"no orchestrator found by the store at {where} within {timeout_s:g} s (placement.start_timeout_s)"
        ) from error


def _key() -> str:
    """The key of this attempt: a run that torchrun starts again must not find the one before."""
    return f"{KEY}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _store(timeout_s: float) -> Store:
    """The store that torchrun keeps; of a run started by hand without torchrun, rank 0 keeps it."""
    is_kept_by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=not is_kept_by_agent and os.environ.get("RANK") == "0",
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
    )
