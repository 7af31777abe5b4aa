"""Death, stalls and broken numbers in the processes of a run: no hang, no wrong token, nothing left behind."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from launch.command_line.interruption import Interruption
from tests.multiprocess import faults, forked_runs
from tests.support.tiny_models import greedy_tokens, random_prompt

NUM_TOKENS = 40
PROMPT = random_prompt(60)
STALL_S = 3.0
QUICK = [f"placement.stall_timeout_s={STALL_S}", "placement.draft_timeout_s=1.5"]
DISK = ["cache.full.tier=disk", "cache.full.block_tokens=16", "tiers.disk.readers=1"]
AUTOREGRESSIVE = ["decoding.mode=autoregressive"]
DONE, FAILED, INTERRUPTED = 0, 1, 130


@pytest.fixture(scope="module")
def models(checkpoints):
    return checkpoints("llama", 0), checkpoints("llama", 1, num_hidden_layers=1)


@pytest.fixture(scope="module")
def expected(models) -> list[int]:
    return greedy_tokens(models[0], PROMPT, NUM_TOKENS)


@pytest.fixture
def start(models, tmp_path):
    """Starts a run; ends what is left of it, and checks that nothing is."""
    runs = []

    def start_run(prepare, *overrides: str, num_ranks: int = 5, absent=()) -> forked_runs.ForkedRun:
        target, drafter = models
        prompt = tmp_path / "prompt.txt"
        prompt.write_text(" ".join(f"t{token}" for token in PROMPT))
        common = [
            f"model.target={target}",
            f"model.drafter={drafter}",
            "model.dtype=float32",
            "model.self_check=false",
            f"prompt.path={prompt}",
            f"generation.max_new_tokens={NUM_TOKENS}",
            "generation.ignore_eos=true",
            "sampling.temperature=0",
            "cache.retrieval.budget=32",
            "cache.streaming.window=40",
            "placement=pipeline",
            "placement.device=cpu",
            "placement.threads=1",
        ]
        folder = tmp_path / f"run{len(runs)}"
        runs.append(forked_runs.start(folder, [*common, *overrides], num_ranks, prepare, absent))
        return runs[-1]

    shared_before = set(os.listdir("/dev/shm"))
    yield start_run
    for run in runs:
        try:
            run.wait()
            assert not run.living()
            assert list((run.folder / "tmp").iterdir()) == []
            assert not [name for name in set(os.listdir("/dev/shm")) - shared_before if "tierforce" in name]
        finally:
            run.end()


def process(run: forked_runs.ForkedRun, rank: int) -> dict:
    return next(one for one in run.result["processes"] if one["rank"] == rank)


# ---- Drafter and retriever: the run goes on. ----


def test_a_drafter_that_dies_or_hangs_costs_speed_only(start, expected):
    run = start(faults.unlucky_drafter, *QUICK, num_ranks=4)
    run.wait()
    assert run.exit_codes == dict.fromkeys(range(4), DONE), run.report()
    assert run.result["token_ids"] == expected
    drafter = process(run, faults.PIPELINE_DRAFTER)
    assert drafter["restarts"] == 3 and drafter["is_out_of_order"]
    assert run.output.count("drafter is back") == 3
    for reason in ("killed by signal 9", "Propose took more than 1.5 s", "the run goes on without it"):
        assert reason in run.output
    assert run.result["speculation"]["levels"][0]["proposed"] > 0


def test_a_retriever_that_dies_or_hangs_costs_speed_only(start, expected):
    run = start(faults.unlucky_retriever, *QUICK, num_ranks=4)
    run.wait()
    assert run.result["token_ids"] == expected, run.report()
    retriever = process(run, faults.PIPELINE_RETRIEVER)
    assert retriever["restarts"] == 3 and not retriever["is_out_of_order"]
    assert "Extend took more than 1.5 s" in retriever["last_failure"]
    assert "OSError: injected" in run.output
    assert run.output.count("retriever is back") == 3


def test_a_drafter_killed_while_idle_is_back_before_it_is_missed(start, expected):
    run = start(faults.drafter_killed_while_idle, num_ranks=4)
    run.wait()
    assert run.result["token_ids"] == expected, run.report()
    assert process(run, faults.PIPELINE_DRAFTER)["restarts"] == 1
    assert "drafter is back" in run.output


def test_drafts_outside_the_vocabulary_are_rejected(start, expected):
    run = start(faults.drafts_of_nonsense, "decoding.mode=streaming", num_ranks=4)
    run.wait()
    assert run.result["token_ids"] == expected, run.report()
    (level,) = run.result["speculation"]["levels"]
    assert level["proposed"] > 0 and level["accepted"] == 0


def test_logits_that_are_not_finite_draft_nothing_and_are_counted(start, expected):
    run = start(faults.drafter_of_nan, num_ranks=4)
    run.wait()
    assert run.result["token_ids"] == expected, run.report()
    drafter = process(run, faults.PIPELINE_DRAFTER)
    assert drafter["failed_drafts"] > 0 and drafter["restarts"] == 0


def test_broken_distributions_are_no_proposals(start):
    """Then each token is drawn as without a drafter: from the target, with the same random number."""
    sampled = ["sampling.temperature=1", "sampling.seed=5", "sampling.top_p=1"]
    broken = start(faults.broken_distributions, "decoding.mode=streaming", *sampled, num_ranks=4)
    alone = start(forked_runs.nothing, *AUTOREGRESSIVE, *sampled, num_ranks=4)
    for run in (broken, alone):
        run.wait()
    assert broken.result["token_ids"] == alone.result["token_ids"], broken.report()
    assert broken.result["speculation"]["levels"][0]["proposed"] > 0


# ---- A rank of the verifier: the run ends. ----

ROOT_CAUSES = [
    (faults.first_verifier_killed, "decode", 3, "killed by signal 9"),
    (faults.second_verifier_killed, "decode", 4, "killed by signal 9"),
    (faults.second_verifier_stopped, "decode", 4, "no heartbeat for"),
    (faults.first_verifier_stuck, "decode", 3, "no progress for"),
    (faults.second_verifier_raises, "decode", 4, "OSError: injected"),
    (faults.second_verifier_raises_while_loading, "load", 4, "OSError: injected"),
]
IDS = [case[0].__name__ for case in ROOT_CAUSES]


@pytest.mark.parametrize(("prepare", "phase", "rank", "reason"), ROOT_CAUSES, ids=IDS)
def test_a_lost_verifier_ends_the_run_with_its_root_cause(start, prepare, phase, rank, reason):
    run = start(prepare, *AUTOREGRESSIVE, *QUICK)
    run.wait()
    assert run.exit_codes[0] == FAILED, run.report()
    (line,) = run.errors
    assert line.startswith(f"tierforce: failed in phase {phase}, role verifier, rank {rank}: "), line
    assert reason in line
    for survivor in {3, 4} - ({rank} if "killed" in reason else set()):
        assert "most recent call first" in run.log_of(survivor), f"no stacks of rank {survivor}"


def test_a_pause_within_the_deadline_does_not_matter(start, expected):
    run = start(faults.verifier_paused, *AUTOREGRESSIVE, "placement.stall_timeout_s=20")
    run.wait()
    assert run.result["token_ids"] == expected, run.report()


def test_a_damaged_block_of_one_rank_is_read_again_by_all(start, expected):
    run = start(faults.damaged_block_of_second_verifier, *AUTOREGRESSIVE, *QUICK, *DISK)
    run.wait()
    assert run.result["token_ids"] == expected, run.report()
    assert run.output.count("a stored block was damaged") == 1
    assert run.result["streaming"]["damaged_blocks"] == 1


# ---- Signals. ----


def test_a_killed_orchestrator_takes_all_along(start):
    run = start(faults.slow_verifier)
    run.wait_for_output("reading")
    began = time.monotonic()
    os.kill(run.pid_of(0), signal.SIGKILL)
    forked_runs.wait_until(lambda: not run.living(), "end of all processes", run.report)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_ends_the_run_in_good_order(start, expected, number):
    run = start(faults.slow_verifier, *AUTOREGRESSIVE)
    run.wait_for_output("reading")
    forked_runs.wait_until((Path(run.folder) / "run" / "rounds.jsonl").read_text, "round", run.report)
    os.kill(run.pid_of(0), number)
    run.wait()
    assert run.exit_codes[0] == INTERRUPTED, run.report()
    assert run.errors == []
    result = run.result
    assert result["finish_reason"] == "interrupted"
    assert 0 < len(result["token_ids"]) < NUM_TOKENS and result["token_ids"] == expected[: len(result["token_ids"])]
    assert {one["rank"] for one in result["processes"]} == {1, 2, 3, 4}


def test_a_guard_that_dies_is_the_root_cause_not_the_signal_that_follows(start):
    run = start(faults.slow_verifier)
    run.wait_for_output("reading")
    os.kill(run.pid_of(faults.PIPELINE_DRAFTER), signal.SIGKILL)
    run.wait()
    assert run.exit_codes[0] == FAILED, run.report()
    (line,) = run.errors
    assert "role drafter, rank 1" in line and "its guard" in line


def test_a_second_signal_leaves_a_round_that_does_not_end(start):
    run = start(faults.second_verifier_stuck, *AUTOREGRESSIVE)
    run.wait_for_output("reading")
    forked_runs.wait_until((run.folder / "stuck").exists, "stuck verifier", run.report)
    os.kill(run.pid_of(0), signal.SIGINT)
    time.sleep(Interruption.ECHO_SECONDS + 0.5)
    assert run.living()
    os.kill(run.pid_of(0), signal.SIGINT)
    run.wait(10)
    assert run.exit_codes[0] == INTERRUPTED, run.report()
    assert run.result["finish_reason"] == "interrupted"


# ---- Coming together. ----


def test_a_rank_that_does_not_come_is_named_at_the_deadline(start):
    run = start(forked_runs.nothing, "placement.start_timeout_s=3", absent=(3,))
    run.wait()
    (line,) = run.errors
    assert line.startswith("tierforce: failed in phase load, role verifier, rank 3: ")
    assert "within 3 s (placement.start_timeout_s)" in line
    assert run.exit_codes[0] == FAILED


def test_a_rank_that_finds_nobody_says_where_it_looked(start):
    run = start(forked_runs.nothing, "placement.start_timeout_s=2", absent=(0, 2, 3, 4))
    run.wait()
    (line,) = [line for line in run.errors if line.startswith("tierforce")]
    assert "rank 1" in line and "127.0.0.1:" in line and "within 2 s (placement.start_timeout_s)" in line
    assert run.exit_codes[1] == FAILED


def test_bad_configuration_is_said_once(start):
    run = start(forked_runs.nothing, "decoding.gamma1=-1")
    run.wait()
    (line,) = run.errors
    assert line.startswith("tierforce: decoding.gamma1 is -1")
    assert run.exit_codes[0] == 2


def test_what_a_worker_refuses_is_said_once_as_the_orchestrator_would(start):
    run = start(faults.drafter_refuses_its_weights)
    run.wait()
    (line,) = run.errors
    assert line.startswith("tierforce: model.drafter is") and "cannot be read" in line
    assert run.exit_codes[0] == 2


def test_a_bad_model_is_said_once(start, tmp_path):
    run = start(forked_runs.nothing, f"model.target={tmp_path}")
    run.wait()
    (line,) = run.errors
    assert line.startswith("tierforce: model.target is")
    assert run.exit_codes[0] == 2
