"""Generates from a long document: torchrun launch/run.py key=value ... (keys: conf/schema.py, groups: conf/).

Exit codes: 0 done, with result.json written, whoever reads what is shown; 1 failed at run time, with one line naming
role, rank and phase; 2 bad configuration or input, with one message; 130 interrupted. torch is imported only after the
configuration was found good.
"""

from __future__ import annotations

import os
import sys
import time

from conf.schema import ConfigError, RunConfig
from launch.assembly.start_checks import check_start
from launch.command_line.as_typed import as_typed
from launch.command_line.cluster import Place, check_meeting_point, read_place
from launch.command_line.outcome import ExitCode
from launch.command_line.overrides import read_config, start_timeout_s
from launch.command_line.program import program
from launch.processes.composed_run import run_all
from launch.processes.guard import Guard

REFUSAL_SECONDS = 2.0
"""Time for rank 0 to say what is refused, before another rank ends."""


@program
def main(argv: list[str]) -> int:
    """The orchestrator of a run; on any other rank the guard of its worker."""
    place, has_flags = read_place(os.environ), any(item.startswith("-") for item in argv)
    if place.world_size > 1 and is_multirun(argv):
        return refuse_several_runs(place)
    if place.rank != 0 and has_flags:
        return ExitCode.done  # rank 0 shows what is asked for (--help, --cfg job), and there is no run
    if place.rank != 0:
        check_meeting_point(os.environ)
        return Guard(start_timeout_s(argv)).run()
    # Hydra's own flags (--help, --cfg job, --multirun) bring their own syntax: it checks what it composes.
    if not has_flags and not is_multirun(argv):
        check_start(read_config(argv))
    return run_all([as_typed(item, RunConfig, is_sweep=is_multirun(argv)) for item in argv])


def is_multirun(argv: list[str]) -> bool:
    """Whether Hydra is asked for several runs."""
    flags = [item for item in argv if item.startswith("-")]
    is_flag = any(item == "-m" or (len(item) > len("--") and "--multirun".startswith(item)) for item in flags)
    return is_flag or "hydra.mode=multirun" in (item.lstrip("+").lower() for item in argv)


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


if __name__ == "__main__":
    sys.exit(main())
