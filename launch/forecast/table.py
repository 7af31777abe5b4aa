"""A forecast on the console: bytes of each tier, then times."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from conf.schema import AUTO
from launch.assembly.sizing import GIB
from launch.forecast.config import PlanConfig
from launch.forecast.forecast import Forecast
from launch.forecast.machine import Machine


def show(console: Console, config: PlanConfig, machine: Machine, made: Forecast) -> None:
    """Prints what is planned for, where the layers are, and both tables."""
    each = " on each of them" if machine.speeds.num_devices > 1 else ""
    console.print(f"{config.model.target} on {machine.name}, {config.num_prompt_tokens:,} tokens{each}")
    for note in made.notes:
        console.print(note, highlight=False)
    console.print(made.plan.reason, highlight=False)
    console.print(_bytes_table(made))
    console.print(_times_table(config, made))


def _bytes_table(made: Forecast) -> Table:
    plan, table = made.plan, Table("tier", "what", "GiB", box=None, pad_edge=False)
    for tier, parts in (("device", plan.device_bytes), ("host", plan.host_bytes), ("disk", plan.disk_bytes)):
        for part, num_bytes in parts.items():
            if num_bytes:
                table.add_row(tier, part, f"{num_bytes / GIB:.2f}")
        table.add_row(tier, "in all", f"{sum(parts.values()) / GIB:.2f}", style="bold")
    return table


def _times_table(config: PlanConfig, made: Forecast) -> Table:
    round_ = made.round
    phases = f"draft {round_.draft_seconds:.3f}, retrieval {round_.retrieval_seconds:.3f}, verify"
    phases += f" {round_.verify_seconds:.3f} s for {round_.num_tokens:.1f} tokens"
    if AUTO in (config.decoding.gamma1, config.decoding.gamma2):
        phases = f"gamma1 {round_.gamma1}, gamma2 {round_.gamma2}: {phases}"
    table = Table("predicted", "", box=None, pad_edge=False)
    table.add_row("TTFT", f"{made.prefill_seconds:.1f} s")
    table.add_row(f"TBT, {config.decoding.mode}", f"{1000 * round_.seconds_per_token:.0f} ms ({phases})")
    table.add_row("TBT, autoregressive", f"{1000 * made.autoregressive_seconds:.0f} ms")
    return table
