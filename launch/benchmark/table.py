"""Results of launch/bench.py: medians and spread, a table for the terminal, one CSV with all of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from conf.schema import Mode
from launch.command_line.tables import shown, write_csv

REFERENCE = str(Mode.autoregressive)
"""The contender that all others are held against."""
CSV_FIELDS = (
    *("context", "prompt_tokens", "tier", "link_gb_per_s", "positions", "contender", "status", "tbt_ms", "tbt_ms_min"),
    *("tbt_ms_max", "ratio", "tokens_per_s", "tokens_per_verification", "retrieval_acceptance", "draft_acceptance"),
    *("outside_roles", "outside_forwards_and_copies", "ttft_s", "new_tokens", "first_difference", "settings"),
    "reason",
)
CELL_FIELDS = ("context", "prompt_tokens", "tier", "link_gb_per_s", "positions")
"""Columns in which all contenders of a cell agree."""


class Status(StrEnum):
    """Whether a contender was measured."""

    ok = "ok"
    skipped = "skipped"
    failed = "failed"


@dataclass(kw_only=True, slots=True)
class ContenderRow:
    """One contender in one cell of the grid."""

    name: str
    settings: str
    """Overrides that make it what it is."""
    status: Status = Status.ok
    reason: str | None = None
    """Why it was skipped or how it failed."""
    ttft_s: float | None = None
    """Seconds to the first token, when all is loaded."""
    samples_ms: list[float] = field(default_factory=list)
    """Time between tokens (TBT) of each repetition."""
    token_ids: list[int] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    """Whatever else the contender tells; see Contender.facts."""
    ratio: float | None = None
    """The reference's median TBT over this one's: above 1 is faster."""
    first_difference: int | None = None
    """Index of the first new token that is not the reference's; null: none, or not to be compared."""
    is_compared: bool = False
    """Its tokens should be the reference's: both are greedy."""

    @property
    def tbt_ms(self) -> float | None:
        """The median of the repetitions; None where there are none."""
        return median(self.samples_ms) if self.samples_ms else None

    def to_plain(self) -> dict[str, Any]:
        """The row as bench.json has it."""
        samples, tbt_ms, spread = self.samples_ms, self.tbt_ms, None
        if samples:
            spread = {"median": tbt_ms, "min": min(samples), "max": max(samples), "samples": samples}
        return {
            "contender": self.name,
            "settings": self.settings,
            "status": self.status,
            "reason": self.reason,
            "tbt_ms": spread,
            "ratio": self.ratio,
            "tokens_per_s": None if tbt_ms is None else 1000 / tbt_ms,
            "ttft_s": self.ttft_s,
            "new_tokens": len(self.token_ids),
            "token_ids": self.token_ids,
            "compared": self.is_compared,
            "first_difference": self.first_difference,
            **self.facts,
        }


def compare(rows: list[ContenderRow], *, is_greedy: bool) -> None:
    """Sets ratios to the reference's, and, where all are greedy, whose tokens differ from its tokens."""
    measured = [(row, row.tbt_ms) for row in rows if row.status is Status.ok and row.tbt_ms is not None]
    reference, reference_ms = next(((row, tbt_ms) for row, tbt_ms in measured if row.name == REFERENCE), (None, 0.0))
    if reference is None:
        return
    for row, tbt_ms in measured:
        row.ratio = reference_ms / tbt_ms
        row.is_compared = is_greedy
        row.first_difference = first_difference(reference.token_ids, row.token_ids) if is_greedy else None


def first_difference(left: list[int], right: list[int]) -> int | None:
    """The first index at which two texts differ; contenders end at different lengths: only what both have counts."""
    pairs = zip(left, right, strict=False)
    return next((index for index, (one, other) in enumerate(pairs) if one != other), None)


def make_table(title: str, rows: list[ContenderRow]) -> Table:
    """The table of a cell for the terminal: TBT as the median and (min..max) of the repetitions."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("contender", no_wrap=True)
    heads = ("TBT ms", "min..max", "speed", "per verif.", "accepted", "outside", "tokens", "TTFT s")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row.name, *texts_of(row), style=None if row.status is Status.ok else "dim")
    return table


def texts_of(row: ContenderRow) -> list[str]:
    """The texts behind a contender's name, one for each column of the table."""
    if row.status is not Status.ok or not row.samples_ms:
        return [row.status, *[""] * 7]
    speculation, outside = row.facts.get("speculation"), row.facts.get("outside")
    per_verification = speculation["tokens_per_verification"] if speculation and speculation["levels"] else None
    same = ""
    if row.is_compared and row.name != REFERENCE:
        same = "same" if row.first_difference is None else f"differ at {row.first_difference}"
    return [
        shown(row.tbt_ms, ".1f"),
        f"{min(row.samples_ms):.1f}..{max(row.samples_ms):.1f}",
        shown(row.ratio, ".2f"),
        shown(per_verification, ".2f"),
        " / ".join(shown(level["acceptance_rate"], ".0%") for level in (speculation or {}).get("levels", [])),
        shown((outside or {}).get("forwards_and_copies"), ".1%"),
        same,
        shown(row.ttft_s, ".1f"),
    ]


def write_grid_csv(path: Path, grid: list[dict[str, Any]]) -> None:
    """A line for each contender of each cell; `grid` are the cells as bench.json has them."""
    lines = [{key: cell[key] for key in CELL_FIELDS} | csv_values(row) for cell in grid for row in cell["rows"]]
    write_csv(path, CSV_FIELDS, lines)


def csv_values(row: dict[str, Any]) -> dict[str, Any]:
    """The columns of one contender, of its row as bench.json has it."""
    tbt, outside = row["tbt_ms"] or {}, row.get("outside") or {}
    speculation = row.get("speculation") or {}
    rates = {level["name"]: level["acceptance_rate"] for level in speculation.get("levels", [])}
    plain = ("contender", "status", "ratio", "tokens_per_s", "ttft_s", "new_tokens", "first_difference", "settings")
    return {key: row[key] for key in (*plain, "reason")} | {
        "tbt_ms": tbt.get("median"),
        "tbt_ms_min": tbt.get("min"),
        "tbt_ms_max": tbt.get("max"),
        "tokens_per_verification": speculation.get("tokens_per_verification"),
        "retrieval_acceptance": rates.get("retrieval"),
        "draft_acceptance": rates.get("drafter"),
        "outside_roles": outside.get("roles"),
        "outside_forwards_and_copies": outside.get("forwards_and_copies"),
    }
