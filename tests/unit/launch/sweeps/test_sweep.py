"""launch/sweep.py: each job on its own, failures recorded, finished jobs left out, one table, exit codes.

Most sweeps here start tests/support/fake_run.py in place of launch/run.py.
"""

from __future__ import annotations

import csv
import io
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from rich.console import Console

from conf.schema import ConfigError
from launch import sweep
from launch.command_line.overrides import CONFIG_FOLDER
from launch.sweeps.config import SweepConfig, read_sweep
from launch.sweeps.job import RUN_PROGRAM, jobs_of, override_of, run_jobs
from launch.sweeps.progress import SweepProgress, duration
from launch.sweeps.runner import run_sweep
from launch.sweeps.table import METRICS, finished_result, read_rows, read_table, row_of_result, write_row, write_table
from tests.support import fake_run

ROOT = Path(sweep.__file__).parents[1]
FAKE_RUN = Path(fake_run.__file__)


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Sweeps in tmp_path/s with the fake program; returns the exit code and what was shown."""
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    monkeypatch.chdir(tmp_path)

    def run(*argv: str, program: Path = FAKE_RUN) -> tuple[int, str]:
        text = io.StringIO()
        code = run_sweep([*argv, "output=s"], Console(file=text, width=1000), program)
        return code, text.getvalue()

    return run


def rows_by(*keys: str) -> dict:
    """The rows of the sweep by these settings."""
    return {tuple(row[key] for key in keys): row for row in read_rows(Path("s"))}


def starts() -> list[str]:
    path = Path("s/jobs/starts.txt")
    return path.read_text().splitlines() if path.exists() else []


# ---- A sweep. ----


def test_one_of_four_fails_the_others_run_and_a_second_sweep_runs_only_that_one(fake):
    grid = ["-m", "decoding.gamma1=1,2", "prompt.text=fine,fail"]
    code, shown = fake(*grid, "decoding.gamma2=4")
    assert code == 1
    rows = rows_by("decoding.gamma1", "prompt.text")
    assert {key: row["status"] for key, row in rows.items()} == {
        (1, "fine"): "done",
        (1, "fail"): "failed",
        (2, "fine"): "done",
        (2, "fail"): "failed",
    }
    failed = rows[1, "fail"]
    assert failed["exit_code"] == 1 and failed["message"].startswith("failed in phase decode, role verifier, rank 0")
    assert Path("s", failed["log"]).read_text() == "Traceback"
    assert rows[1, "fine"]["tbt_ms"] == 15 and rows[1, "fine"]["retrieval_accepted_per_position"] == [0.9, 0.5]
    assert "2 done, 2 failed, 0 left" in shown and "\x1b" not in shown
    assert "[4/4]" in shown and "MemoryError: no room" in shown
    assert len(starts()) == 4

    mended = Path("mended.py").absolute()
    mended.write_text(FAKE_RUN.read_text().replace('how == "fail"', "False"))
    code, shown = fake(*reversed(grid[1:]), "-m", "decoding.gamma2=4", program=mended)
    assert code == 0 and "4 done (2 of them before), 0 failed, 0 left" in shown
    assert len(starts()) == 6 and all("fail" in line for line in starts()[4:])
    code, _ = fake(*grid, "decoding.gamma2=4", program=mended)
    assert code == 0 and len(starts()) == 6
    code, _ = fake(*grid, "decoding.gamma2=4", "resume=false", program=mended)
    assert code == 0 and len(starts()) == 10


def test_the_table_has_a_row_for_each_job_as_csv_and_parquet(fake):
    fake("-m", "decoding.gamma1=1,2", "prompt.text=fine,fail")
    for name in ("table.csv", "table.parquet"):
        table = read_table(Path("s", name))
        assert len(table) == 4 and sum(row["status"] == "done" for row in table) == 2
        row = next(row for row in table if row["status"] == "done" and row["decoding.gamma1"] == 2)
        assert (row["tbt_ms"], row["decoding.mode"], row["prompt.path"]) == (10, "triforce", None)
        assert row["drafter_accepted_per_position"] in ([0.9, 0.5], "[0.9, 0.5]")
    with Path("s/table.csv").open() as file:
        assert {"id", "seconds", "host", "stall_s", "verify_s", "torch"} <= set(next(csv.reader(file)))
    assert not list(Path("s").glob(".table*"))


def test_without_m_one_job_runs(fake):
    code, shown = fake("decoding.gamma1=4")
    assert code == 0 and len(starts()) == 1 and "1 done, 0 failed, 0 left" in shown


def test_a_baseline_is_run_once_whatever_the_settings_that_have_no_part_in_it(fake):
    code, shown = fake("-m", "decoding.mode=autoregressive,triforce", "decoding.gamma1=1,2", "decoding.gamma2=4,8")
    assert code == 0 and len(starts()) == 5 and "5 done" in shown
    assert sum("autoregressive" in line for line in starts()) == 1
    assert rows_by("decoding.mode", "decoding.gamma1")["autoregressive", None]["status"] == "done"


def test_every_setting_is_run_before_any_is_repeated(fake):
    assert fake("-m", "repeat=2", "decoding.gamma1=1,3")[0] == 0
    assert starts() == ["decoding.gamma1=1", "decoding.gamma1=3"] * 2
    assert {row["repetition"] for row in read_rows(Path("s"))} == {1, 2}
    assert fake("repeat=3", "decoding.gamma1=3")[0] == 0
    assert len(starts()) == 5


@pytest.mark.parametrize(
    ("how", "status", "exit_code", "message"),
    [
        ("fail", "failed", 1, "MemoryError"),
        ("refuse", "refused", 2, "cache.full.tier is 'device'"),
        ("die", "failed", -9, "ended by SIGKILL; reading"),
        ("half", "failed", 0, ""),
        ("interrupted", "failed", 0, ""),
        ("hang", "failed", None, "longer than timeout_s=0.5"),
    ],
)
def test_whatever_ends_a_job_is_recorded(fake, how, status, exit_code, message):
    code, _ = fake(f"prompt.text={how}", "timeout_s=0.5" if how == "hang" else "timeout_s=60")
    (row,) = read_rows(Path("s"))
    assert code == 1 and (row["status"], row["exit_code"]) == (status, exit_code) and message in row["message"]


def test_an_illegal_combination_is_recorded_and_the_others_run(fake):
    code, shown = fake("-m", "cache.retrieval.budget=100,128", "cache.retrieval.chunk_size=8,4")
    assert code == 1 and len(starts()) == 3 and "3 done, 1 failed" in shown
    row = rows_by("cache.retrieval.budget", "cache.retrieval.chunk_size")[100, 8]
    assert (row["status"], row["exit_code"]) == ("refused", 2)
    assert "cache.retrieval.budget is 100; it must be a multiple" in row["message"]


REFUSED = [
    (["-m", "decoding.gamma1=1,four"], ["decoding.gamma1", "'four'", "an integer"]),
    (["-m", "decoding.gama1=1,2"], ["decoding.gama1", "decoding.gamma1"]),
    (["-m", "decoding.gamma1=1,65", "decoding.gamma2=4,8"], ["decoding.gamma1 is 65", "between 0 and 64"]),
    (["-m", "cache.retrieval.budget=512,1001"], ["cache.retrieval.budget is 1001", "1000"]),
    (["-m", "model=demo,gpt5"], ["model is 'gpt5'", "demo"]),
    (["-m", "experiment=nothing"], ["experiment is 'nothing'", "gamma_grid"]),
    (["-m", "output=a,b", "decoding.gamma1=1,2"], ["output", "one value"]),
    (["-m", "hydra/launcher=moon"], ["hydra/launcher/moon", ".[sweep]"]),
    (["-m", "processes=1,2", "placement=inline"], ["2", "inline"]),
    (["-m", "prompt.path=nowhere.txt"], ["prompt.path", "nowhere.txt", "UTF-8"]),
    (["-m", "prompt.path=-"], ["prompt.path is '-'", "each job reads anew"]),
    (["-m", "output=~nobody-here/x"], ["output is", "no user 'nobody-here'"]),
    (["decoding.gamma1=1,2"], ["decoding.gamma1", "several values"]),
    (["repeat=0"], ["repeat is 0", ">= 1"]),
    (["repeats=3"], ["repeats", "did you mean repeat?"]),
    (["processes=none"], ["processes", "an integer"]),
    (["objective=speed"], ["objective", "tbt_ms"]),
    (["timeout_s=-1"], ["timeout_s", "above 0"]),
]


@pytest.mark.parametrize(("argv", "named"), REFUSED, ids=[" ".join(argv) for argv, _ in REFUSED])
def test_what_can_never_be_right_is_refused_before_any_job(fake, capfd, argv, named):
    code = sweep.main(argv)
    err = capfd.readouterr().err
    assert code == 2 and err.startswith("tierforce: ") and err.count("\n") == 1
    assert all(part in err for part in named), err
    assert not list(Path().iterdir())


def test_torchrun_is_refused_since_the_sweep_starts_it(fake, capfd, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert sweep.main([]) == 2
    assert "python launch/sweep.py" in capfd.readouterr().err


def test_an_interrupted_sweep_ends_its_job_and_leaves_no_row(tmp_path):
    code = "import sys; from pathlib import Path; from rich.console import Console; "
    code += "from launch.sweeps.runner import run_sweep; "
    code += f"sys.exit(run_sweep(sys.argv[1:], Console(), Path({fake_run.__file__!r})))"
    command = [sys.executable, "-c", code, "-m", "prompt.text=fine,hang,fine2", f"output={tmp_path}/s"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    log = tmp_path / "s/jobs/starts.txt"
    ends = time.monotonic() + 60
    while not (log.exists() and "hang" in log.read_text()):
        assert time.monotonic() < ends
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "1 done, 0 failed, 2 left" in shown
    assert len(read_rows(tmp_path / "s")) == 1
    running = subprocess.run(["pgrep", "-f", f"output={tmp_path}"], capture_output=True, text=True, check=False)
    assert running.stdout == ""


def test_the_real_program_runs_and_is_measured(checkpoints, tmp_path):
    target, drafter = checkpoints("llama", 0), checkpoints("llama", 1)
    argv = [f"model.target={target}", f"model.drafter={drafter}", "prompt.text='t1 t2 t3 t4 t5 t6'"]
    argv += ["placement.threads=1", "cache.streaming.window=40", "generation.max_new_tokens=6"]
    argv += ["sampling.temperature=0", "model.self_check=false", f"output={tmp_path}/s"]
    assert sweep.main(argv) == 0
    (row,) = read_rows(tmp_path / "s")
    assert row["new_tokens"] == 6 and row["tbt_ms"] > 0 and row["prompt.text"] == "t1 t2 t3 t4 t5 t6"
    assert finished_result(tmp_path / "s/jobs" / row["id"])["config"]["sampling"]["temperature"] == 0


# ---- Jobs. ----


def configured(**changes):
    return OmegaConf.merge(OmegaConf.structured(SweepConfig), changes)


def test_the_same_settings_come_to_the_same_folder_and_others_do_not():
    def job(**changes):
        return jobs_of(configured(**changes))[0]

    base = job(decoding={"gamma1": 4, "gamma2": 8}).id
    assert base == job(decoding={"gamma2": 8, "gamma1": 4}).id == job(decoding={"gamma1": 4}, resume=False).id
    others = [
        job(decoding={"gamma1": 3}),
        job(decoding={"gamma1": 4}, processes=2),
        job(decoding={"gamma1": 4}, repetition=2),
        job(decoding={"gamma1": 4}, sampling={"seed": None}),
    ]
    assert len({base, *(other.id for other in others)}) == 5


def test_several_processes_are_started_by_torchrun():
    (job,) = jobs_of(configured(processes=5, decoding={"gamma1": 4}))
    assert job.command[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=5"]
    assert job.command[5:] == [str(RUN_PROGRAM), "decoding.gamma1=4", f"output='{job.folder}'"]


def test_a_job_that_two_ask_for_at_once_is_run_once(fake):
    (job,) = jobs_of(configured(output="s"), FAKE_RUN)
    with ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(lambda _: job.run(resume=True, timeout_s=None), range(4)))
    assert [row["status"] for row in rows] == ["done"] * 4 and len(starts()) == 1


def test_the_objective_is_the_least_of_the_median_and_infinite_where_a_job_failed(fake):
    def objective(**changes):
        return run_jobs(configured(output="s", **changes), FAKE_RUN)

    assert objective() == 10
    assert objective(objective="-tokens_per_s", repeat=2) == -100
    assert objective(prompt={"text": "fail"}) == float("inf")


def test_texts_of_a_sweep_are_as_typed():
    read = read_sweep(["prompt.text=2024.10,'a, b'", "model.drafter=007", "sampling.seed=1,2"], is_multirun=True)
    assert {(cfg.prompt.text, cfg.model.drafter, cfg.sampling.seed) for cfg in read.grid} == {
        ("2024.10", "007", 1), ("2024.10", "007", 2), ("a, b", "007", 1), ("a, b", "007", 2),
    }  # fmt: skip
    (job,) = jobs_of(next(cfg for cfg in read.grid if cfg.sampling.seed == 1 and cfg.prompt.text == "2024.10"))
    assert {"prompt.text='2024.10'", "model.drafter='007'", "sampling.seed=1"} == set(job.overrides)


def test_a_sweep_goes_to_the_folder_that_was_typed(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    argv = ["-m", "prompt.text=x", "sampling.seed=1", 'output="~/1.10, (b)"']
    assert run_sweep(argv, Console(file=io.StringIO(), width=1000), FAKE_RUN) == 0
    assert [path.name for path in Path().iterdir()] == ["1.10, (b)"]
    (row,) = read_rows(Path("1.10, (b)"))
    assert row["status"] == "done"


TEXTS = st.text(st.sampled_from("ab '\"\\${}[]()=,:\n\t#é#~@!|&*?/"), max_size=12)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(value=st.one_of(TEXTS, st.sampled_from(["null", "True", "4", "1e3", "nan", ""])))
def test_any_text_survives_as_an_override(value):
    """Through Hydra's grammar, and as a value that is no reference."""
    parsed = OverridesParser.create().parse_override(override_of("prompt.text", value))
    config = OmegaConf.create()
    OmegaConf.update(config, "text", parsed.value())
    assert config.text == value


@pytest.mark.parametrize("value", [None, True, 3, 0.5, 1e-9, [], ["a b", "c"], [1, 2]])
def test_any_other_value_survives_as_an_override(value):
    assert OverridesParser.create().parse_override(override_of("key", value)).value() == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"finish_reason": "len',
        '{"finish_reason": "interrupted"}',
        '{"finish_reason": "failed"}',
        '{"finish_reason": "stop", "left_out": "no space"}',
        "{}",
    ],
)
def test_only_a_whole_result_of_a_run_that_ended_counts(tmp_path, text):
    (tmp_path / "result.json").write_text(text)
    assert finished_result(tmp_path) is None
    (tmp_path / "result.json").write_text('{"finish_reason": "stop"}')
    assert finished_result(tmp_path) is not None


def test_a_table_of_mixed_values_reads_back_equal(tmp_path):
    rows = [
        {"id": "a", "status": "done", "sampling.temperature": 0, "cache.retrieval.rebuild": "4", "tbt_ms": 1.5},
        {"id": "b", "status": "failed", "sampling.temperature": 0.5, "cache.retrieval.rebuild": "x", "message": "é\""},
        {"id": "c", "status": "done", "decoding.gamma1": "auto", "tbt_ms": 2},
        {"id": "d", "status": "done", "decoding.gamma1": 2, "retrieval_accepted_per_position": [1.0, 0.5]},
    ]  # fmt: skip
    paths = write_table(tmp_path, rows)
    assert [path.suffix for path in paths] == [".csv", ".parquet"]
    for path in paths:
        table = read_table(path)
        assert [row["sampling.temperature"] for row in table] == [0, 0.5, None, None]
        assert [str(row["decoding.gamma1"]) for row in table] == ["None", "None", "auto", "2"]
        assert table[1]["message"] == 'é"' and table[3]["retrieval_accepted_per_position"] == [1.0, 0.5]


def test_what_a_run_measured_is_none_of_its_settings():
    row = row_of_result(fake_run.result({"decoding": {"mode": "autoregressive", "gamma1": 2, "gamma2": 8}}, None))
    assert row["process_peak_bytes"] == 9
    assert [key for key in row if key not in METRICS and "." not in key] == []
    assert [key for key in METRICS if key not in row] == []


def test_settings_without_a_part_in_a_run_are_null():
    row = row_of_result(fake_run.result({"decoding": {"mode": "autoregressive", "gamma1": 2, "gamma2": 8}}, None))
    assert row["decoding.mode"] == "autoregressive" and row["decoding.gamma1"] is None and "output" not in row


# ---- Progress. ----


def test_progress_counts_what_is_new_and_tells_the_time_left(tmp_path):
    def leave(job: str, status: str, seconds: float = 1.0) -> None:
        (tmp_path / "jobs" / job).mkdir(parents=True, exist_ok=True)
        if status == "done" and not (tmp_path / "jobs" / job / "result.json").exists():
            (tmp_path / "jobs" / job / "result.json").write_text("{}")
        row = {"id": job, "status": status, "seconds": seconds, "message": "no \x1b room", "log": "l", "x.gamma": 3}
        write_row(tmp_path / "jobs" / job, row | {"tbt_ms": 12.5})

    leave("before", "done")
    leave("other", "done")
    leave("again", "failed")
    now, text = [0.0], io.StringIO()
    console = Console(file=text, width=1000)
    expected = {"before", "again", "a", "b", "c"}
    progress = SweepProgress(tmp_path, console, expected=expected, total=5, axes=["x.gamma"], clock=lambda: now[0])
    assert progress.status() == "0 done, 0 failed, 5 left"
    now[0] = 30.0
    leave("a", "done", 30.0)
    progress.look()
    assert text.getvalue() == "[1/5] done: x.gamma=3: TBT 12.5 ms (30 s); 1 done, 0 failed, 4 left, about 2 min\n"
    leave("before", "done")
    leave("again", "failed")
    progress.look()
    assert progress.status() == "2 done (1 of them before), 1 failed, 2 left, about 30 s"
    assert "failed: x.gamma=3: no \\x1b room" in text.getvalue() and "other" not in text.getvalue()
    assert progress.num_left == 2 and len(progress.rows) == 3


def test_durations_are_for_people():
    texts = {4.4: "4 s", 99: "99 s", 150: "2 min", 3599: "60 min", 7500: "2 h 05 min"}
    assert {seconds: duration(seconds) for seconds in texts} == texts


def test_on_a_terminal_the_state_is_shown_live(tmp_path):
    text = io.StringIO()
    console = Console(file=text, width=80, force_terminal=True)
    with SweepProgress(tmp_path, console, expected={"a"}, total=1, axes=[]):
        pass
    assert "0 done, 0 failed, 1 left" in text.getvalue()


# ---- Experiments. ----


@pytest.mark.parametrize("path", sorted((CONFIG_FOLDER / "experiment").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_is_legal_and_begins_with_its_command(path):
    read = read_sweep([f"experiment={path.stem}"], is_multirun=True)
    jobs = {job.id: job for cfg in read.grid for job in jobs_of(cfg)}
    assert 10 <= len(jobs) <= 60 and not any(job.refusal for job in jobs.values())
    assert {job.settings["decoding.mode"] for job in jobs.values()} >= {"autoregressive", "triforce"}
    header, command = path.read_text(encoding="utf-8").splitlines()[:2]
    # Hydra reads its own header only on the first line.
    assert header == "# @package _global_" and command == f"# python launch/sweep.py -m experiment={path.stem}"
    assert read.cfg.output == f"outputs/sweeps/{path.stem}"


def test_the_command_line_wins_over_an_experiment():
    read = read_sweep(
        ["experiment=gamma_grid", "decoding.gamma1=3", "decoding.gamma2=5,6", "sampling.seed=0"], is_multirun=True
    )
    seen = {(cfg.decoding.gamma1, cfg.decoding.gamma2) for cfg in read.grid}
    assert seen == {(3, 5), (3, 6)} and len(read.grid) == 4
    with pytest.raises(ConfigError, match="several"):
        read_sweep(["decoding.gamma2=5,6"], is_multirun=False)
