"""How many threads a run takes: what the user says, else as many as there are idle cores."""

from __future__ import annotations

import pytest
import torch

from launch.assembly import prepare


@pytest.fixture
def num_threads_set(monkeypatch):
    """The numbers given to torch, as they come; three cores are idle."""
    numbers = []
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    monkeypatch.setattr(prepare, "num_idle_cores", lambda: 3)
    for name in ("OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return numbers


@pytest.mark.parametrize(
    ("configured", "environment", "wanted"),
    [
        ("auto", {}, [3]),
        ("auto", {"OMP_NUM_THREADS": "2"}, []),
        ("auto", {"OMP_NUM_THREADS": "1"}, []),
        ("auto", {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none"}, [3]),
        ("auto", {"TORCHELASTIC_RUN_ID": "none"}, [3]),
        ("2", {"OMP_NUM_THREADS": "1"}, [2]),
    ],
)
def test_threads(num_threads_set, monkeypatch, configured, environment, wanted):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    prepare._set_threads(configured)
    assert num_threads_set == wanted
