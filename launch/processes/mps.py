"""CUDA's Multi-Process Service (MPS): processes that share a GPU compute side by side with it, by turns without.

A process is a client of the service, or not, from its first call of CUDA to its end: so a guard sees to the service
before it starts its worker. Of the guards of a node the first starts the control daemon, which ends with it; where that
does not work, processes take turns, and the run says so. It loads no torch.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

CONTROL = "nvidia-cuda-mps-control"
PIPE_FOLDER, LOG_FOLDER = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"
DEFAULT_PIPE_FOLDER = "/tmp/nvidia-mps"
START_SECONDS, TICK_SECONDS = 10.0, 0.05
PR_SET_PDEATHSIG = 1


def is_available(environment: Mapping[str, str]) -> bool:
    """Whether a daemon listens where a process of this environment looks for it."""
    return Path(environment.get(PIPE_FOLDER, DEFAULT_PIPE_FOLDER), "control").exists()


def num_devices(environment: Mapping[str, str], devices: Path = Path("/dev")) -> int:
    """Number of CUDA devices that a process of this environment may see; asks no driver."""
    present = sum(path.name.removeprefix("nvidia").isdigit() for path in devices.glob("nvidia*"))
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    named = [name.strip() for name in visible.split(",")]
    return min(present, next((index for index, name in enumerate(named) if name in ("", "-1")), len(named)))


def num_workers(environment: Mapping[str, str]) -> int:
    """Number of a pipeline's workers on this node.

    Of the first node's processes one is the orchestrator, which uses no device.
    """
    is_first = environment.get("GROUP_RANK", "0") == "0"
    return int(environment.get("LOCAL_WORLD_SIZE", "1")) - is_first


class MpsService:
    """The MPS of one run on one node, as one guard sees it: the first guard that joins starts the control daemon."""

    def __init__(self, environment: Mapping[str, str]):
        self._environment = environment
        self._folder: Path | None = None
        self._lock: TextIO | None = None
        self._daemon: subprocess.Popen[bytes] | None = None

    def join(self) -> dict[str, str]:
        """What a worker's environment must have for the worker to be a client; starts the daemon if need be.

        Nothing where there is no use for the service, where it cannot be had, or where the user's own is there.
        """
        devices = num_devices(self._environment)
        if not 0 < devices < num_workers(self._environment) or is_available(self._environment):
            return {}
        if shutil.which(CONTROL, path=self._environment.get("PATH")) is None:
            return {}
        run = "-".join(self._environment.get(key, "") for key in ("TORCHELASTIC_RUN_ID", "MASTER_PORT"))
        self._folder = Path(tempfile.gettempdir(), f"tierforce-mps-{os.getuid()}-{run}")
        self._folder.mkdir(mode=0o700, exist_ok=True)
        if self._folder.is_symlink() or self._folder.stat().st_uid != os.getuid():
            return {}  # somebody else's trap
        wanted = {PIPE_FOLDER: str(self._folder), LOG_FOLDER: str(self._folder)}
        self._lock = (self._folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass  # another guard starts it
        else:
            (self._folder / "control").unlink(missing_ok=True)  # of a run that was killed
            self._start(wanted)
        return wanted if self._is_up(wanted) else {}

    def _start(self, wanted: dict[str, str]) -> None:
        self._daemon = subprocess.Popen(
            [CONTROL, "-f"],
            env={**self._environment, **wanted},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=lambda: ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM),
        )

    def _is_up(self, wanted: dict[str, str]) -> bool:
        deadline = time.monotonic() + START_SECONDS
        while not is_available(wanted):
            has_failed = self._daemon is not None and self._daemon.poll() is not None
            if has_failed or time.monotonic() > deadline:
                return False
            time.sleep(TICK_SECONDS)
        return True

    def close(self) -> None:
        """Ends the daemon, if this guard started it."""
        if self._daemon is not None:
            assert self._folder is not None, "the daemon was started in a folder"
            self._daemon.terminate()
            try:
                self._daemon.wait(START_SECONDS)
            except subprocess.TimeoutExpired:
                self._daemon.kill()
                self._daemon.wait()
            shutil.rmtree(self._folder, ignore_errors=True)
        if self._lock is not None:
            self._lock.close()
