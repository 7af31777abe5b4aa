"""Measures our modes and what a user would pick instead, side by side in one run: python launch/bench.py key=value ...

Same weights, prompt, sampling and threads for all. Every contender reads the prompt; then all continue it in turns, a
segment of generation.max_new_tokens each: the first is the warm-up, the others are the repetitions, whose median and
spread are reported. Time between tokens (TBT) leaves the prompt out; `× speed` is against our own `autoregressive`.
Contenders whose memory does not fit beside that of the others take their turns in a group after them.

Keys: those of launch/run.py, and launch/benchmark/config.py. How peers are measured: launch/benchmark/peers.py. After
each cell of the grid bench.json, with all that it takes to repeat it, and bench.csv are written to the folder `output`.
Exit codes: 0 done; 1 some contender failed, the others were measured; 2 bad configuration or input; 130 interrupted.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

from rich.console import Console

from launch.assembly.start_checks import check_start
from launch.benchmark.config import read_bench_config
from launch.command_line.outcome import ExitCode
from launch.command_line.program import program

PIPED_WIDTH = 120
"""Characters of a line, at least, where the table goes to a file or another program."""


@program
def main(argv: list[str]) -> int:
    """Measures the grid; the exit code tells whether a contender failed."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, PIPED_WIDTH)
    config = read_bench_config(argv)
    check_start(config)
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    side_by_side = import_module("launch.benchmark.side_by_side")  # and torch with it: seconds
    num_failed = side_by_side.SideBySide(config=config, folder=folder, console=console, argv=argv).run()
    return ExitCode.failed if num_failed else ExitCode.done


if __name__ == "__main__":
    sys.exit(main())
