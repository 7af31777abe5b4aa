"""orchestrator/run_files.py: result.json is whole or absent; rounds.jsonl grows as rounds happen."""

import errno
import json
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager

import pytest

from orchestrator import run_files as report_module
from orchestrator.round import Round
from orchestrator.run_files import RESULT, ROUNDS, Report, num_bytes_to_reserve, versions

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
        "passes_original_length": False,
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


@contextmanager
def files_of_at_most(num_bytes: int):
    """As on a full disk: what would make a file larger fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_rounds_that_a_full_disk_refuses_leave_whole_lines_and_a_reason(report, tmp_path):
    report.add_round(ROUND, 0.5)
    of_one = (tmp_path / ROUNDS).stat().st_size
    with files_of_at_most(5 * of_one // 2):
        for _ in range(3):
            report.add_round(ROUND, 0.5)
    report.add_round(ROUND, 0.5)  # a gap would be worse than an end
    assert (tmp_path / ROUNDS).stat().st_size == 2 * of_one
    assert list(report.incomplete) == [ROUNDS] and "File too large: no rounds from 1 on" in report.incomplete[ROUNDS]


def test_a_result_without_room_is_its_tokens_and_text(report, tmp_path):
    result = {"token_ids": [1, 2], "text": "ab", "finish_reason": "length", "config": "x" * 5000}
    with files_of_at_most(2000):
        report.write_result(result)
    written = json.loads((tmp_path / RESULT).read_text())
    assert "File too large" in written.pop("left_out")
    assert written == {"token_ids": [1, 2], "text": "ab", "finish_reason": "length"}


def test_the_room_for_the_result_is_taken_at_the_start_and_given_back(tmp_path):
    num_bytes = num_bytes_to_reserve({"output": "o"}, 4000)
    assert num_bytes > 4000 * len("128000, token")
    report = Report(tmp_path, num_bytes)
    (reserve,) = set(tmp_path.iterdir()) - {tmp_path / ROUNDS}
    assert reserve.stat().st_blocks * 512 >= num_bytes
    report.write_result({"text": "x"})
    assert (tmp_path / RESULT).stat().st_size < 100
    report.close()
    assert {path.name for path in tmp_path.iterdir()} == {ROUNDS, RESULT}
    again = Report(tmp_path, num_bytes)
    again.begin()
    again.close()
    assert {path.name for path in tmp_path.iterdir()} == {ROUNDS}


def test_a_file_system_that_cannot_reserve_is_written_instead(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(report_module.os, "posix_fallocate", refuse)
    report = Report(tmp_path, 5000)
    assert (tmp_path / report_module.RESERVE).stat().st_size == 5000
    report.write_result({"text": "x"})
    report.close()
    assert json.loads((tmp_path / RESULT).read_text()) == {"text": "x"}


def test_without_room_at_the_start_an_earlier_result_stays(tmp_path):
    (tmp_path / RESULT).write_text("{}")
    with files_of_at_most(100), pytest.raises(OSError, match="File too large"):
        Report(tmp_path, 1000)
    assert [path.name for path in tmp_path.iterdir()] == [RESULT]


def test_a_folder_that_was_removed_meanwhile_is_made_again(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    report = Report(folder, 1000)
    shutil.rmtree(folder)
    report.add_round(ROUND, 0.5)
    report.write_result({"text": "x"})
    report.close()
    assert json.loads((folder / RESULT).read_text()) == {"text": "x"}


def test_numbers_that_json_does_not_have_are_an_error(report):
    with pytest.raises(ValueError):
        report.write_result({"x": float("nan")})


def test_a_new_run_removes_the_earlier_result(tmp_path):
    (tmp_path / RESULT).write_text("{}")
    (tmp_path / ROUNDS).write_text("old\n")
    report = Report(tmp_path)
    assert (tmp_path / RESULT).exists() and (tmp_path / ROUNDS).read_text() == "old\n", "the run has not begun"
    report.begin()
    report.close()
    assert not (tmp_path / RESULT).exists() and (tmp_path / ROUNDS).read_text() == ""


def test_versions_name_what_decides_the_tokens():
    found = versions()
    assert set(found) == {"python", "torch", "transformers", "hydra", "tierforce"}
    assert all(found.values()), found


def test_reporting_loads_without_torch_and_transformers():
    modules = "orchestrator.run_files, orchestrator.display, orchestrator.metrics"
    check = f"import sys, {modules}; assert not {{'torch', 'transformers', 'hydra'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)
