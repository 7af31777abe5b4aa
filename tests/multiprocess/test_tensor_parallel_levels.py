"""All three levels over a tensor-parallel target: every rank runs the same session on its own heads' caches.

Each rank chooses other chunks for its heads, streams its own blocks, and comes to the same tokens as the others, which
at temperature 0 are those that transformers generates with the whole model.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import partialmethod
from pathlib import Path

import pytest
import torch

from conf.schema import RetrievalRuleName
from launch.assembly import role_builder as roles
from launch.assembly.prepare import prepare
from tests.multiprocess.process_group import run_ranks
from tests.support.tiny_models import greedy_tokens, random_prompt
from tests.support.tiny_runs import DEVICE, DISK, HOST, generate, tiny_run
from workers.parallel.collectives import SharedMemoryAllReduce, has_ordered_stores
from workers.parallel.shard import Shard

NUM_NEW_TOKENS, PROMPT, TIMEOUT_SECONDS = 24, random_prompt(150), 60.0
SIZE = 2
ONE_KV_HEAD = {"num_key_value_heads": 1}
"""Shared by both ranks."""
RUNS = [
    ("llama", {}, DEVICE, RetrievalRuleName.attention),
    ("llama", {}, DISK, RetrievalRuleName.mean_key),
    ("llama", ONE_KV_HEAD, HOST, RetrievalRuleName.attention),
    ("phi3", {}, HOST, RetrievalRuleName.attention),
]


def run_all(rank: int, folder: str, targets: list[str], drafter: str) -> None:
    """This rank's tokens of every run, to `folder`."""
    torch.set_num_threads(1)
    shard = Shard(rank, SIZE)
    all_reduce = SharedMemoryAllReduce(
        Path(folder, "sums"), shard, timeout_seconds=TIMEOUT_SECONDS, start_timeout_seconds=TIMEOUT_SECONDS
    )

    roles.RoleBuilder.load_target = partialmethod(roles.RoleBuilder.load_target, all_reduce)
    tokens = []
    for target, (_, _, tier, rule) in zip(targets, RUNS, strict=True):
        config = tiny_run(target, drafter, tier=tier, rule=rule, rebuild="2", self_check=False)
        prepared = prepare(config)
        prepared = replace(prepared, target=prepared.target.sharded(shard))
        tokens.append(generate(config, PROMPT, NUM_NEW_TOKENS, prepared=prepared).tokens)
    torch.save(tokens, Path(folder, f"tokens-{rank}"))


@pytest.mark.skipif(not has_ordered_stores(), reason="Requires: an x86 processor")
def test_greedy_tokens_are_those_of_the_whole_model(checkpoints):
    targets = [str(checkpoints(family, **changes)) for family, changes, _, _ in RUNS]
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        run_ranks(run_all, SIZE, folder, targets, str(checkpoints("llama", seed=1)))
        by_rank = [torch.load(Path(folder, f"tokens-{rank}")) for rank in range(SIZE)]
    assert by_rank == [[greedy_tokens(Path(target), PROMPT, NUM_NEW_TOKENS) for target in targets]] * SIZE
