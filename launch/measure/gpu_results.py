"""Results of launch/measure/gpu.py: all there is so far, in files that are whole whenever the measurement ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

from launch.command_line.tables import markdown_table, write_atomically, write_json

Cells: TypeAlias = dict[str, Any]
"""A row of a table: values by the head of their column; None, and what is missing, is left blank."""


class GpuResults:
    """Tables and notes, in results.json and results.md of `folder`; `facts` say what was measured, on what."""

    def __init__(self, folder: Path, facts: dict[str, Any]):
        self._folder, self.facts = folder, facts
        self.tables: dict[str, list[Cells]] = {}
        self.notes: list[str] = []
        self.has_failed = False
        folder.mkdir(parents=True, exist_ok=True)

    def note(self, text: str) -> None:
        """Prints a line, and keeps it."""
        print(text, flush=True)
        self.notes.append(text)
        self.write()

    def set_table(self, title: str, rows: list[Cells]) -> None:
        """Adds the table, or replaces the one of this title."""
        self.tables[title] = rows
        self.write()

    def write(self) -> None:
        """Writes both files."""
        whole = {"facts": self.facts, "tables": self.tables, "notes": self.notes}
        write_json(self._folder / "results.json", whole)
        write_atomically(self._folder / "results.md", self.page())

    def page(self) -> str:
        """All but the facts that are dictionaries themselves, as Markdown."""
        parts = [", ".join(f"{key}: {value}" for key, value in self.facts.items() if not isinstance(value, dict))]
        parts += [f"### {title}\n\n{_table(rows)}" for title, rows in self.tables.items() if rows]
        return "\n\n".join([*parts, "\n".join(f"- {note}" for note in self.notes)]) + "\n"


def _table(rows: list[Cells]) -> str:
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return markdown_table(keys, [[_shown(row.get(key)) for key in keys] for row in rows]).rstrip("\n")


def _shown(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 1000 else str(value)
