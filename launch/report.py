"""Draws a sweep: python launch/report.py FOLDER_OR_TABLE [--where key=value ...] [--output FOLDER]

Takes the folder of a sweep, any folder of runs (result.json), or a table.csv or table.parquet; writes figures (PNG and
SVG) and report.md with the table of medians. It draws what the table has settings for, and says what it left out and
why. A speed-up needs runs of decoding.mode=autoregressive with the same other settings.

Exit codes: 0 done; 2 nothing that could be drawn.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import util
from pathlib import Path
from typing import Any

from conf.schema import ConfigError
from launch.command_line.outcome import refuse
from launch.sweeps.medians import Point, Results, load, results_of, symbol, where

FORMATS = ("png", "svg")
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
MEASURES = (
    ("TBT ms (least to most)", lambda point: _with_spread(point, "tbt_ms")),
    ("tokens/s", lambda point: _number(point.median("tokens_per_s"), ".1f")),
    ("speed-up", lambda point: _number(point.speedup, ".2f")),
    ("tokens per verification", lambda point: _number(point.median("tokens_per_verification"), ".2f")),
    ("retrieval accepted", lambda point: _number(point.median("retrieval_acceptance"), ".1%")),
    ("drafter accepted", lambda point: _number(point.median("drafter_acceptance"), ".1%")),
    ("TTFT s", lambda point: _number(point.median("ttft_s"), ".2f")),
    ("runs", lambda point: str(len(point.rows))),
)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        if util.find_spec("matplotlib") is None:
            raise ConfigError("figures need matplotlib: pip install -e '.[report]'")
        conditions = [_condition(text) for text in arguments.where]
        results = results_of(where(load(arguments.source), conditions))
        if not results.points:
            raise ConfigError(f"{str(arguments.source)!r} has no run that is done and timed")
    except ConfigError as error:
        return refuse(error)
    folder = arguments.output or (arguments.source if arguments.source.is_dir() else arguments.source.parent) / "report"
    write_report(results, folder, arguments.formats.split(","))
    return 0


def _parser() -> argparse.ArgumentParser:
    summary, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=rest, usage=summary.partition(": ")[2], formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("source", type=Path, help="folder of a sweep or of runs, or a table.csv or table.parquet")
    parser.add_argument("--output", type=Path, help="where the report goes; default: report/ beside the table")
    parser.add_argument("--where", action="append", default=[], metavar="KEY=VALUE", help="only runs with this setting")
    parser.add_argument("--formats", default=",".join(FORMATS), help="of the figures; default: %(default)s")
    return parser


def _condition(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--where {text!r} must be key=value, for example cache.full.tier=host")
    return key, value


def write_report(results: Results, folder: Path, formats: Sequence[str] = FORMATS) -> None:
    """Figures and report.md."""
    from launch.sweeps.figures import FIGURES, LeftOutError, draw, save

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
    """The page: under what conditions, the pictures, the medians, and what is not there."""
    lines = ["# Sweep", "", conditions_of(results), ""]
    for name, caption in pictures:
        lines += [f"![{caption}]({name}.{suffix})", "", caption, ""]
    lines += ["## Medians", "", *table(results), ""]
    if left_out:
        lines += ["## Not drawn", "", *(f"- {reason}" for reason in left_out), ""]
    if results.not_done:
        lines += ["## Jobs that are not done", ""]
        lines += [f"- {row.get('id')}: {row.get('status')}: {row.get('message')}" for row in results.not_done]
        lines.append("")
    return "\n".join(lines)


def conditions_of(results: Results) -> str:
    """What all runs share."""
    common, rows = results.common, [row for point in results.points for row in point.rows]
    parts = [f"{key}={common[key]}" for key in SHOWN_CONDITIONS if key in common]
    hosts = sorted({row["host"] for row in rows if row.get("host")})
    versions = sorted({f"torch {row['torch']}" for row in rows if row.get("torch")})
    return f"{len(rows)} runs of {len(results.points)} settings. All: {', '.join([*parts, *versions, *hosts])}."


def table(results: Results) -> list[str]:
    """Markdown: a line for each setting, the columns that have something to say."""
    cells = [[measure(point) for _, measure in MEASURES] for point in results.points]
    used = [index for index in range(len(MEASURES)) if any(line[index] != "-" for line in cells)]
    heads = [symbol(axis) for axis in results.axes] + [MEASURES[index][0] for index in used]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for point, line in zip(results.points, cells, strict=True):
        settings = [_setting(point.settings.get(axis)) for axis in results.axes]
        lines.append(f"| {' | '.join([*settings, *(line[index] for index in used)])} |")
    return lines


def _setting(value: Any) -> str:
    return "-" if value is None else str(value)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _with_spread(point: Point, metric: str) -> str:
    values, median = point.values(metric), point.median(metric)
    spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
    return _number(median, ".1f") + spread


if __name__ == "__main__":
    sys.exit(main())
