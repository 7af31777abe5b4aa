"""Generates from a long document: torchrun launch/run.py key=value ... (keys: conf/schema.py, groups: conf/).

Exit codes: 0 done; 1 failed at run time, with one line naming role, rank and phase; 2 bad configuration or input, with
one message; 130 interrupted. torch is imported only after the configuration was found good.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console

from conf.schema import ConfigError, RunConfig
from launch.assembly.start_checks import check_start
from launch.command_line.interruption import Interruption
from launch.command_line.outcome import ExitCode, fail, refuse
from launch.command_line.overrides import CONFIG_FOLDER, read_config, start_timeout_s, to_config
from launch.command_line.program import program
from launch.processes.generation_run import GenerationRun
from launch.processes.guard import Guard
from orchestrator.display import Display


@program
def main(argv: list[str]) -> int:
    """The orchestrator of a run; on any other rank the guard of its worker."""
    if os.environ.get("RANK", "0") != "0":
        return Guard(start_timeout_s(argv)).run()
    # Hydra's own flags (--help, --cfg job, --multirun) bring their own syntax: it checks what it composes.
    if not any(item.startswith("-") for item in argv):
        check_start(read_config(argv))
    return run_hydra(argv)


def run_hydra(argv: list[str]) -> int:
    """Composes the configuration and runs it, or with --multirun several; the worst exit code of its runs."""
    codes = []

    @hydra.main(version_base=None, config_path=str(CONFIG_FOLDER), config_name="run")
    def compose_and_run(composed: DictConfig) -> None:
        codes.append(run_composed(composed))
        if codes[-1] == ExitCode.interrupted:
            sys.exit(ExitCode.interrupted)

    outer, sys.argv = sys.argv, [sys.argv[0], *argv]
    try:
        compose_and_run()
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else ExitCode.done
    finally:
        sys.argv = outer
    return max(codes, default=ExitCode.done)


def run_composed(composed: DictConfig) -> ExitCode:
    """One run in the folder that Hydra made.

    It handles its own errors: what Hydra catches, it reports as its own, with exit code 1.
    """
    try:
        config = to_config(composed)
        check_start(config)
    except ConfigError as error:
        return refuse(error)
    return run(config, Path(HydraConfig.get().runtime.output_dir))


def run(config: RunConfig, folder: Path, console: Console | None = None) -> ExitCode:
    """One run with all its errors; the exit code."""
    config.output = os.path.relpath(folder)
    display, interruption = Display(console or Console()), Interruption()
    generation = GenerationRun(config=config, folder=folder, display=display, interruption=interruption)
    try:
        with interruption, display:
            return generation.run()
    except KeyboardInterrupt:
        return ExitCode.interrupted
    except ConfigError as error:
        return refuse(error)
    except Exception as error:
        return fail(error, generation.phase, folder)


if __name__ == "__main__":
    sys.exit(main())
