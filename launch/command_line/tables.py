"""Tables of results: Markdown for people, CSV and JSON for programs; and files that are there as a whole or not at all.

A table that is printed row by row while it is measured is markdown_head, then a markdown_row for each.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The lines of a whole table, the last one ended too."""
    return "".join(f"{line}\n" for line in (markdown_head(heads), *map(markdown_row, rows)))


def markdown_head(heads: Sequence[str]) -> str:
    """The two lines above the rows: what the columns are called, and the rule."""
    return f"{markdown_row(heads)}\n{markdown_row(['---'] * len(heads))}"


def markdown_row(cells: Iterable[str]) -> str:
    """One line of a table."""
    return f"| {' | '.join(cells)} |"


def shown(value: float | None, form: str, missing: str = "") -> str:
    """A number formatted by `form`, for example `.1f`; `missing` stands for None."""
    return missing if value is None else format(value, form)


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """A file with a line for each row, atomically; None and what a row lacks are left blank.

    Raises ValueError for a row with a key that is no column.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())


def write_json(path: Path, value: Any) -> None:
    """A JSON file of plain values, atomically. Raises ValueError for NaN and infinity, which JSON has not."""
    write_atomically(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """UTF-8 text without translated line ends; whoever reads meanwhile has the earlier file, as a whole."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")  # processes that write the same file have each their own
    partial.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")
    os.replace(partial, path)
