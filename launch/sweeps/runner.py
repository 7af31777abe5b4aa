"""Runs the jobs of a sweep with whatever launcher of Hydra, and puts their table together."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from rich.console import Console
from rich.text import Text

from launch.command_line.hydra_main import run_hydra
from launch.command_line.interruption import Interruption
from launch.command_line.outcome import ExitCode, shown_path
from launch.command_line.overrides import CONFIG_FOLDER
from launch.sweeps.config import Sweep, read_sweep
from launch.sweeps.job import RUN_PROGRAM, jobs_of, override_of, run_jobs
from launch.sweeps.progress import SweepProgress, described, figures_of
from launch.sweeps.table import JobStatus, axes_of, read_rows, write_table
from orchestrator.display import harmless

MULTIRUN = ("-m", "--multirun")


def run_sweep(argv: list[str], console: Console, program: Path = RUN_PROGRAM) -> int:
    """Runs the sweep that a command line asks for, each job a run of `program`; returns the exit code.

    Raises ConfigError for what can be right in no job.
    """
    overrides = [text for text in argv if text not in MULTIRUN]
    is_multirun = len(overrides) < len(argv)
    if any(text.startswith("-") for text in overrides):
        return run_sweep_jobs(argv, program)  # --help, --cfg job: no job is run
    return run_all(read_sweep(overrides, is_multirun=is_multirun), console, program, is_multirun=is_multirun)


def run_all(sweep: Sweep, console: Console, program: Path, *, is_multirun: bool) -> int:
    """Runs all jobs; what they left is then in the table. Returns the exit code, which tells whether some failed."""
    folder = Path(sweep.cfg.output).expanduser().absolute()
    expected, axes = None, sweep.axes
    if sweep.grid is not None:
        jobs = {job.id: job for cfg in sweep.grid for job in jobs_of(cfg)}
        expected, axes = set(jobs), axes_of(job.row() for job in jobs.values())
    flags = ["-m", override_of("hydra.sweep.dir", str(folder))] if is_multirun else []
    # Launchers that start Python anew find the project there.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(CONFIG_FOLDER.parent), os.environ.get("PYTHONPATH")]))
    progress = SweepProgress(folder, console, expected=expected, total=sweep.num_jobs, axes=axes)
    try:
        with Interruption(), progress:
            code = run_sweep_jobs([*flags, *sweep.arguments], program)
    except KeyboardInterrupt:
        code = ExitCode.interrupted
    summarise(folder, progress, axes, console)
    if code in (ExitCode.done, ExitCode.failed):
        failed = [row for row in progress.rows if row["status"] != JobStatus.done]
        is_whole = not failed and code == ExitCode.done and not (expected is not None and progress.num_left)
        code = ExitCode.done if is_whole else ExitCode.failed
    return code


def summarise(folder: Path, progress: SweepProgress, axes: list[str], console: Console) -> None:
    """Writes the table, and says what is in it and which setting was the fastest."""
    rows = read_rows(folder)
    paths = write_table(folder, rows)
    timed = [row for row in progress.rows if row["status"] == JobStatus.done and row["tbt_ms"] is not None]
    lines = [progress.status()]
    if len(timed) > 1:
        fastest = min(timed, key=lambda row: row["tbt_ms"])
        lines.append(f"fastest: {described(fastest, axes)}: {figures_of(fastest)}")
    lines.append(f"{' and '.join(map(shown_path, paths))}: {len(rows)} rows")
    for line in lines:
        console.print(Text(harmless(line)), soft_wrap=True, highlight=False)


def run_sweep_jobs(argv: list[str], program: Path) -> int:
    """Has Hydra run the jobs of its own command line; returns 0, or what Hydra exits with."""
    # Hydra names a job after the module of its task, and launchers send the task to other processes.
    task = functools.update_wrapper(functools.partial(run_jobs, program=program), run_jobs)
    return run_hydra(task, argv, "sweep")
