"""Runs as Hydra composes them: each in a folder of its own, with all its errors told and turned into an exit code."""

from __future__ import annotations

import copy
import json
import os
import sys
from pathlib import Path
from typing import cast

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from conf.schema import ConfigError, RunConfig
from launch.assembly.run_folder import EXAMPLE, claim
from launch.assembly.start_checks import check_start, unwritable
from launch.command_line.hydra_main import run_hydra
from launch.command_line.interruption import Interruption
from launch.command_line.outcome import ExitCode, fail, refuse, shown_path
from launch.command_line.overrides import explained, to_config
from launch.command_line.streams import reason_output_is_lost
from launch.processes.generation_run import GenerationRun
from orchestrator.display import Display
from orchestrator.run_files import RESULT

HYDRA_RECORDS = ".hydra"
"""Folder, in a run's, with its configuration as Hydra writes it."""
FULL_ERRORS = "HYDRA_FULL_ERROR"
"""Environment: Hydra raises what it would else print."""


def run_all(argv: list[str]) -> int:
    """Composes the configuration and runs it, or with --multirun several; the worst exit code of its runs."""
    codes = []

    def compose_and_run(composed: DictConfig) -> None:
        codes.append(run_composed(composed))
        if codes[-1] == ExitCode.interrupted:
            sys.exit(ExitCode.interrupted)

    earlier = os.environ.get(FULL_ERRORS, "0")
    os.environ[FULL_ERRORS] = "1"
    try:
        return max([run_hydra(compose_and_run, argv, "run"), *codes])
    except (HydraException, OmegaConfBaseException) as error:
        return refuse(explained(error, []))
    except OSError as error:
        # Of the folders that Hydra makes; a run handles its own errors.
        return refuse(unwritable("output", str(error.filename), error, EXAMPLE))
    finally:
        os.environ[FULL_ERRORS] = earlier


def run_composed(composed: DictConfig) -> ExitCode:
    """One run in the folder that Hydra made, or in one beside it where another run has that already.

    It handles its own errors: what Hydra catches, it reports as its own, with exit code 1.
    """
    try:
        config = to_config(composed)
        check_start(config)
        with claim(Path(HydraConfig.get().runtime.output_dir), is_chosen=is_folder_chosen()) as claimed:
            write_configuration(composed, claimed.path)
            return run(config, claimed.path)
    except ConfigError as error:
        return refuse(error)


def is_folder_chosen() -> bool:
    """Whether the user named the run's folder; else it is named after the time."""
    hydra_config = HydraConfig.get()
    keys = ("hydra.sweep.",) if hydra_config.mode is RunMode.MULTIRUN else ("output=", "hydra.run.")
    return any(
        text.lstrip("+").startswith(keys) for text in (*hydra_config.overrides.task, *hydra_config.overrides.hydra)
    )


def write_configuration(composed: DictConfig, folder: Path) -> None:
    """Hydra's record of the run, which Hydra itself would write before anybody knows whose folder it is."""
    of_hydra = cast(DictConfig, copy.deepcopy(HydraConfig.instance().cfg))
    with read_write(of_hydra.hydra.runtime):
        of_hydra.hydra.runtime.output_dir = str(folder)
    records = {"config": composed, "hydra": of_hydra, "overrides": of_hydra.hydra.overrides.task}
    try:
        (folder / HYDRA_RECORDS).mkdir(exist_ok=True)
        for name, record in records.items():
            OmegaConf.save(record, folder / HYDRA_RECORDS / f"{name}.yaml")
    except OSError as error:
        raise unwritable("output", shown_path(folder), error, EXAMPLE) from None


def run(config: RunConfig, folder: Path, console: Console | None = None) -> ExitCode:
    """One run with all its errors; the exit code."""
    config.output = shown_path(folder)
    display, interruption = Display(console or Console()), Interruption()
    generation = GenerationRun(config=config, folder=folder, display=display, interruption=interruption)
    try:
        with interruption, display:
            code = generation.run()
        if (reason := reason_output_is_lost()) is not None:
            path = shown_path(folder / RESULT)
            print(f"tierforce: standard output is lost ({reason}); the result is in {path}", file=sys.stderr)
        return code
    except KeyboardInterrupt:
        return ExitCode.interrupted
    except ConfigError as error:
        return refuse(error)
    except Exception as error:
        if generation.unwritten_result is not None:
            last_resort = sys.stdout if reason_output_is_lost() is None else sys.stderr
            print(json.dumps(generation.unwritten_result), file=last_resort, flush=True)
        return fail(error, generation.phase, folder)
