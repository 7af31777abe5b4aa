"""Results of launch/analyze.py: CSV files, and a summary for the terminal and for summary.md."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from launch.analysis.config import AnalyzeConfig
from launch.command_line.tables import markdown_table, shown, write_atomically, write_csv

LABELS = {
    "top_k": "best tokens (oracle)",
    "attention": "chunks by attention",
    "mean_key": "chunks by mean key (TriForce)",
    "heavy_hitter": "heavy hitters (H2O)",
    "recent_window": "recent window (StreamingLLM)",
}
"""Names of the caches for people, in the order of tables and legends."""
LABELS_ONCE = LABELS | {"top_k": "best tokens of one query"}
"""Names of the caches for people, where the choice is made once."""
BIN_TOKENS = 16
"""Distances that are averaged together."""

Rows = list[dict[str, Any]]
Tables = dict[str, Rows]
"""Rows by the name of their table: attention, locality, acceptance, needle."""


@dataclass(frozen=True, slots=True)
class SummaryTable:
    """A small table and what it tells."""

    title: str
    heads: list[str]
    lines: list[list[str]]

    def markdown(self) -> str:
        """The table for summary.md."""
        return f"{self.title}\n\n{markdown_table(self.heads, self.lines)}"

    def rich(self) -> Table:
        """The table for the terminal."""
        table = Table(title=self.title, title_justify="left", box=None, pad_edge=False)
        for index, head in enumerate(self.heads):
            table.add_column(head, justify="right" if index else "left", no_wrap=not index)
        for line in self.lines:
            table.add_row(*line)
        return table


def write_tables(folder: Path, tables: Tables) -> None:
    """Writes a CSV file for each table that has rows."""
    for name, rows in tables.items():
        if rows:
            write_csv(folder / f"{name}.csv", list(rows[0]), rows)


def show(console: Console, summaries: list[SummaryTable]) -> None:
    """Prints the tables."""
    for summary in summaries:
        console.print(summary.rich())
        console.print()


def write_summary(folder: Path, settings: str, summaries: list[SummaryTable]) -> None:
    """Writes summary.md: the settings in words, and the tables."""
    text = "\n".join([settings + "\n", *(summary.markdown() for summary in summaries)])
    write_atomically(folder / "summary.md", text)


def summarise(config: AnalyzeConfig, tables: Tables) -> list[SummaryTable]:
    """The tables of means over documents, layers and heads; of facts, over texts."""
    made = [
        _by_budget("Attention in sight, %, by budget", config, tables["attention"], "recovery"),
        _by_budget("Acceptance, %, by budget", config, tables["acceptance"], "acceptance"),
        _by_distance(config, tables["locality"]),
    ]
    forms = dict.fromkeys(row["form"] for row in tables["needle"])
    for form in forms:
        made += _by_depth(form, [row for row in tables["needle"] if row["form"] == form], config.shown_budget)
    return made


def mean_of(rows: Iterable[dict[str, Any]], value: str, **wanted: Any) -> float | None:
    """The mean of a column over the rows whose other values are these; None where no such row has it."""
    values = [row[value] for row in rows if all(row[key] == wish for key, wish in wanted.items()) and row[value] != ""]
    return fmean(values) if values else None


def _percent(value: float | None) -> str:
    """A share in percent, or nothing."""
    return shown(None if value is None else 100 * value, ".1f")


def _by_budget(title: str, config: AnalyzeConfig, rows: Rows, value: str) -> SummaryTable:
    """Means of a column by cache and budget."""
    lines = [
        [label, *(_percent(mean_of(rows, value, cache=cache, budget=budget)) for budget in config.budgets)]
        for cache, label in LABELS.items()
    ]
    return SummaryTable(title, ["cache", *(f"{budget:,} tokens" for budget in config.budgets)], lines)


def bins(config: AnalyzeConfig) -> list[tuple[int, int]]:
    """First and last distance of each bin."""
    last = config.new_tokens
    return [(first, min(first + BIN_TOKENS - 1, last)) for first in range(1, last + 1, BIN_TOKENS)]


def mean_by_bin(config: AnalyzeConfig, rows: Rows, cache: str, value: str) -> list[float]:
    """The mean of a column over the distances of each bin, for one cache."""
    of_cache = [row for row in rows if row["cache"] == cache]
    return [fmean(row[value] for row in of_cache if first <= row["distance"] <= last) for first, last in bins(config)]


def _by_distance(config: AnalyzeConfig, rows: Rows) -> SummaryTable:
    """Means at a few distances from a choice, by cache."""
    every = bins(config)
    chosen = sorted({0, len(every) // 4, len(every) // 2, len(every) - 1})
    lines = []
    for cache, label in LABELS_ONCE.items():
        means = mean_by_bin(config, rows, cache, "recovery_of_context")
        lines.append([label, *(_percent(means[index]) for index in chosen)])
    heads = [f"tokens {every[index][0]} to {every[index][1]}" for index in chosen]
    title = f"Attention to the prompt still in sight, %, {config.shown_budget:,} tokens chosen once at its end"
    return SummaryTable(title, ["chosen once", *heads], lines)


def depths_of(rows: Rows) -> list[float]:
    """The depths of facts, as they were asked for, ascending."""
    return sorted({row["asked_depth"] for row in rows})


def _by_depth(form: str, rows: Rows, budget: int) -> list[SummaryTable]:
    """Acceptance of the answers and attention in sight of the facts, by cache and depth, for one form of facts."""
    depths = depths_of(rows)

    def line(label: str, value: str, **wanted: Any) -> list[str]:
        means = [mean_of(rows, value, budget=budget, asked_depth=depth, **wanted) for depth in depths]
        return [label, *(_percent(mean) for mean in means)]

    heads = ["cache", *(f"{depth:.0%}" for depth in depths)]
    accepted = [line(label, "acceptance", cache=cache) for cache, label in LABELS.items()]
    accepted.append(line("(probability, to the target)", "target_probability"))
    recovered = [line(label, "recovery_of_fact", cache=cache) for cache, label in LABELS.items() if cache != "top_k"]
    of_what = f"of facts ({form}) by depth, %, {budget:,} tokens"
    return [
        SummaryTable(f"Acceptance of the answers {of_what}", heads, accepted),
        SummaryTable(f"Attention in sight {of_what}", heads, recovered),
    ]
