"""The machine that a run is planned for: as configured, and what is null measured on the machine that we are on."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from launch.assembly.sizing import GIB, FreeBytes
from launch.forecast.config import HardwareConfig
from tiers.base import BlockShape, page_aligned
from tiers.disk_tier import DiskTier
from tiers.planning.cost import Speeds
from tiers.planning.memory import cpu_computes_bf16, disk_free_bytes, host_free_bytes

MEASURED_SECONDS = 0.3
COPY_BYTES = 256 << 20
MATRIX_SIZE = 1024
DISK_BLOCKS = 64


@dataclass(kw_only=True, frozen=True, slots=True)
class Machine:
    """A machine of which all is known."""

    name: str
    speeds: Speeds
    free: FreeBytes
    """Memory of one device, and of the host and the disk for all devices."""


def measured(hardware: HardwareConfig, folder: Path) -> Machine:
    """The machine, where null stands measured or read from this one, in about a second; `folder` is on its disk."""
    device_gb_per_s, link_gb_per_s = hardware.device_gb_per_s, hardware.link_gb_per_s
    if device_gb_per_s is None or link_gb_per_s is None:
        copied = _copy_gb_per_s()
        device_gb_per_s = copied if device_gb_per_s is None else device_gb_per_s
        link_gb_per_s = copied if link_gb_per_s is None else link_gb_per_s
    speeds = Speeds(
        num_devices=hardware.num_devices,
        device_gb_per_s=device_gb_per_s,
        device_tflops=_matmul_tflops() if hardware.device_tflops is None else hardware.device_tflops,
        link_gb_per_s=link_gb_per_s,
        disk_gb_per_s=_disk_gb_per_s(folder) if hardware.disk_gb_per_s is None else hardware.disk_gb_per_s,
        layer_overhead_ms=hardware.layer_overhead_ms,
    )
    free = FreeBytes(
        device=_bytes(hardware.device_memory_gib, host_free_bytes),
        host=_bytes(hardware.host_memory_gib, host_free_bytes),
        disk=_bytes(hardware.disk_gib, lambda: disk_free_bytes(folder)),
        device_is_host=not hardware.has_gpu,
    )
    return Machine(name=hardware.name, speeds=speeds, free=free)


def _bytes(gib: float | None, read: Callable[[], int]) -> int:
    return read() if gib is None else int(gib * GIB)


def _repeated(action: Callable[[], object]) -> float:
    """Seconds of one call, the best of those that fit into MEASURED_SECONDS."""
    action()
    best, ends = float("inf"), time.perf_counter() + MEASURED_SECONDS
    while time.perf_counter() < ends:
        began = time.perf_counter()
        action()
        best = min(best, time.perf_counter() - began)
    return best


def _copy_gb_per_s() -> float:
    source, target = page_aligned(COPY_BYTES).zero_(), page_aligned(COPY_BYTES)
    return COPY_BYTES / _repeated(lambda: target.copy_(source)) / 1e9


def _matmul_tflops() -> float:
    dtype = torch.bfloat16 if cpu_computes_bf16() else torch.float32
    left, right = torch.randn(2, MATRIX_SIZE, MATRIX_SIZE, dtype=dtype)
    return 2 * MATRIX_SIZE**3 / _repeated(lambda: left @ right) / 1e12


def _disk_gb_per_s(folder: Path) -> float:
    """Speed of reading blocks of 1 MiB, one at a time, as the disk tier reads them."""
    block = BlockShape(num_kv_heads=1, num_tokens=4096, head_dim=128, dtype=torch.uint8)
    while not folder.exists():
        folder = folder.parent
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        tier = DiskTier(scratch)
        blocks = tier.blocks(block, DISK_BLOCKS)
        buffer = page_aligned(block.num_bytes).view(block.size)

        def read_all() -> None:
            for index in range(DISK_BLOCKS):
                blocks.read_into(index, buffer)

        for index in range(DISK_BLOCKS):
            blocks.write(index, buffer.fill_(index))
        seconds = _repeated(read_all)
        tier.close()
    return DISK_BLOCKS * block.num_bytes / seconds / 1e9
