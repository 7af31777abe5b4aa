"""launch/processes/guard.py: a worker that ends before it found the orchestrator is reported by its guard, once."""

from __future__ import annotations

import signal

import pytest

from launch.command_line.outcome import ExitCode
from launch.processes.guard import ENDPOINTS, Guard


@pytest.fixture
def of_rank_3(monkeypatch):
    """The environment of a rank that looks for its orchestrator; signal handlers come back."""
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv(ENDPOINTS, raising=False)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_worker_that_cannot_start_is_reported_in_one_line(of_rank_3, capfd):
    assert Guard(1.0, worker_module="launch.nowhere").run() == ExitCode.failed
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("tierforce: ")]
    assert len(lines) == 1
    assert "failed in phase start, rank 3: its process" in lines[0]
    assert lines[0].endswith("ended with exit code 1 before it found the orchestrator")
