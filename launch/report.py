"""Draws a sweep: python launch/report.py FOLDER_OR_TABLE [--where key=value ...] [--output FOLDER]

Takes the folder of a sweep, any folder of runs (result.json), or a table.csv or table.parquet; writes figures (PNG and
SVG) and report.md with the table of medians. It draws what the table has settings for, and says what it left out and
why. A speed-up needs runs of decoding.mode=autoregressive with the same other settings.

Exit codes: 0 done; 2 nothing that could be drawn.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module, util
from pathlib import Path

from conf.schema import ConfigError
from launch.command_line.outcome import ExitCode
from launch.command_line.program import program
from launch.sweeps.medians import load, results_of, where

FORMATS = ("png", "svg")


@program
def main(argv: list[str]) -> int:
    """Reads the table, and writes figures and page."""
    arguments = _parser().parse_args(argv)
    if util.find_spec("matplotlib") is None:
        raise ConfigError("figures need matplotlib: pip install -e '.[report]'")
    conditions = [_condition(text) for text in arguments.where]
    results = results_of(where(load(arguments.source), conditions))
    if not results.points:
        raise ConfigError(f"{str(arguments.source)!r} has no run that is done and timed")
    folder = arguments.output or (arguments.source if arguments.source.is_dir() else arguments.source.parent) / "report"
    page = import_module("launch.sweeps.page")  # and matplotlib with it
    page.write_report(results, folder, arguments.formats.split(","))
    return ExitCode.done


def _parser() -> argparse.ArgumentParser:
    """The options; --help is this module's own words."""
    assert __doc__ is not None
    summary, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=rest, usage=summary.partition(": ")[2], formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("source", type=_path, help="folder of a sweep or of runs, or a table.csv or table.parquet")
    parser.add_argument("--output", type=_path, help="where the report goes; default: report/ beside the table")
    parser.add_argument("--where", action="append", default=[], metavar="KEY=VALUE", help="only runs with this setting")
    parser.add_argument("--formats", default=",".join(FORMATS), help="of the figures; default: %(default)s")
    return parser


def _path(text: str) -> Path:
    """A path; shells leave the ~ of --output=~/figures to us."""
    return Path(os.path.expanduser(text))


def _condition(text: str) -> tuple[str, str]:
    """Key and value of a --where. Raises ConfigError."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--where {text!r} must be key=value, for example cache.full.tier=host")
    return key, value


if __name__ == "__main__":
    sys.exit(main())
