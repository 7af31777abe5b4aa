"""The real torchrun over launch/run.py: what it makes of our exit codes, and what we make of its signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.multiprocess.forked_runs import is_alive, wait_until
from tests.support.tiny_models import greedy_tokens, random_prompt

PROJECT = Path(__file__).resolve().parents[2]
PROMPT = random_prompt(60)
NUM_TOKENS = 24
NEVER_ENDING = "generation.max_new_tokens=400"
DEADLINE_SECONDS = 180.0


@pytest.fixture(scope="module")
def models(checkpoints):
    return checkpoints("llama", 0), checkpoints("llama", 1, num_hidden_layers=1)


class TorchrunRun:
    """torchrun and all below it."""

    def __init__(self, folder: Path, num_ranks: int, overrides: list[str], flags: tuple[str, ...] = ()):
        folder.mkdir()
        self.folder = folder
        launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={num_ranks}", *flags]
        with open(folder / "stdout", "w") as out, open(folder / "stderr", "w") as err:
            self.torchrun = subprocess.Popen(
                [*launcher, "launch/run.py", *overrides, f"output={folder / 'run'}"],
                cwd=PROJECT,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        self._seen: dict[int, psutil.Process] = {}

    def descendants(self) -> list[psutil.Process]:
        for process in psutil.Process(self.torchrun.pid).children(recursive=True):
            self._seen[process.pid] = process
        return list(self._seen.values())

    def worker_of(self, rank: int) -> psutil.Process:
        """Of the guard's two processes, the one below."""
        return next(
            process
            for process in self.descendants()
            if process.cmdline()[-1].endswith("worker_process") and process.environ()["RANK"] == str(rank)
        )

    def orchestrator(self) -> psutil.Process:
        return next(process for process in self.descendants() if process.environ().get("RANK") == "0")

    def wait_for_rounds(self) -> None:
        path = self.folder / "run" / "rounds.jsonl"
        wait_until(lambda: path.exists() and path.read_text().count("\n") > 2, "rounds", self.errors)
        self.descendants()

    def wait(self) -> int:
        """torchrun's exit code, when everybody is gone."""
        code = self.torchrun.wait(DEADLINE_SECONDS)
        wait_until(lambda: not self.living(), "end of all processes")
        return code

    def living(self) -> list[int]:
        return [pid for pid in self._seen if is_alive(pid)]

    def errors(self) -> str:
        return (self.folder / "stderr").read_text()

    def own_lines(self) -> list[str]:
        """Of the standard error, ours: torchrun adds a report of its own."""
        return [line for line in self.errors().splitlines() if line.startswith("tierforce: ")]

    def result(self) -> dict:
        return json.loads((self.folder / "run" / "result.json").read_text())

    def end(self) -> None:
        for pid in [*self._seen, self.torchrun.pid]:
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)
        self.torchrun.wait()


@pytest.fixture
def start(models, tmp_path):
    runs = []

    def start_run(num_ranks: int, *overrides: str, flags: tuple[str, ...] = ()) -> TorchrunRun:
        target, drafter = models
        (tmp_path / "prompt.txt").write_text(" ".join(f"t{token}" for token in PROMPT))
        common = [
            f"model.target={target}",
            f"model.drafter={drafter}",
            "model.dtype=float32",
            "model.self_check=false",
            f"prompt.path={tmp_path / 'prompt.txt'}",
            f"generation.max_new_tokens={NUM_TOKENS}",
            "generation.ignore_eos=true",
            "sampling.temperature=0",
            "cache.retrieval.budget=32",
            "cache.streaming.window=40",
            "placement.device=cpu",
            "placement.threads=1",
        ]
        runs.append(TorchrunRun(tmp_path / f"run{len(runs)}", num_ranks, [*common, *overrides], flags))
        return runs[-1]

    yield start_run
    for run in runs:
        run.end()


def test_bad_configuration_is_said_once_and_ends_all_ranks(start):
    run = start(3, "decoding.gamma1=-1")
    assert run.wait() == 1
    (line,) = run.own_lines()
    assert line.startswith("tierforce: decoding.gamma1 is -1")
    assert "Traceback" not in run.errors().partition(line)[0]
    assert "exitcode  : 2" in run.errors()
    # torchrun's report says what we said, and not how to enable tracebacks.
    assert f"traceback : {line.removeprefix('tierforce: ')}" in run.errors()


def test_ctrl_c_in_the_terminal_ends_a_run_in_good_order(start):
    """It reaches torchrun and its ranks at the same time, and torchrun passes it on once more."""
    run = start(2, "decoding.mode=autoregressive", NEVER_ENDING)
    run.wait_for_rounds()
    os.killpg(run.torchrun.pid, signal.SIGINT)
    assert run.wait() == 1
    assert run.own_lines() == []
    assert run.result()["finish_reason"] == "interrupted"
    assert len(run.result()["token_ids"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_torchrun_ends_a_run_in_good_order(start, number):
    run = start(5, NEVER_ENDING)
    run.wait_for_rounds()
    run.torchrun.send_signal(number)
    assert run.wait() == 1
    assert run.own_lines() == []
    assert run.result()["finish_reason"] == "interrupted"


@pytest.mark.slow
def test_a_killed_verifier_ends_all(start):
    run = start(5, NEVER_ENDING)
    run.wait_for_rounds()
    run.worker_of(3).kill()
    assert run.wait() == 1
    (line,) = run.own_lines()
    assert "phase decode, role verifier, rank 3" in line and "killed by signal 9" in line


@pytest.mark.slow
def test_a_killed_drafter_does_not_end_the_run(start, models):
    run = start(5, "generation.max_new_tokens=200")
    run.wait_for_rounds()
    run.worker_of(1).kill()
    assert run.wait() == 0
    assert run.result()["token_ids"] == greedy_tokens(models[0], PROMPT, 200)
    drafter = run.result()["processes"][0]
    assert drafter["roles"] == ["drafter"] and drafter["restarts"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 5])
def test_a_killed_orchestrator_takes_all_along(start, num_ranks):
    run = start(num_ranks, NEVER_ENDING)
    run.wait_for_rounds()
    run.orchestrator().kill()
    assert run.wait() == 1


@pytest.mark.slow
def test_max_restarts_of_torchrun_starts_the_run_again(start, models):
    run = start(2, "decoding.mode=autoregressive", "generation.max_new_tokens=200", flags=("--max-restarts=1",))
    run.wait_for_rounds()
    run.worker_of(1).kill()
    assert run.wait() == 0
    assert len(run.own_lines()) == 1
    assert run.result()["token_ids"] == greedy_tokens(models[0], PROMPT, 200)


@pytest.mark.slow
def test_two_runs_at_once_do_not_meet(start, models):
    runs = [start(2, "decoding.mode=autoregressive") for _ in range(2)]
    for run in runs:
        assert run.wait() == 0, run.errors()
        assert run.result()["token_ids"] == greedy_tokens(models[0], PROMPT, NUM_TOKENS)
