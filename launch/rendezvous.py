"""How the processes of a run find its orchestrator: by the store that torchrun keeps for them."""

from __future__ import annotations

import os
from datetime import timedelta

import msgspec
import torch.distributed as dist

from workers.channel import Endpoints

JOIN_SECONDS = 300.0
KEY = "tierforce/endpoints"


def publish_endpoints(endpoints: Endpoints) -> None:
    """By the orchestrator."""
    _store().set(_key(), msgspec.json.encode(endpoints))


def wait_for_endpoints() -> Endpoints:
    """By everyone else. Raises torch's DistStoreError, which names host and port, when it takes too long."""
    return msgspec.json.decode(_store().get(_key()), type=Endpoints)


def _key() -> str:
    return f"{KEY}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _store() -> dist.Store:
    """torchrun's own; started by hand without torchrun, rank 0 keeps it."""
    is_kept_by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=not is_kept_by_agent and os.environ.get("RANK") == "0",
        timeout=timedelta(seconds=JOIN_SECONDS),
        wait_for_workers=False,
    )
