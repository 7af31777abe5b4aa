"""Hydra's own way to start a program: composing its configuration from the command line, and running it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import hydra

from launch.command_line.outcome import ExitCode
from launch.command_line.overrides import CONFIG_FOLDER


def run_hydra(task: Callable[..., Any], argv: list[str], config_name: str) -> int:
    """Has Hydra call `task` with what conf/<config_name>.yaml and `argv` make, or with --multirun several times.

    Returns ExitCode.done, or what Hydra or the task exits with; what they raise passes.
    """
    outer, sys.argv = sys.argv, [sys.argv[0], *argv]
    try:
        hydra.main(version_base=None, config_path=str(CONFIG_FOLDER), config_name=config_name)(task)()
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else ExitCode.done
    finally:
        sys.argv = outer
    return ExitCode.done
