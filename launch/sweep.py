"""Runs a grid of settings and makes one table of it: python launch/sweep.py -m decoding.gamma1=1,2,4 key=value ...

The keys are those of launch/run.py, and a few of the sweep (launch/sweeps/config.py); experiment=NAME takes the grid of
conf/experiment. Each job is a run in processes of its own. A sweep goes on where an earlier one in the same folder
stopped. Hydra's launchers and sweepers work where they are installed: docs/sweeps.md. Draw it with launch/report.py.

Exit codes: 0 all done; 1 some failed; 2 bad configuration; 130 interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType

import hydra
from rich.console import Console
from rich.text import Text

from conf.schema import ConfigError
from launch.command_line.outcome import ExitCode, refuse
from launch.command_line.overrides import CONFIG_FOLDER
from launch.sweeps.config import Sweep, read_sweep
from launch.sweeps.job import jobs_of, run_jobs
from launch.sweeps.progress import SweepProgress, described, figures_of
from launch.sweeps.table import DONE as ROW_DONE
from launch.sweeps.table import axes_of, read_rows, write_table
from orchestrator.display import harmless

MULTIRUN = ("-m", "--multirun")


def main(argv: list[str] | None = None, console: Console | None = None) -> int:
    """The program; `argv` without its name."""
    argv = sys.argv[1:] if argv is None else argv
    console = console or Console()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        if os.environ.get("RANK", "0") != "0":
            return ExitCode.refused
        return refuse(
            ConfigError("launch/sweep.py starts torchrun itself, for each job: python launch/sweep.py -m ...")
        )
    overrides = [text for text in argv if text not in MULTIRUN]
    is_multirun = len(overrides) < len(argv)
    if any(text.startswith("-") for text in overrides):
        return run_hydra(argv)  # --help, --cfg job: no job is run
    try:
        sweep = read_sweep(overrides, is_multirun=is_multirun)
    except ConfigError as error:
        return refuse(error)
    return run_sweep(sweep, console, is_multirun=is_multirun)


def run_sweep(sweep: Sweep, console: Console, *, is_multirun: bool) -> int:
    """All jobs, with whatever launcher; what they left is then in the table."""
    folder = Path(sweep.cfg.output).absolute()
    expected, axes = None, sweep.axes
    if sweep.grid is not None:
        jobs = {job.id: job for cfg in sweep.grid for job in jobs_of(cfg)}
        expected, axes = set(jobs), axes_of(job.row() for job in jobs.values())
    flags = ["-m", f"hydra.sweep.dir={folder}"] if is_multirun else []
    # Launchers that start Python anew find the project there.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(CONFIG_FOLDER.parent), os.environ.get("PYTHONPATH")]))
    handler = signal.signal(signal.SIGTERM, _interrupt)
    progress = SweepProgress(folder, console, expected=expected, total=sweep.num_jobs, axes=axes)
    try:
        with progress:
            code = run_hydra([*flags, *sweep.arguments])
    except KeyboardInterrupt:
        code = ExitCode.interrupted
    finally:
        signal.signal(signal.SIGTERM, handler)
    summarise(folder, progress, axes, console)
    if code in (ExitCode.done, ExitCode.failed):
        failed = [row for row in progress.rows if row["status"] != ROW_DONE]
        is_whole = not failed and code == ExitCode.done and not (expected is not None and progress.num_left)
        code = ExitCode.done if is_whole else ExitCode.failed
    return code


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def summarise(folder: Path, progress: SweepProgress, axes: list[str], console: Console) -> None:
    """The fastest setting, what there is, and where."""
    rows = read_rows(folder)
    paths = write_table(folder, rows)
    timed = [row for row in progress.rows if row["status"] == ROW_DONE and row["tbt_ms"] is not None]
    lines = [progress.status()]
    if len(timed) > 1:
        fastest = min(timed, key=lambda row: row["tbt_ms"])
        lines.append(f"fastest: {described(fastest, axes)}: {figures_of(fastest)}")
    lines.append(f"{' and '.join(os.path.relpath(path) for path in paths)}: {len(rows)} rows")
    for line in lines:
        console.print(Text(harmless(line)), soft_wrap=True, highlight=False)


def run_hydra(argv: list[str]) -> int:
    """0, or what Hydra exits with."""
    outer, sys.argv = sys.argv, [sys.argv[0], *argv]
    try:
        hydra.main(version_base=None, config_path=str(CONFIG_FOLDER), config_name="sweep")(run_jobs)()
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else ExitCode.done
    finally:
        sys.argv = outer
    return ExitCode.done


if __name__ == "__main__":
    # Messages may hold what the terminal's encoding does not.
    sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main())
