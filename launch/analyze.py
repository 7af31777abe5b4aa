"""Measures what TriForce rests on, for any model: python launch/analyze.py model=llama3.1-8b 'documents={book: FILE}'

The observations of the paper (arXiv 2404.11912, section 3): attention is sparse, what matters to one token goes on
mattering to the next ones, and a cache of a few thousand well-chosen tokens drafts what the target accepts. The target
goes on from each document by its own samples; then facts hidden at known depths of the first one are asked for.

Writes attention.csv, locality.csv, acceptance.csv, needle.csv, summary.md and figures to `output`. Exit codes: 0 done;
2 a bad configuration or input.
"""

from __future__ import annotations

import sys
from importlib import import_module

from rich.console import Console

from conf.schema import ConfigError
from launch.analysis.config import check_start
from launch.command_line.outcome import ExitCode
from launch.command_line.overrides import compose_program
from launch.command_line.program import program
from tiers.errors import OutOfTierMemoryError


@program
def main(argv: list[str]) -> int:
    """Measures what the command line asks for."""
    config = compose_program("analyze", argv, "launch/analysis/config.py, conf/schema.py")
    check_start(config)
    try:
        import_module("launch.analysis.steps").analyze(config, Console())  # and torch with it: seconds
    except OutOfTierMemoryError as error:
        message = f"{error}. A smaller context (it is {config.context}) or fewer budgets need less"
        raise ConfigError(message) from error
    return ExitCode.done


if __name__ == "__main__":
    sys.exit(main())
