"""One job of a sweep: what Hydra's launchers call, in whichever process or machine they choose.

It starts launch/run.py in a process of its own (torchrun for several), so that a job that fails, or is killed, takes
nothing else with it; and it leaves a row, whatever happened. Its folder is named after its settings: the same settings
come to the same folder, where a result that is complete is not computed again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import platform
import re
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from omegaconf import DictConfig, OmegaConf

from conf.schema import ConfigError, RunConfig
from launch.command_line.as_typed import quoted
from launch.command_line.outcome import FAILURE_LOG, ExitCode
from launch.command_line.timing import Stopwatch
from launch.sweeps.config import refusal_of
from launch.sweeps.table import (
    JOBS,
    ROW,
    JobStatus,
    SweepRow,
    finished_result,
    flat,
    row_of_result,
    settings_of,
    takes_part,
    write_row,
)

RUN_PROGRAM = Path(__file__).resolve().parents[1] / "run.py"
LOG = "job.log"
LOCK = ".lock"
ID_CHARS = 12
CLOSING_SECONDS = 20.0
"""A job that is asked to end has so long before it is killed."""


def run_jobs(cfg: DictConfig, program: Path = RUN_PROGRAM) -> float:
    """Runs the repetitions of one setting; returns the objective for a sweeper that looks for its least value."""
    config = _plain(cfg)
    sign = -1.0 if config["objective"].startswith("-") else 1.0
    rows = [job.run(resume=config["resume"], timeout_s=config["timeout_s"]) for job in jobs_of(cfg, program)]
    column = config["objective"].removeprefix("-")
    values: list[float] = [row[column] for row in rows if row["status"] == JobStatus.done and row[column] is not None]
    if len(values) < len(rows):
        return math.inf  # worse than any: a sweeper goes on elsewhere
    return sign * statistics.median(values)


def _plain(cfg: DictConfig) -> dict[str, Any]:
    """A configuration as nested dictionaries of JSON types, references resolved."""
    plain = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


@dataclass(kw_only=True, frozen=True)
class SweepJob:
    """One run of `program`, which is launch/run.py or, in tests, what stands for it."""

    program: Path
    sweep_folder: Path
    overrides: tuple[str, ...]
    """The settings that differ from the defaults of a run."""
    settings: dict[str, Any]
    """All settings by their key, as the row has them."""
    processes: int
    repetition: int
    refusal: ConfigError | None
    """Why it is not even started."""

    @property
    def id(self) -> str:
        """A name made of the settings, in whatever order they were given."""
        content = json.dumps([sorted(self.overrides), self.processes, self.repetition])
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:ID_CHARS]

    @property
    def folder(self) -> Path:
        """The job's folder, with its row, log and result."""
        return self.sweep_folder / JOBS / self.id

    @property
    def command(self) -> list[str]:
        """The command line of the run, under torchrun for several processes."""
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.processes}"]
        launcher = torchrun if self.processes > 1 else []
        return [sys.executable, *launcher, str(self.program), *self.overrides, override_of("output", str(self.folder))]

    def run(self, *, resume: bool, timeout_s: float | None) -> SweepRow:
        """Runs the job, if there is no result to `resume` from, and leaves its row in the folder; returns the row.

        Interrupted by KeyboardInterrupt it leaves none.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / LOCK):
            result = finished_result(self.folder) if resume else None
            if result is None:
                for name in (ROW, FAILURE_LOG):
                    (self.folder / name).unlink(missing_ok=True)
                row = self._refused() if self.refusal is not None else self._started(timeout_s)
            else:
                earlier = self._earlier_row()
                row = self.row(JobStatus.done, exit_code=0, seconds=earlier.get("seconds"), host=earlier.get("host"))
                row |= row_of_result(result)
            write_row(self.folder, row)
        return row

    def _earlier_row(self) -> SweepRow:
        """The row that an earlier sweep left; empty where there is none."""
        try:
            row: SweepRow = json.loads((self.folder / ROW).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return row

    def row(self, status: JobStatus | None = None, **columns: Any) -> SweepRow:
        """JOB_COLUMNS and settings: what is known of the job whatever it measures."""
        row: SweepRow = {
            "id": self.id,
            "status": status,
            "exit_code": None,
            "message": None,
            "log": None,
            "seconds": None,
        }
        row |= {"host": platform.node(), "processes": self.processes, "repetition": self.repetition}
        return row | columns | self.settings

    def _refused(self) -> SweepRow:
        """The row of a job that is not started."""
        return self.row(JobStatus.refused, exit_code=ExitCode.refused, message=str(self.refusal), seconds=0.0)

    def _started(self, timeout_s: float | None) -> SweepRow:
        """Starts the program, waits for its end, and makes the row of what it left."""
        with (self.folder / LOG).open("wb") as log, Stopwatch() as watch:
            exit_code = ended(self.command, log, timeout_s)
        columns: dict[str, Any] = {"exit_code": exit_code, "seconds": watch.seconds, "log": self._log_path()}
        result = finished_result(self.folder)
        if exit_code == 0 and result is not None:
            return self.row(JobStatus.done, **columns) | row_of_result(result)
        status = JobStatus.refused if exit_code == ExitCode.refused else JobStatus.failed
        message = last_message(self.folder / LOG)
        if exit_code is None:
            message = f"took longer than timeout_s={timeout_s:g}"
        elif exit_code < 0:
            message = f"ended by {signal.Signals(-exit_code).name}; {message}".removesuffix("; ")
        return self.row(status, message=message, **columns)

    def _log_path(self) -> str:
        """Path of the traceback where there is one, else of the log; relative to the sweep's folder, which may move."""
        name = FAILURE_LOG if (self.folder / FAILURE_LOG).exists() else LOG
        return str((self.folder / name).relative_to(self.sweep_folder))


def jobs_of(cfg: DictConfig, program: Path = RUN_PROGRAM) -> list[SweepJob]:
    """A job for each repetition of a configuration, be it legal or not."""
    config, of_run = _plain(cfg), _plain(OmegaConf.structured(RunConfig))
    defaults, mode = flat(of_run), config["decoding"]["mode"]
    values = flat({name: config[name] for name in of_run if name != "output"})
    changes = {key: value for key, value in values.items() if value != defaults[key] and takes_part(key, mode)}
    repetition = config["repetition"]
    # Not resolved: jobs of one sweep agree on it wherever they are.
    folder = Path(config["output"]).expanduser().absolute()
    return [
        SweepJob(
            program=program,
            sweep_folder=folder,
            overrides=tuple(override_of(key, value) for key, value in changes.items()),
            settings=settings_of({name: config[name] for name in of_run}),
            processes=config["processes"],
            repetition=index,
            refusal=refusal_of(cfg),
        )
        for index in ([repetition] if repetition is not None else range(1, config["repeat"] + 1))
    ]


def override_of(key: str, value: Any) -> str:
    """key=value in Hydra's grammar, for any value of a configuration."""
    return f"{key}={_literal(value)}"


def _literal(value: Any) -> str:
    """A value in Hydra's grammar."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(_literal(item) for item in value)}]"
    if not isinstance(value, str):
        return repr(value)
    # A backslash is itself unless it stands before a reference, which is none here.
    return quoted(re.sub(r"(\\*)\$\{", r"\1\1\\${", value))


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Within it no other process works on the job; the system frees the lock of one that dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def ended(command: list[str], log: BinaryIO, timeout_s: float | None) -> int | None:
    """Runs a command to its end; returns its exit code, None when it took too long.

    A Ctrl-C ends the command in good order before it is passed on.
    """
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(CLOSING_SECONDS)
            process.kill()
            process.wait()


def last_message(log: Path) -> str:
    """Our own line for what went wrong, or the last line there is."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    ours = [line.removeprefix("tierforce: ") for line in lines if line.startswith("tierforce: ")]
    return (ours or lines or [""])[-1]
