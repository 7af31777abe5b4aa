"""launch/run.py over several processes: one folder, one cause, on one node and on two; shared memory is there once."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from conf.schema import PlacementKind
from tests.multiprocess import faults, forked_runs
from tests.multiprocess.forked_runs import Case, run_many
from tests.multiprocess.torchrun import ROOT, RUN, on_two_nodes, run_arguments, torchrun
from tests.support.tiny_models import greedy_tokens, random_prompt
from tests.support.tiny_runs import HOST, tiny_run

NUM_TOKENS, PROMPT = 16, random_prompt(100)
LOG_LINE = r"\d{4}-\d\d-\d\d [\d:,]+ rank(\d)-([a-z+]+) \S+ [A-Z]+ "


def arguments(target: Path, output: Path, **more) -> list[str]:
    """Of a greedy run, with the target as its drafter."""
    config = tiny_run(target, target, tier=HOST)
    config = replace(config, generation=replace(config.generation, max_new_tokens=NUM_TOKENS))
    text = " ".join(f"t{token}" for token in PROMPT)
    return run_arguments(config, output, prompt__text=text, **more)


@pytest.fixture(scope="module")
def target(checkpoints) -> Path:
    return checkpoints("llama")


def result_of(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def test_a_pipeline_leaves_one_folder_with_a_log_of_every_worker(tmp_path, target):
    folder = tmp_path / "run"
    done = torchrun(5, str(RUN), *arguments(target, folder))
    assert done.exit_code == 0, done.output
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert {path.name for path in folder.iterdir()} == {".hydra", "logs", "result.json", "rounds.jsonl"}
    result = result_of(folder)
    assert result["token_ids"] == greedy_tokens(target, PROMPT, NUM_TOKENS)
    roles = {"1": "drafter", "2": "retriever", "3": "verifier", "4": "verifier"}
    assert {path.name for path in (folder / "logs").iterdir()} == {f"rank{r}-{role}.log" for r, role in roles.items()}
    for path in (folder / "logs").iterdir():
        lines = path.read_text().splitlines()
        assert lines and all((found := re.match(LOG_LINE, line)) and roles[found[1]] == found[2] for line in lines)
    for tier, memory in result["memory"].items():
        assert memory["planned_bytes"] == sum(process["planned_bytes"][tier] for process in result["processes"])
    assert [process["roles"] for process in result["processes"]] == [[role] for role in roles.values()]


def test_ranks_of_a_verifier_may_be_on_two_nodes(tmp_path, target):
    folder = tmp_path / "run"
    # Of node 0 the ranks 0, 1, 2; of node 1 the ranks 3, 4. The verifier's are 2 and 4.
    more = {"placement__drafter_rank": 1, "placement__retriever_rank": 3}
    first, second = on_two_nodes((3, 2), str(RUN), *arguments(target, folder, **more))
    assert (first.exit_code, second.exit_code) == (0, 0), first.output + second.output
    result = result_of(folder)
    assert result["token_ids"] == greedy_tokens(target, PROMPT, NUM_TOKENS)
    assert [process["roles"] for process in result["processes"]] == [
        ["drafter"],
        ["verifier"],
        ["retriever"],
        ["verifier"],
    ]
    assert len(list((folder / "logs").iterdir())) == 4


@pytest.fixture
def start_with(tmp_path, target):
    """Starts a pipeline with a fault; ends what is left of it."""
    runs = []

    def start(fault, num_ranks: int, **more) -> forked_runs.ForkedRun:
        overrides = arguments(target, tmp_path / "run", **more)
        runs.append(forked_runs.start(tmp_path, overrides, num_ranks, fault))
        runs[-1].wait()
        return runs[-1]

    yield start
    for run in runs:
        run.end()


def test_ranks_that_disagree_end_the_run_with_one_line(start_with):
    run = start_with(faults.other_token_of_second_verifier, 5)
    lines = [line for line in run.errors if line.startswith("tierforce: ")]
    assert run.exit_codes[0] == 1 and len(lines) == 1, run.report()
    assert "failed in phase decode, role verifier, rank 4: RunFailedError: ranks disagree after Verify" in lines[0]
    assert run.result["finish_reason"] == "failed" and "ranks disagree" in run.result["failure"]


def test_a_deadline_leaves_the_stacks_of_all_ranks(start_with):
    run = start_with(faults.first_verifier_stuck, 4, placement__stall_timeout_s=3)
    lines = [line for line in run.errors if line.startswith("tierforce: ")]
    assert run.exit_codes[0] == 1 and len(lines) == 1, run.report()
    assert "role verifier, rank 3: RunFailedError: no progress for " in lines[0] and "in Verify" in lines[0]
    logs = {path.name: path.read_text() for path in (run.folder / "run" / "logs").iterdir()}
    assert logs.keys() == {"rank1-drafter.log", "rank2-retriever.log", "rank3-verifier.log"}
    assert all("most recent call first" in text for text in logs.values())
    assert "in spin" in logs["rank3-verifier.log"] and "in verify" not in logs["rank1-drafter.log"]


BIG = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "head_dim": 64}
"""About 40 MB in fp32."""


def test_retriever_and_verifier_have_weights_and_retrieval_cache_once(tmp_path, checkpoints):
    big = checkpoints("llama", **BIG)
    config = replace(tiny_run(big, "lookup", self_check=False), output=str(tmp_path))
    case = Case(config=config, prompt=PROMPT, num_tokens=4)
    result = run_many(tmp_path, PlacementKind.pipeline, 4, {"run": case})["run"]
    drafter, retriever, verifier = (result["memory_of"][rank] for rank in "123")
    num_bytes = sum(path.stat().st_size for path in big.glob("*.safetensors"))
    # Both have all of it in their memory, and of the machine's memory it takes no more than one of them would.
    assert num_bytes < retriever["shared_rss"] < 1.1 * num_bytes and num_bytes < verifier["shared_rss"]
    assert num_bytes < retriever["shared_pss"] + verifier["shared_pss"] < 1.1 * num_bytes
    assert drafter["shared_rss"] == 0
    # Nor has either another copy: what is their own is little more than that of a process without the target.
    for process in (retriever, verifier):
        assert process["own"] - drafter["own"] < 0.5 * num_bytes
    assert result["memory"]["device"]["planned_bytes"] == sum(
        process["planned_bytes"]["device"] for process in result["processes"]
    )


@pytest.mark.slow
def test_messages_are_timed(tmp_path):
    done = torchrun(4, str(ROOT / "launch" / "measure" / "messages.py"))
    rows = [line for line in done.output.splitlines() if line.startswith("| ") and " ms |" in line]
    assert done.exit_code == 0 and len(rows) == 4, done.output
