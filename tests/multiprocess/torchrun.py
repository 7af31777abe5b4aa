"""Real runs of launch/run.py under torchrun."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.schema import RunConfig, to_plain

ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / "launch" / "run.py"
DEADLINE_SECONDS = 180.0


@dataclass(kw_only=True)
class Ended:
    """Of one torchrun agent and its processes."""

    exit_code: int
    output: str


class Agent:
    """torchrun for one node; its processes are its group's, which is killed at the deadline."""

    def __init__(self, num_processes: int, *command: str, where: tuple[str, ...] = ("--standalone",), **environment):
        torchrun = [sys.executable, "-m", "torch.distributed.run", *where, f"--nproc-per-node={num_processes}"]
        self.process = subprocess.Popen(
            [*torchrun, *command],
            env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def wait(self, deadline_seconds: float = DEADLINE_SECONDS) -> Ended:
        """Raises TimeoutError with what it said so far."""
        try:
            output, _ = self.process.communicate(timeout=deadline_seconds)
        except subprocess.TimeoutExpired as error:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise TimeoutError(f"torchrun takes more than {deadline_seconds:g} s: {error.output}") from None
        return Ended(exit_code=self.process.returncode, output=output)


def torchrun(num_processes: int, *command: str, **environment) -> Ended:
    """On one node."""
    return Agent(num_processes, *command, **environment).wait()


def on_two_nodes(num_processes: tuple[int, int], *command: str) -> list[Ended]:
    """Two agents on two loopback addresses of this machine."""
    port = free_port()
    agents = []
    for node, count in enumerate(num_processes):
        where = ["--nnodes=2", f"--node-rank={node}", "--master-addr=127.0.0.1", f"--master-port={port}"]
        agents.append(Agent(count, *command, where=(*where, f"--local-addr=127.0.0.{node + 1}")))
    return [agent.wait() for agent in agents]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def run_arguments(config: RunConfig, output: Path, **more: Any) -> list[str]:
    """Command line of launch/run.py for a configuration; `more` are keys of it, with __ for dots."""
    flat = _flat(to_plain(config)) | {"output": str(output)} | {key.replace("__", "."): of for key, of in more.items()}
    return [f"{key}={_quoted(value)}" for key, value in flat.items() if key != "placement.kind"]


def _flat(plain: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in plain.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _quoted(value: Any) -> str:
    if value is None:
        return "null"
    return json.dumps(value) if isinstance(value, str | list) else str(value).lower()


def wait_until(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so after {seconds:g} s"
        time.sleep(0.1)
