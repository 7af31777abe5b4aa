"""Measures real shapes on one GPU, in one call of under ten minutes: python -m launch.measure.gpu key=value ...

The demo pair is widened to the shapes of Llama-2-7B and Llama-68M (launch/demo_pair/checkpoint.py): weights, keys and
values and the time they take are those of the real ones, what is accepted is a small trained model's. Then, in this
order:

    copies         plain page-locked copies against our streamer, by size of a block; scattered pieces, by their size
    offloaded      a long context on the host: autoregressive against triforce, by gamma2, and the time of each level
    on_chip        a shorter one on the device: the same, with and without CUDA graphs
    attention      over many keys: by products of matrices against the flash kernel, by number of rows
    transformers   its own generate with an offloaded cache

A prompt is read once; the ways to decode take turns on it, each going on where the last one stopped. Results are
written as they come, as JSON and as a page of tables; what does not fit into the time is left out, and said so.
Keys: launch/measure/gpu_config.py. Exit codes: 0 measured; 1 something failed, and the rest was measured; 2 a bad
configuration; 130 interrupted.
"""

from __future__ import annotations

import gc
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from conf.schema import ConfigError
from launch.command_line.machine import describe_machine
from launch.command_line.outcome import ExitCode
from launch.command_line.overrides import compose_program
from launch.command_line.program import program
from launch.measure.gpu_attention import measure_attention
from launch.measure.gpu_config import GpuPart, MeasureGpuConfig
from launch.measure.gpu_copies import measure_copies
from launch.measure.gpu_decoding import measure_offloaded, measure_on_chip
from launch.measure.gpu_pair import WidenedPair
from launch.measure.gpu_results import GpuResults
from launch.measure.gpu_setting import Deadline, Setting
from launch.measure.gpu_transformers import measure_transformers
from orchestrator.run_files import versions


@dataclass(frozen=True, slots=True)
class Procedure:
    """How a part is measured, and the seconds without which it is not begun; most of them go to reading the prompt."""

    measure: Callable[[Setting], None]
    least_seconds: float


PARTS = {
    GpuPart.copies: Procedure(measure_copies, 20),
    GpuPart.offloaded: Procedure(measure_offloaded, 120),
    GpuPart.on_chip: Procedure(measure_on_chip, 60),
    GpuPart.attention: Procedure(measure_attention, 10),
    GpuPart.transformers: Procedure(measure_transformers, 90),
}


@program
def main(argv: list[str]) -> int:
    config: MeasureGpuConfig = compose_program("measure_gpu", argv, "launch/measure/gpu_config.py")
    results = measure(config)
    print(results.page())
    return ExitCode.failed if results.has_failed else ExitCode.done


def measure(config: MeasureGpuConfig) -> GpuResults:
    """Runs every part that there is time for. Raises ConfigError."""
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not config.smoke:
        raise ConfigError("smoke is False; it must be true on a machine without a CUDA device")
    if config.smoke:
        config = config.for_smoke()
    deadline = Deadline(config.deadline_s)
    results = GpuResults(Path(config.output), facts_of(config, device))
    pair = WidenedPair(config, device, results.note)
    setting = Setting(config=config, device=device, deadline=deadline, results=results, pair=pair)
    for cell in (cell for cell in GpuPart if cell in config.cells):
        if not deadline.leaves(0 if config.smoke else PARTS[cell].least_seconds):
            results.note(f"{cell}: left out, there was no time")
            continue
        try:
            _run(cell, setting)
        except Exception as error:
            results.has_failed = True
            (setting.folder / f"{cell}.log").write_text(traceback.format_exc(), encoding="utf-8")
            reason = (str(error).splitlines() or [""])[0]
            results.note(f"{cell}: failed: {type(error).__name__}: {reason} ({cell}.log)")
        _release(device)
    return results


def facts_of(config: MeasureGpuConfig, device: torch.device) -> dict[str, Any]:
    """The day, the card and its link in words, and all that it takes to repeat the measurement."""
    machine = describe_machine(device)
    facts: dict[str, Any] = {"date": str(date.today()), "device": str(device), "torch": torch.__version__}
    if gpu := machine["gpu"]:
        facts["card"] = gpu["name"]
        link = (gpu["driver"], gpu["pcie_generation"], gpu["pcie_lanes"])
        facts["driver, PCIe generation, lanes"] = ", ".join(value or "unknown" for value in link)
    return facts | {"machine": machine, "config": asdict(config), "versions": versions()}


def _run(cell: GpuPart, setting: Setting) -> None:
    began = time.monotonic()
    try:
        PARTS[cell].measure(setting)
    finally:
        peak = ""
        if setting.device.type == "cuda":
            peak = f", at most {torch.cuda.max_memory_allocated(setting.device) / 2**30:.1f} GiB on the device"
        setting.results.note(f"{cell}: {time.monotonic() - began:.0f} s{peak}")


def _release(device: torch.device) -> None:
    """Gives memory that the last part held, also where it failed, to the next."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


if __name__ == "__main__":
    sys.exit(main())
