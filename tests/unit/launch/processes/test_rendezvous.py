"""launch/processes/rendezvous.py: workers of a run find its orchestrator by torchrun's store, each attempt its own."""

from __future__ import annotations

import threading

import pytest
import torch.distributed as dist

from launch.processes import rendezvous
from launch.processes.rendezvous import publish_endpoints, wait_for_endpoints
from tests.multiprocess.torchrun import free_port
from workers.process.channel import Endpoints

ENDPOINTS = Endpoints(secret="s", pid=1, local="ipc://a", local_pings="ipc://b", remote="tcp://c", remote_pings=None)


@pytest.fixture
def environment(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    monkeypatch.setenv("RANK", "0")
    return monkeypatch


@pytest.fixture
def agent(environment):
    """torchrun's store."""
    environment.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    port = int(rendezvous.os.environ["MASTER_PORT"])
    return dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)


def test_endpoints_are_found_whoever_comes_first(agent):
    found = []
    thread = threading.Thread(target=lambda: found.append(wait_for_endpoints(20.0)))
    thread.start()
    publish_endpoints(ENDPOINTS, 20.0)
    thread.join(20)
    assert found == [ENDPOINTS] == [wait_for_endpoints(20.0)]


def test_a_restarted_run_does_not_find_the_one_before(agent, environment):
    publish_endpoints(ENDPOINTS, 20.0)
    environment.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    environment.setenv("RANK", "1")
    with pytest.raises(TimeoutError):
        wait_for_endpoints(0.2)


def test_who_is_not_there_is_named_in_time(environment):
    environment.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    where = f"127.0.0.1:{rendezvous.os.environ['MASTER_PORT']}"
    environment.setenv("RANK", "1")
    with pytest.raises(TimeoutError, match=f"{where} .* within 0.5 s .placement.start_timeout_s"):
        wait_for_endpoints(0.5)
    with pytest.raises(TimeoutError, match=f"no store of torchrun found at {where} .* within 0.5 s"):
        publish_endpoints(ENDPOINTS, 0.5)


def test_who_is_awaited_and_where_is_said_soon_and_once(environment, capfd):
    environment.setenv("RANK", "1")
    environment.setattr(rendezvous, "NOTICE_SECONDS", 0.1)
    with pytest.raises(TimeoutError):
        wait_for_endpoints(1.0)
    where = f"127.0.0.1:{rendezvous.os.environ['MASTER_PORT']}"
    line = f"tierforce: rank 1 is waiting for rank 0 at {where}, for 1 s (placement.start_timeout_s) at most\n"
    assert capfd.readouterr().err == line  # nor a word of torch's


def test_torchruns_store_is_awaited_with_a_word(environment):
    environment.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    environment.setattr(rendezvous, "NOTICE_SECONDS", 0.1)
    port, notes, stores = int(rendezvous.os.environ["MASTER_PORT"]), [], []
    thread = threading.Thread(target=lambda: stores.append(publish_endpoints(ENDPOINTS, 20.0, notes.append)))
    thread.start()
    while not notes:
        thread.join(0.02)
    agent = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    thread.join(20)
    assert stores and agent
    assert notes == [f"waiting for torchrun's store at 127.0.0.1:{port}, for 20 s (placement.start_timeout_s) at most"]
