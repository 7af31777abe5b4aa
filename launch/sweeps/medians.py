"""Points of a report: the rows of a sweep as medians over repetitions and seeds, each with its speed-up."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.schema import ConfigError, Mode
from launch.command_line.timing import median_or_none
from launch.sweeps.table import (
    JOBS,
    TABLE,
    TAKES_NO_PART,
    JobStatus,
    SweepRow,
    axes_of,
    finished_result,
    is_setting,
    read_rows,
    read_table,
    row_of_result,
    sort_key,
)
from orchestrator.run_files import RESULT

BASELINE = str(Mode.autoregressive)
"""The decoding.mode that a speed-up is over."""
SEED = "sampling.seed"
"""Rows that differ in nothing else, or are repetitions, measure the same thing."""
MODE = "mode"
Identity = tuple[tuple[str, str], ...]
"""Settings by which runs are told apart, so that they can be hashed: keys and values as texts."""
GAMMA1, GAMMA2 = "decoding.gamma1", "decoding.gamma2"
SYMBOLS = {GAMMA1: "γ1", GAMMA2: "γ2", "prompt.max_tokens": "context", "decoding.mode": MODE}
"""Short names of settings; of any other the last part of its key."""


@dataclass(kw_only=True)
class Point:
    """One setting, and its rows: runs that are done and timed."""

    settings: dict[str, Any]
    rows: list[SweepRow]
    speedup: float | None = None
    """Over the baseline with the same other settings; None where there is none."""

    @property
    def tbt_ms(self) -> float:
        """The median time between tokens."""
        return statistics.median(self.values("tbt_ms"))

    def median(self, metric: str) -> float | None:
        """The median of a column over the rows; None where no row has it."""
        return median_or_none(self.values(metric))

    def values(self, metric: str) -> list[float]:
        """A column of the rows that have it."""
        return [row[metric] for row in self.rows if row.get(metric) is not None]

    def per_position(self, level: str) -> list[float]:
        """The acceptance at each position of a block; medians of those rows that have it."""
        lists = [row.get(f"{level}_accepted_per_position") or [] for row in self.rows]
        longest = max(map(len, lists))
        return [statistics.median(rates[i] for rates in lists if i < len(rates)) for i in range(longest)]

    @property
    def is_baseline(self) -> bool:
        """Speed-ups are over this point: nothing is drafted."""
        return self.settings.get("decoding.mode") == BASELINE


@dataclass(kw_only=True)
class Results:
    """A table, made ready to be drawn."""

    points: list[Point]
    axes: list[str]
    """The settings in which points differ."""
    not_done: list[SweepRow] = field(default_factory=list)

    @property
    def speculating(self) -> list[Point]:
        """The points that are no baselines."""
        return [point for point in self.points if not point.is_baseline]

    @property
    def common(self) -> dict[str, Any]:
        """The settings that all points share."""
        first = self.points[0].settings if self.points else {}
        return {key: value for key, value in first.items() if key not in self.axes and value is not None}


def load(source: Path) -> list[SweepRow]:
    """The rows of a sweep's folder, a folder of runs, or a table's file. Raises ConfigError for anything else."""
    if source.is_dir():
        if (source / JOBS).is_dir():
            rows = read_rows(source)
        else:
            of_runs = (_row_of_run(path.parent) for path in sorted(source.rglob(RESULT)))
            rows = [row for row in of_runs if row is not None]
        if not rows and (source / f"{TABLE}.csv").is_file():
            rows = read_table(source / f"{TABLE}.csv")
    elif source.is_file():
        try:
            rows = read_table(source)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"{str(source)!r} is no table: {error}") from None
    else:
        raise ConfigError(f"{str(source)!r} is neither a folder nor a table, for example outputs/sweep")
    if not rows:
        raise ConfigError(f"{str(source)!r} has no runs; it must be a sweep's folder, a folder of runs, or a table.csv")
    if missing := {"tbt_ms", "decoding.mode"} - set().union(*rows):
        raise ConfigError(f"{str(source)!r} is no table of runs: it has no column {', '.join(sorted(missing))}")
    return rows


def _row_of_run(folder: Path) -> SweepRow | None:
    """The row of a run that was no job of a sweep; None where it has no result."""
    result = finished_result(folder)
    return None if result is None else {"id": str(folder), "status": JobStatus.done} | row_of_result(result)


def where(rows: list[SweepRow], conditions: Iterable[tuple[str, str]]) -> list[SweepRow]:
    """The rows with these settings; a baseline has no part in some, and stays. Raises ConfigError."""
    for key, text in conditions:
        if not any(key in row for row in rows):
            raise ConfigError(f"--where {key}={text}: the table has no column {key}")
        rows = [row for row in rows if row.get(key) is None or text in (str(row[key]), json.dumps(row[key]))]
        if not rows:
            raise ConfigError(f"--where {key}={text}: no row of the table is so")
    return rows


def results_of(rows: list[SweepRow]) -> Results:
    """Medians and speed-ups of the rows that are done."""
    done = [
        row for row in rows if row.get("status", JobStatus.done) == JobStatus.done and row.get("tbt_ms") is not None
    ]
    groups: dict[Identity, Point] = {}
    for row in done:
        settings = {key: value for key, value in row.items() if is_setting(key) and key != SEED}
        group = groups.setdefault(_identity(settings), Point(settings=settings, rows=[]))
        group.rows.append(row)
    points = list(groups.values())
    _add_speedups(points)
    axes = axes_of(point.settings for point in points)
    points.sort(key=lambda point: [sort_key(point.settings.get(axis)) for axis in axes])
    return Results(points=points, axes=axes, not_done=[row for row in rows if row not in done])


def _identity(settings: dict[str, Any]) -> Identity:
    """Settings in a form that can be hashed, without those that have no part in a run."""
    return tuple(sorted((key, repr(value)) for key, value in settings.items() if value is not None))


def _add_speedups(points: list[Point]) -> None:
    """Sets the speed-up of each point that has a baseline."""
    baselines = {shared_with_baseline(point): point.tbt_ms for point in points if point.is_baseline}
    for point in points:
        if (base := baselines.get(shared_with_baseline(point))) is not None:
            point.speedup = base / point.tbt_ms


def shared_with_baseline(point: Point) -> Identity:
    """The settings that a point has in common with its baseline: all but how it speculates."""
    how = ("decoding.mode", *TAKES_NO_PART[BASELINE])
    return _identity({key: value for key, value in point.settings.items() if not key.startswith(how)})


# ---- Points that belong together in a picture. ----


def fastest(points: Sequence[Point], most: int) -> list[Point]:
    """At most `most` points: of each baseline and those that share it as many, itself first, then the fastest."""
    comparable: dict[Identity, list[Point]] = {}
    for point in points:
        comparable.setdefault(shared_with_baseline(point), []).append(point)
    each = max(1, most // len(comparable))
    chosen = []
    for members in comparable.values():
        by_speed = sorted(members, key=lambda point: (not point.is_baseline, point.tbt_ms))
        chosen += sorted(by_speed[:each], key=points.index)
    return chosen[:most]


@dataclass(kw_only=True)
class Series:
    """Points that share what is drawn together, and how to call them."""

    label: str
    points: list[Point]


def series_of(
    points: Sequence[Point], axes: Sequence[str], cell: Sequence[str], most: int
) -> tuple[list[Series], list[str]]:
    """At most `most` series with one point for each value of the settings `cell`.

    Where there are more, settings that differ are left to the fastest point, the one with most values first; these are
    returned, too.
    """
    others, given_up = [axis for axis in differing(axes, points) if axis not in cell], []
    while True:
        groups: dict[tuple[str, ...], dict[tuple[str, ...], Point]] = {}
        for point in points:
            name = tuple(repr(point.settings.get(axis)) for axis in others)
            place = tuple(repr(point.settings.get(axis)) for axis in cell)
            best = groups.setdefault(name, {})
            if place not in best or point.tbt_ms < best[place].tbt_ms:
                best[place] = point
        if len(groups) <= most:
            break
        given_up.append(max(others, key=lambda axis: len(_values(axis, points))))
        others.remove(given_up[-1])
    members = [list(best.values()) for best in groups.values()]
    return [Series(label=label_of(points[0], others), points=points) for points in members], given_up


def differing(axes: Sequence[str], points: Iterable[Point]) -> list[str]:
    """The settings among `axes` in which these points differ."""
    return [axis for axis in axes if len(_values(axis, points)) > 1]


def _values(axis: str, points: Iterable[Point]) -> set[str]:
    """The values of a setting, as texts."""
    return {repr(point.settings.get(axis)) for point in points}


def label_of(point: Point, axes: Iterable[str]) -> str:
    """The settings on `axes` in a legend's words: what sets a point apart."""
    settings = {symbol(axis): point.settings.get(axis) for axis in axes}
    mode = settings.pop(MODE, None)
    parts = [f"{name} = {value}" for name, value in settings.items() if value is not None]
    return ", ".join([mode, *parts] if mode else parts)


def symbol(axis: str) -> str:
    """The short name of a setting."""
    return SYMBOLS.get(axis, axis.rpartition(".")[2].replace("_", " "))
