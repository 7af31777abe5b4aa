"""What there is: free memory on the device, and on the host within the limits of the cgroup; free disk; idle cores."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import psutil
import torch

CGROUP, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
CPU_FILES = ("cpu.max", "cpu.cfs_quota_us cpu.cfs_period_us")
"""Files with quota and period of a cgroup's share of the cores, of version 2 and of version 1."""
CGROUP_FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
"""Files with limit and usage, of version 2 and of version 1."""


def host_free_bytes() -> int:
    """Available memory, or what the limits of the cgroups that this process is in leave if that is less.

    A cgroup's usage includes cached pages of files, which the system drops when memory is asked for: not counted here.
    """
    free: int = psutil.virtual_memory().available
    for folder in _own_cgroups("memory"):
        for limit_file, usage_file in CGROUP_FILES:
            try:
                limit, usage = (folder / limit_file).read_text().strip(), (folder / usage_file).read_text().strip()
                statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except OSError:
                continue
            if limit.isdigit():
                droppable = int(statistics.get("total_inactive_file", statistics.get("inactive_file", 0)))
                free = min(free, max(0, int(limit) - int(usage) + droppable))
    return free


def _own_cgroups(controller: str) -> set[Path]:
    """Folders of the cgroups that limit what this process has of `controller`: its own, and all above it."""
    folders = {CGROUP, CGROUP / controller}
    try:
        lines = OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return folders
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if not controllers or controller in controllers.split(","):
            root = CGROUP / controllers
            own = root / path.lstrip("/")
            folders |= {own, *(parent for parent in own.parents if parent.is_relative_to(root))}
    return folders


def lockable_memory() -> str:
    """Limit of page-locked memory, as `ulimit -l` says it."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return "unlimited" if limit == resource.RLIM_INFINITY else f"{limit >> 10} KiB"


def process_bytes() -> tuple[int, int]:
    """Bytes of this process in RAM, now and at most so far, libraries and Python included."""
    now: int = psutil.Process().memory_info().rss
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return now, now
    peak = next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")), now)
    return now, max(now, peak)


def device_free_bytes(device: torch.device) -> int:
    """Free memory of a CUDA device; on a CPU that of the host."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host_free_bytes()


def release_unused() -> None:
    """Gives back to the device what torch keeps for later."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def disk_free_bytes(folder: Path) -> int:
    """Free bytes of the file system of `folder`, or of the folder that it will be made in."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    free: int = psutil.disk_usage(str(folder)).free
    return free


def num_idle_cores() -> int:
    """Number of idle cores that this process may use, within the cgroup's quota; at least one. Takes 0.25 s.

    A thread on a core that another program keeps busy holds up all others after every operation: with it a run takes
    many times longer than without.
    """
    mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    busy_percent = psutil.cpu_percent(interval=0.25, percpu=True)
    num_idle: float = len(mine) - sum(percent for core, percent in enumerate(busy_percent) if core in mine) / 100
    # Rounded down: one thread more than the quota lets run has the system hold up all of them.
    return max(1, int(min(round(num_idle), _cpu_quota())))


def _cpu_quota() -> float:
    """Cores that the cgroups of this process let it use at a time; infinite without a limit."""
    least = float("inf")
    for folder in _own_cgroups("cpu"):
        for names in CPU_FILES:
            try:
                quota, period = " ".join((folder / name).read_text() for name in names.split()).split()
            except OSError:
                continue
            if quota.isdigit():  # neither "max" nor -1, which are no limit
                least = min(least, int(quota) / int(period))
    return least


def cpu_computes_bf16() -> bool:
    """Whether this processor multiplies matrices in bf16, as oneDNN finds."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
