"""The page of a report, report.md: under what conditions, the figures, the table of medians, and what is not there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from launch.command_line.tables import markdown_table, shown
from launch.sweeps.drawing import LeftOutError, save
from launch.sweeps.figures import FIGURES, draw
from launch.sweeps.medians import Point, Results, symbol

MISSING = "-"
"""Stands in a cell for what a point has not."""
SHOWN_CONDITIONS = (
    "model.target",
    "model.drafter",
    "model.dtype",
    "decoding.mode",
    "decoding.gamma1",
    "decoding.gamma2",
    "decoding.overlap",
    "cache.retrieval.budget",
    "cache.full.tier",
    "tiers.link.gb_per_s",
    "sampling.temperature",
    "sampling.top_p",
    "sampling.coupling",
    "prompt.path",
    "prompt.max_tokens",
    "generation.max_new_tokens",
    "placement.threads",
    "processes",
)
"""Settings that are named above the figures, where all runs share them."""
MEASURES: tuple[tuple[str, Callable[[Point], str]], ...] = (
    ("TBT ms (least to most)", lambda point: _with_spread(point, "tbt_ms")),
    ("tokens/s", lambda point: shown(point.median("tokens_per_s"), ".1f", MISSING)),
    ("speed-up", lambda point: shown(point.speedup, ".2f", MISSING)),
    ("tokens per verification", lambda point: shown(point.median("tokens_per_verification"), ".2f", MISSING)),
    ("retrieval accepted", lambda point: shown(point.median("retrieval_acceptance"), ".1%", MISSING)),
    ("drafter accepted", lambda point: shown(point.median("drafter_acceptance"), ".1%", MISSING)),
    ("TTFT s", lambda point: shown(point.median("ttft_s"), ".2f", MISSING)),
    ("runs", lambda point: str(len(point.rows))),
)
"""Columns of the table of medians: head, and the text of a point's cell."""


def write_report(results: Results, folder: Path, formats: Sequence[str]) -> None:
    """Writes the figures, in each of the `formats`, and report.md; says what it draws and what it leaves out."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures, left_out = [], []
    for name in FIGURES:
        try:
            drawing = draw(name, results)
        except LeftOutError as reason:
            left_out.append(f"{name}: {reason}")
            print(f"left out {left_out[-1]}")
            continue
        for suffix in formats:
            save(drawing.figure, folder / f"{name}.{suffix}")
        pictures.append((name, drawing.caption))
        print(f"drew {folder / name}.{formats[0]}")
    page = folder / "report.md"
    page.write_text(markdown(results, pictures, left_out, formats[0]), encoding="utf-8")
    print(f"wrote {page}")


def markdown(results: Results, pictures: Sequence[tuple[str, str]], left_out: Sequence[str], suffix: str) -> str:
    """The text of the page; `pictures` are names and captions, `suffix` is the format of those that it shows."""
    lines = ["# Sweep", "", conditions_of(results), ""]
    for name, caption in pictures:
        lines += [f"![{caption}]({name}.{suffix})", "", caption, ""]
    lines += ["## Medians", "", table(results)]
    if left_out:
        lines += ["## Not drawn", "", *(f"- {reason}" for reason in left_out), ""]
    if results.not_done:
        lines += ["## Jobs that are not done", ""]
        lines += [f"- {row.get('id')}: {row.get('status')}: {row.get('message')}" for row in results.not_done]
        lines.append("")
    return "\n".join(lines)


def conditions_of(results: Results) -> str:
    """The settings, versions and machines that all runs share, in one line."""
    common, rows = results.common, [row for point in results.points for row in point.rows]
    parts = [f"{key}={common[key]}" for key in SHOWN_CONDITIONS if key in common]
    hosts = sorted({row["host"] for row in rows if row.get("host")})
    versions = sorted({f"torch {row['torch']}" for row in rows if row.get("torch")})
    return f"{len(rows)} runs of {len(results.points)} settings. All: {', '.join([*parts, *versions, *hosts])}."


def table(results: Results) -> str:
    """Markdown: a line for each setting, the columns that have something to say."""
    cells = [[measure(point) for _, measure in MEASURES] for point in results.points]
    used = [index for index in range(len(MEASURES)) if any(line[index] != MISSING for line in cells)]
    heads = [*map(symbol, results.axes), *(MEASURES[index][0] for index in used)]
    lines = [
        [*(_setting(point.settings.get(axis)) for axis in results.axes), *(line[index] for index in used)]
        for point, line in zip(results.points, cells, strict=True)
    ]
    return markdown_table(heads, lines)


def _setting(value: Any) -> str:
    return MISSING if value is None else str(value)


def _with_spread(point: Point, metric: str) -> str:
    """A median, and where there are several runs the least and the most."""
    values = point.values(metric)
    spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
    return shown(point.median(metric), ".1f", MISSING) + spread
