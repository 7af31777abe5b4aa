"""orchestrator/run_files.py: result.json is whole or absent; rounds.jsonl grows as rounds happen."""

import json
import subprocess
import sys

import pytest

from orchestrator import run_files as report_module
from orchestrator.round import Round
from orchestrator.run_files import RESULT, ROUNDS, Report, versions

ROUND = Round(
    index=1,
    proposed=[1, 2],
    origins=["drafter", "retrieval"],
    num_accepted=1,
    tokens=[1, 3],
    inner_steps=[(2, 1)],
    gamma1=2,
    gamma2=3,
    seconds={"draft": 0.25},
)


@pytest.fixture
def report(tmp_path):
    opened = Report(tmp_path)
    yield opened
    opened.close()


def test_each_round_is_a_line_at_once(report, tmp_path):
    for count in (1, 2):
        report.add_round(ROUND, 0.5)
        lines = (tmp_path / ROUNDS).read_text().splitlines()
        assert len(lines) == count
    assert json.loads(lines[0]) == {
        "index": 1,
        "proposed": [1, 2],
        "origins": ["drafter", "retrieval"],
        "num_accepted": 1,
        "tokens": [1, 3],
        "gamma1": 2,
        "gamma2": 3,
        "budget": None,
        "inner_steps": [[2, 1]],
        "num_steps_ahead": 0,
        "rebuilt": False,
        "ahead": None,
        "seconds": 0.5,
        "phases_s": {"draft": 0.25},
    }


def test_the_result_reads_back_equal(report, tmp_path):
    result = {
        "token_ids": [1, -2, 3],
        "text": 'é🦉\n[\n1,\n 2\n]\x1b\0 "',
        "nested": {"a": [], "b": [0.5, 1e-9], "c": None},
    }
    path = report.write_result(result)
    assert path == tmp_path / RESULT
    assert json.loads(path.read_text(encoding="utf-8")) == result
    assert "[1, -2, 3]" in path.read_text(encoding="utf-8")
    assert sorted(file.name for file in tmp_path.iterdir()) == [RESULT, ROUNDS]


def test_a_lone_surrogate_survives(report):
    path = report.write_result({"text": "a\udc80b"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"text": "a\udc80b"}


def test_a_failure_while_writing_leaves_no_half_result(report, tmp_path, monkeypatch):
    monkeypatch.setattr(report_module.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        report.write_result({"text": "x"})
    assert not (tmp_path / RESULT).exists()


def test_numbers_that_json_does_not_have_are_an_error(report):
    with pytest.raises(ValueError):
        report.write_result({"x": float("nan")})


def test_a_new_run_removes_the_earlier_result(tmp_path):
    (tmp_path / RESULT).write_text("{}")
    (tmp_path / ROUNDS).write_text("old\n")
    Report(tmp_path).close()
    assert not (tmp_path / RESULT).exists() and (tmp_path / ROUNDS).read_text() == ""


def test_versions_name_what_decides_the_tokens():
    found = versions()
    assert set(found) == {"python", "torch", "transformers", "hydra", "tierforce"}
    assert all(found.values()), found


def test_reporting_loads_without_torch_and_transformers():
    modules = "orchestrator.run_files, orchestrator.display, orchestrator.metrics"
    check = f"import sys, {modules}; assert not {{'torch', 'transformers', 'hydra'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)
