"""Keeps a process on the NUMA node that a device hangs on: copies between the two then cross no other link.

Memory comes from the node of the core that touches it first, so this is done before anything is allocated.
"""

from __future__ import annotations

import os
from pathlib import Path

PCI_DEVICES = Path("/sys/bus/pci/devices")
NODES = Path("/sys/devices/system/node")


def bind_to_node_of(pci_address: str) -> int | None:
    """Leaves this process the cores of the node of the PCI device 0000:3b:00.0, say, and returns the node.

    None, and nothing is changed, where there is but one node, or it is not known, or the process may not use it.
    """
    try:
        node = int((PCI_DEVICES / pci_address / "numa_node").read_text())
        others = [path for path in NODES.glob("node[0-9]*") if path.name != f"node{node}"]
        cores = _cores_of((NODES / f"node{node}" / "cpulist").read_text())
    except (OSError, ValueError):
        return None
    mine = os.sched_getaffinity(0) & cores
    if not others or not mine:
        return None
    os.sched_setaffinity(0, mine)
    return node


def _cores_of(text: str) -> set[int]:
    """Cores in a list as the system writes it: 0-15,32-47."""
    ranges = [part.split("-") for part in text.strip().split(",") if part]
    return {core for bounds in ranges for core in range(int(bounds[0]), int(bounds[-1]) + 1)}
