"""Acceptance is measured rightly: against brute force, and on caches that must be perfect."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from conf.schema import ChunkDtype, Dtype
from launch.analysis.compared_rules import ORACLE
from launch.measure import acceptance as measure

ROOT = Path(__file__).resolve().parents[4]


def test_gumbel_match_is_the_chance_of_a_common_winner():
    generator = torch.Generator().manual_seed(0)
    p = torch.tensor([0.5, 0.3, 0.2, 0.0])
    q = torch.tensor([0.1, 0.6, 0.0, 0.3])
    noise = -torch.rand(200_000, 4, generator=generator, dtype=torch.float64).log()
    same = ((noise / p).argmin(1) == (noise / q).argmin(1)).double().mean()
    assert measure.gumbel_match(p, q) == pytest.approx(float(same), abs=0.005)
    assert measure.gumbel_match(p, p) == pytest.approx(1)
    assert measure.gumbel_match(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])) == 0


def run(tmp_path, monkeypatch, **changes) -> dict[tuple[str, int], dict]:
    """By (kind, budget)."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"The number of box {i} is {i * 7919 % 1000}. " for i in range(400)))
    changes |= {"documents": {"text": str(text)}, "output": str(tmp_path / "out"), "dtype": Dtype.float32}
    settings = measure.MeasureAcceptanceConfig(**changes)
    monkeypatch.chdir(ROOT)
    measure.measure(settings)
    rows = [OmegaConf.create(line) for line in (tmp_path / "out/rows.jsonl").read_text().splitlines()]
    assert len(rows) == (len(measure.KINDS) + len(settings.compare)) * len(settings.budgets)
    assert (tmp_path / "out/table.md").read_text().count("\n") == 3
    return {(row.kind, row.budget): row for row in rows}


def test_a_budget_above_the_context_is_accepted_always_and_a_small_one_not(tmp_path, monkeypatch):
    rows = run(tmp_path, monkeypatch, contexts=[700], budgets=[64, 1024], new_tokens=24)
    for kind in (measure.RETRIEVAL, measure.RECENT):
        assert rows[kind, 1024].maximal == pytest.approx(1, abs=1e-4)
        assert rows[kind, 1024].gumbel == pytest.approx(1, abs=1e-4)
        assert rows[kind, 64].maximal < 0.999
    for row in rows.values():
        assert row.gumbel <= row.maximal + 1e-6  # sums of fp32


def test_eight_bits_draft_nearly_as_the_model_s_own_dtype_does(tmp_path, monkeypatch):
    changes = {"contexts": [1500], "budgets": [128], "new_tokens": 16}
    rows = run(tmp_path, monkeypatch, **changes, compare=["int8", "int4"])
    exact = rows[measure.RETRIEVAL, 128].maximal
    assert rows["int8", 128].maximal == pytest.approx(exact, abs=0.01)
    assert rows["int4", 128].maximal == pytest.approx(exact, abs=0.1)
    assert len({exact, rows["int8", 128].maximal, rows["int4", 128].maximal}) == 3
    all_in_eight = run(tmp_path, monkeypatch, **changes, retrieval_dtype=ChunkDtype.int8)
    assert all_in_eight[measure.RETRIEVAL, 128].maximal == rows["int8", 128].maximal


def test_rules_are_compared_and_the_oracle_is_best(tmp_path, monkeypatch):
    rows = run(
        tmp_path,
        monkeypatch,
        contexts=[1500],
        budgets=[128],
        new_tokens=24,
        compare=["mean_key", "page_bound", "oracle"],
    )
    best = rows[ORACLE, 128].maximal
    for name in (measure.RETRIEVAL, "mean_key", "page_bound"):
        assert 0.2 < rows[name, 128].maximal < best + 0.02


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "documents is None; it must be names and text files"),
        (["documents={book: nowhere.txt}"], "documents.book is 'nowhere.txt': No such file or directory"),
        (["documents={a: b}", "rule=eldest"], "rule is 'eldest'; it must be one of attention"),
        (["documents={a: b}", "compare=[int3]"], "compare is 'int3'"),
        (["documents={a: b}", "budget=5"], "budget"),
    ],
    ids=str,
)
def test_bad_input_is_refused_in_one_line(capsys, monkeypatch, overrides, message):
    monkeypatch.chdir(ROOT)
    assert measure.main(overrides) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
