"""Generates from a long document: torchrun launch/run.py key=value ... (keys: conf/schema.py, groups: conf/).

Exit codes: 0 done, with result.json written, whoever reads what is shown; 1 failed at run time, with one line naming
role, rank and phase; 2 bad configuration or input, with one message; 130 interrupted. torch is imported only after the
configuration was found good.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import time
from pathlib import Path
from typing import cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from conf.schema import ConfigError, RunConfig
from launch.assembly.run_folder import EXAMPLE, claim
from launch.assembly.start_checks import check_start, unwritable
from launch.command_line.as_typed import as_typed
from launch.command_line.cluster import Place, check_meeting_point, read_place
from launch.command_line.interruption import Interruption
from launch.command_line.outcome import ExitCode, fail, refuse, shown_path
from launch.command_line.overrides import CONFIG_FOLDER, explained, read_config, start_timeout_s, to_config
from launch.command_line.program import program
from launch.command_line.streams import reason_output_is_lost
from launch.processes.generation_run import GenerationRun
from launch.processes.guard import Guard
from orchestrator.display import Display
from orchestrator.run_files import RESULT

HYDRA_RECORDS = ".hydra"
"""Folder, in a run's, with its configuration as Hydra writes it."""
FULL_ERRORS = "HYDRA_FULL_ERROR"
"""Environment: Hydra raises what it would else print."""

REFUSAL_SECONDS = 2.0
"""Time for rank 0 to say what is refused, before another rank ends."""


@program
def main(argv: list[str]) -> int:
    """The orchestrator of a run; on any other rank the guard of its worker."""
    place = read_place(os.environ)
    if place.world_size > 1 and is_multirun(argv):
        return refuse_several_runs(place)
    if place.rank != 0:
        check_meeting_point(os.environ)
        return Guard(start_timeout_s(argv)).run()
    # Hydra's own flags (--help, --cfg job, --multirun) bring their own syntax: it checks what it composes.
    if not any(item.startswith("-") for item in argv):
        check_start(read_config(argv))
    return run_hydra([as_typed(item, RunConfig, is_sweep=is_multirun(argv)) for item in argv])


def is_multirun(argv: list[str]) -> bool:
    """Whether Hydra is asked for several runs."""
    flags = [item for item in argv if item.startswith("-")]
    is_flag = any(item == "-m" or (len(item) > len("--") and "--multirun".startswith(item)) for item in flags)
    return is_flag or "hydra.mode=multirun" in map(str.lower, argv)


def refuse_several_runs(place: Place) -> int:
    """Refuses them to processes that torchrun started once. Raises ConfigError in the one that is to say so."""
    if place.rank == 0:
        raise ConfigError(
            f"--multirun over {place.world_size} processes: torchrun starts them for one run; it must be "
            f"python launch/sweep.py -m processes={place.world_size} ..., which starts torchrun for each run"
        )
    # torchrun ends all when the first of them ends, and rank 0 has something to say.
    time.sleep(REFUSAL_SECONDS)
    return ExitCode.refused


def run_hydra(argv: list[str]) -> int:
    """Composes the configuration and runs it, or with --multirun several; the worst exit code of its runs."""
    codes = []

    @hydra.main(version_base=None, config_path=str(CONFIG_FOLDER), config_name="run")
    def compose_and_run(composed: DictConfig) -> None:
        codes.append(run_composed(composed))
        if codes[-1] == ExitCode.interrupted:
            sys.exit(ExitCode.interrupted)

    outer, sys.argv = sys.argv, [sys.argv[0], *argv]
    earlier = os.environ.get(FULL_ERRORS, "0")
    os.environ[FULL_ERRORS] = "1"
    try:
        compose_and_run()
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else ExitCode.done
    except (HydraException, OmegaConfBaseException) as error:
        return refuse(explained(error, []))
    except OSError as error:
        # Of the folders that Hydra makes; a run handles its own errors.
        return refuse(unwritable("output", str(error.filename), error, EXAMPLE))
    finally:
        sys.argv, os.environ[FULL_ERRORS] = outer, earlier
    return max(codes, default=ExitCode.done)


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
    return any(text.startswith(keys) for text in (*hydra_config.overrides.task, *hydra_config.overrides.hydra))


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


if __name__ == "__main__":
    sys.exit(main())
