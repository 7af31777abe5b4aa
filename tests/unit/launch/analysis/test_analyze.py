"""The whole program on the demo pair and a short text: every table, the summary, figures; and what it refuses."""

from __future__ import annotations

import csv
import math
from importlib.util import find_spec
from pathlib import Path

import pytest

from launch import analyze
from launch.analysis.summary import LABELS, SummaryTable, mean_of

ROOT = Path(__file__).resolve().parents[4]
SHORT = ["context=400", "new_tokens=12", "budgets=[64,1024]", "shown_budget=64", "model.dtype=float32"]
FIGURES = ("sparsity", "layers", "locality", "acceptance", "needle")
LAYERS, HEADS, DEPTHS = 6, 2, 2


@pytest.fixture(scope="module")
def book(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("books") / "book.txt"
    path.write_text("".join(f"The number of box {i} is {i * 7919 % 1000}.\n" for i in range(200)))
    return path


@pytest.fixture(scope="module")
def folder(book, tmp_path_factory) -> Path:
    """Of a run over two documents."""
    output = tmp_path_factory.mktemp("analysis")
    overrides = [f"documents={{book: {book}, again: {book}}}", "needle.depths=[0.5,1]", "needle.repeats=1"]
    overrides += ["needle.forms=[assignment]"]
    patch = pytest.MonkeyPatch()
    patch.chdir(ROOT)
    assert analyze.main([*SHORT, *overrides, f"output={output}"]) == 0
    patch.undo()
    return output


def rows_of(folder: Path, table: str) -> list[dict]:
    with (folder / f"{table}.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    texts = ("document", "cache", "form")
    return [{k: v if k in texts or v == "" else float(v) for k, v in row.items()} for row in rows]


def test_every_cache_is_in_every_table(folder):
    attention, acceptance = rows_of(folder, "attention"), rows_of(folder, "acceptance")
    assert len(attention) == 2 * LAYERS * HEADS * len(LABELS) * 2
    assert len(acceptance) == 2 * len(LABELS) * 2
    assert len(rows_of(folder, "locality")) == 2 * len(LABELS) * 12
    assert len(rows_of(folder, "needle")) == DEPTHS * len(LABELS) * 2
    for rows in (attention, acceptance):
        assert {row["cache"] for row in rows} == set(LABELS)
        assert {row["document"] for row in rows} == {"book", "again"}


def test_a_budget_above_the_context_has_everything_in_sight_and_is_accepted_always(folder):
    for table, value in (("attention", "recovery"), ("acceptance", "acceptance"), ("needle", "acceptance")):
        for row in rows_of(folder, table):
            if row["budget"] == 1024:
                assert row[value] == pytest.approx(1, abs=1e-4), row
    assert mean_of(rows_of(folder, "acceptance"), "acceptance", budget=64) < 0.99


def test_the_best_tokens_are_best(folder):
    rows = rows_of(folder, "attention")
    best = mean_of(rows, "recovery", cache="top_k", budget=64)
    # Caches hold up to a chunk and a round more than their budget.
    assert all(mean_of(rows, "recovery", cache=cache, budget=64) < best + 0.02 for cache in LABELS)


def test_facts_are_at_their_depths_and_in_sight_of_a_window_only_at_the_end(folder):
    for row in rows_of(folder, "needle"):
        assert row["depth"] == row["fact_begin"] / row["prompt_tokens"]
        assert row["asked_depth"] - 0.35 < row["depth"] <= row["asked_depth"]
        if row["cache"] == "recent_window" and row["budget"] == 64:
            assert row["recovery_of_fact"] == pytest.approx(1.0 if row["asked_depth"] == 1 else 0.0, abs=1e-4)


def test_the_summary_has_what_the_tables_say(folder):
    text = (folder / "summary.md").read_text(encoding="utf-8")
    assert "book, again; 400 tokens, then 12; temperature 0.6" in text
    mean = mean_of(rows_of(folder, "acceptance"), "acceptance", cache="mean_key", budget=64)
    assert f"| {LABELS['mean_key']} | {100 * mean:.1f} | 100.0 |" in text
    assert text.count("|---") == 0 and text.count("| --- |") >= 7


def test_figures_are_drawn_where_matplotlib_is(folder):
    made = {path.name for path in folder.iterdir() if path.suffix in (".png", ".svg")}
    expected = {f"{name}.{suffix}" for name in FIGURES for suffix in ("png", "svg")}
    assert made == (expected if find_spec("matplotlib") else set())


def test_a_summary_is_a_table():
    summary = SummaryTable("What it is", ["cache", "1"], [["a", "2.0"]])
    assert summary.markdown() == "What it is\n\n| cache | 1 |\n| --- | --- |\n| a | 2.0 |\n"
    assert math.isclose(mean_of([{"a": 1, "b": 2}, {"a": 1, "b": ""}, {"a": 2, "b": 9}], "b", a=1), 2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["contxt=5"], "Key 'contxt' not in"),
        (["budgets=[100]"], "budgets is [100]; it must be multiples of chunk_size=8"),
        (["shown_budget=77"], "shown_budget is 77; it must be one of budgets=[256, 512, 1024, 2048]"),
        (["needle.depths=[2]"], "needle.depths is [2.0]; it must be shares between 0 and 1"),
        (["needle.forms=[riddle]"], "Invalid value 'riddle', expected one of [assignment, sentence,"),
        (["documents={book: /nowhere.txt}"], "documents.book is '/nowhere.txt', which does not exist"),
        (["documents=book.txt"], "documents is 'book.txt'; it must be null, or names and text files"),
        (["documents={book: 5}"], "documents.book is '5', which does not exist"),
        (["documents={book: BOOK}", "context=20000"], "context is 20000; it must be at most "),
        (["context=40000"], "context is 40000; it must be at most 32512: the model has 32768 positions"),
        (["documents={book: BOOK}", *SHORT, "needle.depths=[0,0.2,0.4,0.6,0.8,1]"], "context is 400; it must be at l"),
        (["model.target=/nowhere"], "model.target is '/nowhere'; there is no such folder"),
        (["sampling.top_p=3"], "sampling.top_p is 3.0; it must be above 0"),
    ],
)
def test_bad_input_is_refused_in_one_message(overrides, message, book, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    overrides = [override.replace("BOOK", str(book)) for override in overrides]
    assert analyze.main([*overrides, f"output={tmp_path}"]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("tierforce: ") and printed.err.count("\n") == 1
    assert message in printed.err
    assert printed.out == ""
