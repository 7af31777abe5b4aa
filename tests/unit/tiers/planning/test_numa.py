"""A process goes to the NUMA node of its device, and nowhere where that is not known or not allowed."""

from __future__ import annotations

import os

import pytest

from tiers.planning import numa

ADDRESS = "0000:3b:00.0"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Makes a machine of nodes with these cores and a device on one of them; returns the cores that are then used."""

    def make(node: int, cores: dict[int, str], allowed: set[int]) -> set[int]:
        for number, text in cores.items():
            (tmp_path / f"nodes/node{number}").mkdir(parents=True)
            (tmp_path / f"nodes/node{number}/cpulist").write_text(f"{text}\n")
        (tmp_path / ADDRESS).mkdir()
        (tmp_path / ADDRESS / "numa_node").write_text(f"{node}\n")
        used = set(allowed)
        monkeypatch.setattr(numa, "NODES", tmp_path / "nodes")
        monkeypatch.setattr(numa, "PCI_DEVICES", tmp_path)
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: allowed, raising=False)
        monkeypatch.setattr(
            os, "sched_setaffinity", lambda pid, wanted: (used.clear(), used.update(wanted)), raising=False
        )
        return used

    return make


def test_a_process_keeps_those_of_its_cores_that_are_on_the_devices_node(machine):
    used = machine(1, {0: "0-3,8-11", 1: "4-7,12-15"}, set(range(2, 14)))
    assert numa.bind_to_node_of(ADDRESS) == 1
    assert used == {4, 5, 6, 7, 12, 13}


@pytest.mark.parametrize(
    ("node", "cores", "allowed"),
    [
        (-1, {0: "0-3", 1: "4-7"}, {0, 4}),
        (0, {0: "0-3"}, {0, 1}),
        (1, {0: "0-3", 1: "4-7"}, {0, 1}),
        (2, {0: "0-3", 1: "4-7"}, {0, 1}),
    ],
    ids=["unknown", "one node", "its cores are not allowed", "no such node"],
)
def test_elsewhere_nothing_changes(machine, node, cores, allowed):
    used = machine(node, cores, allowed)
    assert numa.bind_to_node_of(ADDRESS) is None
    assert numa.bind_to_node_of("0000:00:00.0") is None
    assert used == allowed
