"""Runs a grid of settings and makes one table of it: python launch/sweep.py -m decoding.gamma1=1,2,4 key=value ...

The keys are those of launch/run.py, and a few of the sweep (launch/sweeps/config.py); experiment=NAME takes the grid of
conf/experiment. Each job is a run in processes of its own. A sweep goes on where an earlier one in the same folder
stopped. Hydra's launchers and sweepers work where they are installed: docs/sweeps.md. Draw it with launch/report.py.

Exit codes: 0 all done; 1 some failed; 2 bad configuration; 130 interrupted.
"""

from __future__ import annotations

import os
import sys

from rich.console import Console

from conf.schema import ConfigError
from launch.command_line.outcome import ExitCode
from launch.command_line.program import program
from launch.sweeps.runner import run_sweep


@program
def main(argv: list[str]) -> int:
    """Runs what the command line asks for."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        if os.environ.get("RANK", "0") != "0":
            return ExitCode.refused  # one rank says why
        raise ConfigError("launch/sweep.py starts torchrun itself, for each job: python launch/sweep.py -m ...")
    return run_sweep(argv, Console())


if __name__ == "__main__":
    sys.exit(main())
