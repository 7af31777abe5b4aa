"""launch/processes/mps.py: the service is started once, where processes share devices, and ends with who started it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.processes import mps
from launch.processes.mps import LOG_FOLDER, PIPE_FOLDER, MpsService, is_available, num_devices, num_workers

ROOT = Path(__file__).resolve().parents[4]
DAEMON = """#!/bin/sh
echo started >> "$0.log"
[ "$1" = -f ] || exit 1
{act}
"""
LISTEN = 'touch "$CUDA_MPS_PIPE_DIRECTORY/control"; exec sleep 60'


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """Of a node with one GPU and a pipeline of four processes; `nvidia-cuda-mps-control` is a script."""
    monkeypatch.setattr(mps.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(mps, "DEFAULT_PIPE_FOLDER", str(tmp_path / "of-nobody"))
    monkeypatch.setattr(mps, "num_devices", lambda environment: 1)
    install(tmp_path, LISTEN)
    return {"PATH": f"{tmp_path}:/usr/bin:/bin", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "0", "MASTER_PORT": "1"}


def install(folder: Path, act: str) -> None:
    script = folder / mps.CONTROL
    script.write_text(DAEMON.format(act=act))
    script.chmod(0o755)


def num_starts(folder: Path) -> int:
    log = folder / f"{mps.CONTROL}.log"
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_the_first_guard_starts_it_and_all_are_clients(environment, tmp_path):
    first, second = MpsService(environment), MpsService(environment)
    joined = first.join()
    assert joined.keys() == {PIPE_FOLDER, LOG_FOLDER} and is_available(joined)
    assert second.join() == joined and num_starts(tmp_path) == 1
    second.close()
    assert is_available(joined)
    first.close()
    assert not is_available(joined) and not Path(joined[PIPE_FOLDER]).exists()
    assert first._daemon.returncode is not None


def test_what_a_killed_run_left_is_not_taken_for_a_daemon(environment, tmp_path, monkeypatch):
    monkeypatch.setattr(mps, "START_SECONDS", 0.3)
    earlier, later = MpsService(environment), MpsService(environment)
    folder = Path(earlier.join()[PIPE_FOLDER])
    earlier._daemon.kill()
    earlier._lock.close()
    assert (folder / "control").exists()
    install(tmp_path, "exit 1")
    assert later.join() == {}
    later.close()


def test_a_folder_of_somebody_else_is_not_used(environment, tmp_path, monkeypatch):
    (tmp_path / "theirs").mkdir()
    (tmp_path / f"tierforce-mps-{mps.os.getuid()}--1").symlink_to(tmp_path / "theirs")
    assert MpsService(environment).join() == {} and num_starts(tmp_path) == 0


def test_two_runs_have_one_each(environment, tmp_path):
    first, second = MpsService(environment), MpsService(environment | {"MASTER_PORT": "2"})
    assert first.join() != second.join() and num_starts(tmp_path) == 2
    first.close()
    second.close()


@pytest.mark.parametrize(("world_size", "node"), [("2", "0"), ("1", "1")])
def test_who_shares_no_device_needs_none(environment, tmp_path, world_size, node):
    assert MpsService(environment | {"LOCAL_WORLD_SIZE": world_size, "GROUP_RANK": node}).join() == {}
    assert num_starts(tmp_path) == 0


def test_without_a_device_there_is_none(environment, tmp_path, monkeypatch):
    monkeypatch.setattr(mps, "num_devices", lambda environment: 0)
    assert MpsService(environment).join() == {} and num_starts(tmp_path) == 0


def test_that_of_the_user_is_left_alone(environment, tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "control").touch()
    assert MpsService(environment | {PIPE_FOLDER: str(tmp_path / "theirs")}).join() == {}
    assert num_starts(tmp_path) == 0


def test_without_the_program_there_is_none(environment, tmp_path):
    (tmp_path / mps.CONTROL).unlink()
    assert MpsService(environment).join() == {}


@pytest.mark.parametrize("act", ["exit 1", "exec sleep 60"], ids=["fails", "never listens"])
def test_one_that_cannot_be_had_is_no_error(environment, tmp_path, monkeypatch, act):
    monkeypatch.setattr(mps, "START_SECONDS", 0.3)
    install(tmp_path, act)
    service = MpsService(environment)
    assert service.join() == {} and num_starts(tmp_path) == 1
    service.close()


KILLED_GUARD = """
import os, signal, sys
from launch.processes import mps
mps.tempfile.tempdir, mps.num_devices = sys.argv[1], lambda environment: 1
service = mps.MpsService(os.environ)
assert service.join()
print(service._daemon.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_it_ends_with_a_guard_that_is_killed(environment, tmp_path):
    command = [sys.executable, "-c", KILLED_GUARD, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    pid, deadline = int(done.stdout), time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("visible", "count"),
    [(None, 2), ("0,1", 2), ("1", 1), ("", 0), ("-1", 0), ("0,-1,1", 1), ("GPU-ab,GPU-cd,GPU-ef", 2)],
)
def test_devices_are_counted_without_the_driver(tmp_path, visible, count):
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    assert num_devices({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}, tmp_path) == count


def test_the_orchestrator_is_no_worker():
    assert num_workers({"LOCAL_WORLD_SIZE": "5", "GROUP_RANK": "0"}) == 4
    assert num_workers({"LOCAL_WORLD_SIZE": "5", "GROUP_RANK": "1"}) == 5
