"""Prints what a run takes and how fast it should be, with nothing loaded: python launch/plan.py key=value ...

The keys are those of launch/run.py, and `hardware` (conf/hardware: this, rtx4090, rtx4090x2, a100-80g, l40s, h200).
`expected.retrieval_acceptance` and `expected.draft_acceptance` are what the plan assumes of the drafts. What each key
means: launch/forecast/config.py. Where times come from: tiers/planning/cost.py. Exit codes: 0 it fits; 2 it does not,
or a bad configuration.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from rich.console import Console

from launch.command_line.outcome import ExitCode
from launch.command_line.program import program
from launch.forecast.config import read_plan_config
from launch.forecast.forecast import forecast
from launch.forecast.machine import measured
from launch.forecast.table import show


@partial(program, prints_result=True)
def main(argv: list[str]) -> int:
    """The program."""
    config = read_plan_config(argv)
    machine = measured(config.hardware, Path(config.tiers.disk.folder or "."))
    show(Console(), config, machine, forecast(config, machine))
    return ExitCode.done


if __name__ == "__main__":
    sys.exit(main())
