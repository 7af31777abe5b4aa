"""What launch/analyze.py measured, as CSV files and as a summary for the terminal and for summary.md."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.table import Table

from launch.analysis.config import AnalyzeConfig

LABELS = {
    "top_k": "best tokens (oracle)",
    "attention": "chunks by attention",
    "mean_key": "chunks by mean key (TriForce)",
    "heavy_hitter": "heavy hitters (H2O)",
    "recent_window": "recent window (StreamingLLM)",
}
"""Of each cache, in the order of tables and legends."""
LABELS_ONCE = LABELS | {"top_k": "best tokens of one query"}
"""The same where the choice is made once."""
BIN_TOKENS = 16
"""Of distances, which are averaged."""

Rows = list[dict]


@dataclass(frozen=True, slots=True)
class Summary:
    """A small table and what it tells."""

    title: str
    heads: list[str]
    lines: list[list[str]]

    def markdown(self) -> str:
        cells = [self.heads, ["---"] * len(self.heads), *self.lines]
        return f"{self.title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in cells) + "\n"

    def rich(self) -> Table:
        table = Table(title=self.title, title_justify="left", box=None, pad_edge=False)
        for index, head in enumerate(self.heads):
            table.add_column(head, justify="right" if index else "left", no_wrap=not index)
        for line in self.lines:
            table.add_row(*line)
        return table


def write_tables(folder: Path, tables: dict[str, Rows]) -> None:
    """A CSV file for each table that has rows."""
    for name, rows in tables.items():
        if rows:
            with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, fieldnames=list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)


def show(console: Console, summaries: list[Summary]) -> None:
    for summary in summaries:
        console.print(summary.rich())
        console.print()


def write_summary(folder: Path, settings: str, summaries: list[Summary]) -> None:
    text = "\n".join([settings + "\n", *(summary.markdown() for summary in summaries)])
    (folder / "summary.md").write_text(text, encoding="utf-8")


def summarise(config: AnalyzeConfig, tables: dict[str, Rows]) -> list[Summary]:
    """Means over documents, layers and heads; of facts, over texts."""
    made = [
        _by_budget("Attention in sight, %, by budget", config, tables["attention"], "recovery"),
        _by_budget("Acceptance, %, by budget", config, tables["acceptance"], "acceptance"),
        _by_distance(config, tables["locality"]),
    ]
    forms = dict.fromkeys(row["form"] for row in tables["needle"])
    for form in forms:
        made += _by_depth(form, [row for row in tables["needle"] if row["form"] == form], config.shown_budget)
    return made


def mean_of(rows: Iterable[dict], value: str, **wanted) -> float | None:
    """Of the rows whose other values are these; None where there are none, or they have no such value."""
    values = [row[value] for row in rows if all(row[key] == wish for key, wish in wanted.items()) and row[value] != ""]
    return fmean(values) if values else None


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _by_budget(title: str, config: AnalyzeConfig, rows: Rows, value: str) -> Summary:
    lines = [
        [label, *(_percent(mean_of(rows, value, cache=cache, budget=budget)) for budget in config.budgets)]
        for cache, label in LABELS.items()
    ]
    return Summary(title, ["cache", *(f"{budget:,} tokens" for budget in config.budgets)], lines)


def bins(config: AnalyzeConfig) -> list[tuple[int, int]]:
    """First and last distance of each."""
    last = config.new_tokens
    return [(first, min(first + BIN_TOKENS - 1, last)) for first in range(1, last + 1, BIN_TOKENS)]


def mean_by_bin(config: AnalyzeConfig, rows: Rows, cache: str, value: str) -> list[float]:
    of_cache = [row for row in rows if row["cache"] == cache]
    return [fmean(row[value] for row in of_cache if first <= row["distance"] <= last) for first, last in bins(config)]


def _by_distance(config: AnalyzeConfig, rows: Rows) -> Summary:
    every = bins(config)
    chosen = sorted({0, len(every) // 4, len(every) // 2, len(every) - 1})
    lines = []
    for cache, label in LABELS_ONCE.items():
        means = mean_by_bin(config, rows, cache, "recovery_of_context")
        lines.append([label, *(_percent(means[index]) for index in chosen)])
    heads = [f"tokens {every[index][0]} to {every[index][1]}" for index in chosen]
    title = f"Attention to the prompt still in sight, %, {config.shown_budget:,} tokens chosen once at its end"
    return Summary(title, ["chosen once", *heads], lines)


def depths_of(rows: Rows) -> list[float]:
    """As they were asked for."""
    return sorted({row["asked_depth"] for row in rows})


def _by_depth(form: str, rows: Rows, budget: int) -> list[Summary]:
    depths = depths_of(rows)

    def line(label: str, value: str, **wanted) -> list[str]:
        means = [mean_of(rows, value, budget=budget, asked_depth=depth, **wanted) for depth in depths]
        return [label, *(_percent(mean) for mean in means)]

    heads = ["cache", *(f"{depth:.0%}" for depth in depths)]
    accepted = [line(label, "acceptance", cache=cache) for cache, label in LABELS.items()]
    accepted.append(line("(probability, to the target)", "target_probability"))
    recovered = [line(label, "recovery_of_fact", cache=cache) for cache, label in LABELS.items() if cache != "top_k"]
    of_what = f"of facts ({form}) by depth, %, {budget:,} tokens"
    return [
        Summary(f"Acceptance of the answers {of_what}", heads, accepted),
        Summary(f"Attention in sight {of_what}", heads, recovered),
    ]
