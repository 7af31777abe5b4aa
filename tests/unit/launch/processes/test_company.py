"""launch/processes/company.py: the ranks that a run waits for are named on the terminal."""

from __future__ import annotations

import pytest

from conf.schema import PlacementKind, RunConfig
from launch.processes import company
from launch.processes.company import Company
from orchestrator.placement import place


@pytest.fixture
def three_ranks(monkeypatch):
    """A company of ranks 0, 1 and 2, of which 0 is this process; and what it has told."""
    for name, value in {
        "WORLD_SIZE": "3",
        "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "node0",
        "MASTER_PORT": "29500",
    }.items():
        monkeypatch.setenv(name, value)
    config, notes = RunConfig(), []
    config.placement.kind = PlacementKind.colocated
    made = Company(config, place(config.placement, 3), notes.append)
    yield made, notes
    made.close(at_once=True)


def test_ranks_that_have_not_come_are_named_once_after_a_while(three_ranks, monkeypatch):
    made, notes = three_ranks
    made.crew.look_around()
    assert notes == []
    monkeypatch.setattr(company, "NOTICE_SECONDS", 0.0)
    made.crew.members[1].pid = 17  # it has said hello
    made.crew.look_around()
    made.crew.look_around()
    role = made.crew.members[2].name
    assert notes == [f"waiting for rank 2 ({role}) at node0:29500, for 600 s (placement.start_timeout_s) at most"]


def test_nothing_is_said_when_all_have_come(three_ranks, monkeypatch):
    made, notes = three_ranks
    monkeypatch.setattr(company, "NOTICE_SECONDS", 0.0)
    for rank in (1, 2):
        made.crew.members[rank].pid = 17
    made.crew.look_around()
    made.crew.members[1].pid = 0
    made.crew.look_around()
    assert notes == []
