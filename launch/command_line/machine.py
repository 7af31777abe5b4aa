"""The machine that a measurement was made on, in words and numbers that let another person judge or repeat it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from tiers.planning.memory import cpu_computes_bf16, host_free_bytes

CPU_INFO = Path("/proc/cpuinfo")
NVIDIA_SMI_SECONDS = 10.0
"""A driver that hangs must not hold up a measurement for longer."""


def describe_machine(device: torch.device) -> dict[str, Any]:
    """System, processor, memory, threads and GPU, in JSON types; null for what cannot be found out."""
    return {
        "system": platform.platform(),
        "cpu": cpu_model(),
        "cpu_bf16": cpu_computes_bf16(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": list(os.getloadavg()),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "memory_free_bytes": host_free_bytes(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "gpu": describe_gpu(device) if device.type == "cuda" else None,
    }


def cpu_model() -> str | None:
    """The processor's name, as its vendor calls it."""
    try:
        lines = CPU_INFO.read_text().splitlines()
    except OSError:
        return platform.processor() or None
    names = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model")))
    return next(names, platform.processor() or None)


def describe_gpu(device: torch.device) -> dict[str, Any]:
    """The card, its driver and its link to the host; null where nvidia-smi does not say."""
    properties = torch.cuda.get_device_properties(device)
    driver, generation, lanes = query_nvidia_smi("driver_version", "pcie.link.gen.current", "pcie.link.width.current")
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "driver": driver,
        "pcie_generation": generation,
        "pcie_lanes": lanes,
        "cuda": torch.version.cuda,
    }


def query_nvidia_smi(*fields: str) -> list[str | None]:
    """The values of these fields for the first card, as nvidia-smi writes them; None for each where it cannot tell."""
    program = shutil.which("nvidia-smi")
    unknown: list[str | None] = [None] * len(fields)
    if program is None:
        return unknown
    command = [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=NVIDIA_SMI_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return unknown
    first = next(iter(result.stdout.splitlines()), "")
    values = [value.strip() or None for value in first.split(",")]
    return values if len(values) == len(fields) else unknown
