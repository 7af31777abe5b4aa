"""On a CUDA device: roles side by side on streams of their own, memory shared between two processes, NCCL.

Needs one GPU. A pipeline of four processes fits on it: each of its roles, with the target's weights and the retrieval
cache shared by CUDA IPC. Two verifier ranks need two, which NCCL wants.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import msgspec
import pytest
import torch
import torch.distributed as dist

from conf.schema import Coupling, Mode, Overlap, PlacementConfig, PlacementKind, SamplingConfig
from tests.multiprocess.torchrun import RUN, run_arguments, torchrun
from tests.support.tiny_models import random_prompt
from tests.support.tiny_runs import DEVICE, DISK, HOST, generate, tiny_run
from tiers.shared_memory import SharedArena, cuda_handle
from workers.messages import Draft, Verdict
from workers.parallel.collectives import GroupAllReduce
from workers.process.background import InBackground, OwnStream

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="Requires: a CUDA device"),
]
CUDA, ROOT = torch.device("cuda:0"), Path(__file__).resolve().parents[2]
SLEEP_CYCLES = 200_000_000  # about 100 ms
NUM_TOKENS, PROMPT = 32, random_prompt(200)
GREEDY = SamplingConfig(temperature=0.0)
GUMBEL = SamplingConfig(temperature=1.0, top_p=0.9, coupling=Coupling.gumbel)


def on_cuda(config):
    return replace(config, placement=PlacementConfig(device="cuda"))


# ---- One process. ----


@pytest.mark.parametrize("tier", [DEVICE, HOST, DISK])
@pytest.mark.parametrize("overlap", [Overlap.ahead, Overlap.outcomes])
@pytest.mark.parametrize("sampling", [GREEDY, GUMBEL], ids=["greedy", "gumbel"])
def test_drafting_ahead_on_a_stream_of_its_own_changes_no_token(checkpoints, sampling, overlap, tier):
    target = checkpoints("llama")
    config = on_cuda(tiny_run(target, target, Mode.triforce, tier, sampling=sampling))
    wanted = generate(config, PROMPT, NUM_TOKENS).tokens
    config = replace(config, decoding=replace(config.decoding, overlap=overlap))
    assert generate(config, PROMPT, NUM_TOKENS).tokens == wanted


class Sleeper:
    """Its verification keeps the device busy; what it reads was written by the caller just before."""

    def __init__(self, cell: torch.Tensor):
        self._cell, self.stream = cell, None

    def verify(self, draft: Draft) -> Verdict:
        self.stream = torch.cuda.current_stream(CUDA)
        torch.cuda._sleep(SLEEP_CYCLES)
        return Verdict(num_accepted=int(self._cell), next_token=torch.cuda.current_device())


def test_a_verification_reads_what_its_caller_queued_and_leaves_the_callers_stream_free():
    cell = torch.zeros((), device=CUDA)
    sleeper = Sleeper(cell)
    background = InBackground(sleeper, CUDA)
    torch.cuda._sleep(SLEEP_CYCLES)
    cell.add_(7)
    background.begin_verify(Draft())
    ended = torch.cuda.Event()
    ended.record()
    ended.synchronize()
    assert background.is_verifying(), "the caller's stream waits for the verification's"
    assert background.finish_verify() == Verdict(num_accepted=7, next_token=0)
    assert sleeper.stream != torch.cuda.current_stream(CUDA)
    background.close()


def test_when_a_call_has_ended_another_stream_finds_all_it_wrote():
    giver, taker, cell = OwnStream(CUDA), OwnStream(CUDA), torch.zeros(1 << 20, device=CUDA)
    for value in range(1, 4):
        with giver.call():
            torch.cuda._sleep(SLEEP_CYCLES // 10)
            cell.fill_(value)
        with taker.call():
            assert bool((cell == value).all())


# ---- Two processes on one device. ----

TAKER = """
import msgspec, sys, torch
from tiers.shared_memory import attached, from_cuda_handle
arena, handle = msgspec.msgpack.decode(bytes.fromhex(sys.argv[1]))
first, second = attached(arena)
weights = from_cuda_handle(handle)
assert first.tolist() == [1.0, 2.0] and weights.shape == (3, 4) and float(weights.sum()) == 66.0
first += 1
second[1] = 7
torch.cuda.synchronize()
print(torch.cuda.memory_allocated())
"""


def test_cuda_ipc_gives_another_process_the_same_memory():
    arena = SharedArena(1 << 16, CUDA)
    first = arena.allocate(2, dtype=torch.float32).copy_(torch.tensor([1.0, 2.0]))
    second = arena.allocate(2, 3, dtype=torch.int64).zero_()
    weights = torch.arange(24.0, device=CUDA).view(4, 6)[:, 1:4].t()
    weights.copy_(torch.arange(12.0, device=CUDA).view(3, 4))
    torch.cuda.synchronize()
    told = msgspec.msgpack.encode([arena.description(), cuda_handle(weights)]).hex()
    done = subprocess.run([sys.executable, "-c", TAKER, told], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert first.tolist() == [2.0, 3.0] and second.tolist() == [[0, 0, 0], [7, 7, 7]]
    assert int(done.stdout) < 1 << 16, "it has memory of its own"


@pytest.mark.parametrize("overlap", list(Overlap))
@pytest.mark.parametrize(
    ("kind", "num_processes"),
    [(PlacementKind.colocated, 1), (PlacementKind.pipeline, 4)],
    ids=["colocated", "pipeline"],
)
def test_processes_on_one_gpu_generate_the_tokens_of_one_process(tmp_path, checkpoints, kind, num_processes, overlap):
    target = checkpoints("llama")
    config = on_cuda(tiny_run(target, target, tier=HOST, sampling=GUMBEL))
    wanted = generate(config, PROMPT, NUM_TOKENS).tokens
    config = replace(
        config,
        decoding=replace(config.decoding, overlap=overlap),
        generation=replace(config.generation, max_new_tokens=NUM_TOKENS),
    )
    text = " ".join(f"t{token}" for token in PROMPT)
    arguments = run_arguments(config, tmp_path / "run", prompt__text=text)
    done = torchrun(num_processes, str(RUN), f"placement={kind}", *arguments)
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["token_ids"] == wanted
    assert {process["device"] for process in result["processes"]} == {"cuda:0"}
    if kind is PlacementKind.pipeline:
        assert "share cuda:0 of node 0" in done.output


# ---- NCCL. ----


def test_nccl_sums_over_one_rank_in_each_role_s_own_group():
    store = dist.FileStore(tempfile.mkstemp()[1], 1)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, timeout=timedelta(seconds=60))
    try:
        groups = [GroupAllReduce(dist.new_group(timeout=timedelta(seconds=60))) for _ in range(2)]
        sums = [None, None]

        def add(index: int) -> None:
            with OwnStream(CUDA).call():
                numbers = torch.full((1 << 16,), float(index + 1), device=CUDA)
                for _ in range(50):
                    groups[index].all_reduce(numbers)
                sums[index] = float(numbers.mean())

        threads = [threading.Thread(target=add, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert sums == [1.0, 2.0]
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="Requires: two CUDA devices")
@pytest.mark.parametrize(
    ("kind", "num_processes"),
    [(PlacementKind.colocated, 2), (PlacementKind.pipeline, 5)],
    ids=["colocated", "pipeline"],
)
def test_two_verifier_ranks_on_two_gpus(tmp_path, checkpoints, kind, num_processes):
    """Has not run yet: on the CPU the same code runs in tests/multiprocess."""
    target = checkpoints("llama")
    config = on_cuda(tiny_run(target, target, tier=HOST))
    wanted = generate(config, PROMPT, NUM_TOKENS).tokens
    config = replace(config, generation=replace(config.generation, max_new_tokens=NUM_TOKENS))
    arguments = run_arguments(config, tmp_path / "run", prompt__text=" ".join(f"t{token}" for token in PROMPT))
    done = torchrun(num_processes, str(RUN), f"placement={kind}", *arguments)
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["token_ids"] == wanted
    verifiers = [process["device"] for process in result["processes"] if "verifier" in process["roles"]]
    assert verifiers == ["cuda:0", "cuda:1"]
