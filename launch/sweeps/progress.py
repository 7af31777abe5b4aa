"""Shows how a sweep goes: what is done, failed and left, and when it will be over; and keeps its table up to date.

It reads the rows that jobs leave in the sweep's folder, so it does not matter where they run.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from launch.sweeps.table import JOBS, ROW, JobStatus, SweepRow, read_rows, write_table
from orchestrator.display import harmless
from orchestrator.run_files import RESULT

SECONDS_BETWEEN_LOOKS = 0.5
SHOWN_METRICS = (
    ("tbt_ms", "TBT {:.1f} ms"),
    ("tokens_per_verification", "{:.2f} tokens/verification"),
    ("retrieval_acceptance", "retrieval {:.0%} accepted"),
    ("drafter_acceptance", "drafter {:.0%} accepted"),
)
"""Columns of a row, and how a line shows them."""


class SweepProgress:
    """A context manager that looks into the folder from a thread of its own while the jobs run.

    `expected`: the jobs by their id; None where a sweeper chooses as it goes, and then `total` is how many it will
    (None: nobody knows). `axes` are the settings that tell jobs apart.
    """

    def __init__(
        self,
        folder: Path,
        console: Console,
        *,
        expected: set[str] | None,
        total: int | None,
        axes: list[str],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._folder, self._console, self._expected, self._clock = folder, console, expected, clock
        self._axes = axes
        self._total = total if expected is None else len(expected)
        self._stamps, self._results_before = self._stamps_of(ROW), self._stamps_of(RESULT)
        """When each row and result was written; what is there before the sweep starts is not its own."""
        self._new: dict[str, SweepRow] = {}
        self._num_taken_up = 0
        self._began = clock()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="sweep-progress", daemon=True)
        self._live: Live | None = None

    def __enter__(self) -> SweepProgress:
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        self._thread.join()
        self.look()
        if self._live is not None:
            self._live.stop()

    @property
    def rows(self) -> list[SweepRow]:
        """The rows of the jobs that ended in this sweep."""
        return list(self._new.values())

    @property
    def num_left(self) -> int:
        """Jobs that have not ended yet, as far as their number is known."""
        return max(0, (self._total or 0) - len(self._new))

    def look(self) -> None:
        """Shows what has changed since the last time."""
        stamps = self._stamps_of(ROW)
        changed = {job for job, stamp in stamps.items() if self._stamps.get(job) != stamp}
        if self._expected is not None:
            changed &= self._expected
        if changed:
            rows = read_rows(self._folder)
            write_table(self._folder, rows)
            results = self._stamps_of(RESULT)
            for row in rows:
                if (job := row["id"]) in changed:
                    before = self._results_before.get(job)
                    self._take(row, is_old=before is not None and before == results.get(job))
            self._stamps |= stamps
        if self._live is not None:
            self._live.update(Text(self.status()), refresh=True)

    def status(self) -> str:
        """One line: how many jobs are done, failed and left, and how long they will take."""
        num_done = sum(row["status"] == JobStatus.done for row in self._new.values())
        earlier = f" ({self._num_taken_up} of them before)" if self._num_taken_up else ""
        parts = [f"{num_done} done{earlier}", f"{len(self._new) - num_done} failed"]
        if self._total is not None:
            parts.append(f"{self.num_left} left")
        if self.num_left and (seconds := self._seconds_left()) is not None:
            parts.append(f"about {duration(seconds)}")
        return ", ".join(parts)

    def _seconds_left(self) -> float | None:
        """Seconds until the end at the pace so far; jobs that were there already took no time."""
        num_run = len(self._new) - self._num_taken_up
        return (self._clock() - self._began) / num_run * self.num_left if num_run else None

    def _take(self, row: SweepRow, *, is_old: bool) -> None:
        """Counts a job that has ended, and says so; `is_old`: an earlier sweep computed its result."""
        is_new = row["id"] not in self._new
        self._new[row["id"]] = row
        if row["status"] == JobStatus.done and (is_old or not is_new):
            self._num_taken_up += is_old and is_new
            return
        if row["status"] == JobStatus.done:
            what = f"{figures_of(row)} ({duration(row['seconds'])})"
        else:
            what = row["message"] + (f" ({self._folder / row['log']})" if row["log"] else "")
        total = "" if self._total is None else f"/{self._total}"
        line = ": ".join(filter(None, (f"[{len(self._new)}{total}] {row['status']}", described(row, self._axes), what)))
        if self._live is None:
            line += f"; {self.status()}"
        self._console.print(Text(harmless(line)), soft_wrap=True, highlight=False)

    def _stamps_of(self, name: str) -> dict[str, int]:
        """When this file of each job was written, in nanoseconds, by the job's id."""
        return {path.parent.name: path.stat().st_mtime_ns for path in (self._folder / JOBS).glob(f"*/{name}")}

    def _watch(self) -> None:
        """Looks again and again, in a thread, until the sweep is over."""
        while not self._is_over.wait(SECONDS_BETWEEN_LOOKS):
            self.look()


def described(row: SweepRow, axes: list[str]) -> str:
    """The settings on `axes` that a job has: what sets it apart from the others."""
    return " ".join(f"{key}={row[key]}" for key in axes if row.get(key) is not None)


def figures_of(row: SweepRow) -> str:
    """The measurements of a job, in one line."""
    return ", ".join(form.format(row[key]) for key, form in SHOWN_METRICS if row.get(key) is not None)


def duration(seconds: float) -> str:
    """A time for people: 48 s, 12 min, 3 h 05 min."""
    minutes, hours = round(seconds / 60), int(seconds // 3600)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if hours < 1 else f"{minutes // 60} h {minutes % 60:02} min"
