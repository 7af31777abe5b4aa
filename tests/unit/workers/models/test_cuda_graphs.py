"""A recorded forward pass, replayed, gives what the pass itself would, however the caches have changed meanwhile."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from conf.schema import ChunkDtype, ConfigError, CudaGraphs, FullCacheTier, Mode
from launch.assembly import engine
from launch.assembly.prepare import prepare
from launch.assembly.role_builder import RoleBuilder
from tests.support import fake_cuda
from tests.support.recorded_operations import OperationRecorder
from tests.support.recorded_steps import SHAPE, TOLERANCE, compare_drafters, compare_retrieval_drafts
from tests.support.tiny_models import random_prompt
from tests.support.tiny_runs import DEVICE, HOST, engine_for, generate, run_to_end, task_for, tiny_run
from tiers.device_tier import DeviceTier
from tiers.streaming_llm_cache import StreamingLLMCache
from workers.checkpoint.facts import describe
from workers.models.cuda_graphs import CudaRecorder, NotRecordableError, RecordedModel, run_anew
from workers.models.loading import load_model
from workers.models.streaming_model import StreamingModel

CPU = torch.device("cpu")
RECORDERS = {"replayed": OperationRecorder, "computed anew": lambda: run_anew}


@pytest.fixture(scope="module")
def model(checkpoints):
    """Grouped queries, two layers."""
    return load_model(describe("model.target", str(checkpoints("llama")), torch.float32), CPU, self_check=False)


@pytest.mark.parametrize("recorder", RECORDERS)
def test_retrieval_draft_replays_what_it_would_compute(model, recorder):
    record = RECORDERS[recorder]()
    compare_retrieval_drafts(model, record)
    if recorder == "replayed":
        assert record.num_recordings == 4, "one for each number of tokens, none for more than may be recorded"
        assert record.num_replays > 25


@pytest.mark.parametrize("recorder", RECORDERS)
def test_drafter_replays_what_it_would_compute(model, recorder):
    record = RECORDERS[recorder]()
    compare_drafters(model, record)
    if recorder == "replayed":
        assert record.num_recordings == 3


def test_cuda_s_recorder_warms_up_records_and_replays(model, monkeypatch):
    """With streams and graphs of a fake: what they do on a card is tests/gpu's."""
    fake_cuda.install(monkeypatch)
    compare_drafters(model, CudaRecorder(CPU))


def test_cuda_s_recorder_refuses_a_graph_that_computes_something_else(model, monkeypatch):
    fake_cuda.install(monkeypatch)
    monkeypatch.setattr(fake_cuda.FakeGraph, "replay", lambda graph: None)
    results = iter([torch.zeros(1, 4)] * 4 + [torch.eye(4)[:1] * 9])
    with pytest.raises(RuntimeError, match="set decoding.cuda_graphs=off"):
        CudaRecorder(CPU)(lambda: next(results))


def test_logits_are_the_caller_s_own(model):
    cache = StreamingLLMCache(SHAPE, 4, 20, 12, DeviceTier(CPU))
    level = StreamingModel(RecordedModel(model, cache, 3, OperationRecorder()), cache)
    level.prefill(random_prompt(20))
    first = level.append([1], 1)
    kept = first.clone()
    assert not torch.equal(level.append([2], 1), kept)
    assert torch.equal(first, kept)


class CountsOnTheHost(StreamingLLMCache):
    """Wrong for a recording: what a pass writes to is a number of the host."""

    def slots(self, layer):
        k, v = super().slots(layer)
        return k.roll(self.length, 1), v.roll(self.length, 1)


def test_negative_control_a_number_of_the_host_is_found_out(model):
    caches = [kind(SHAPE, 4, 20, 12, DeviceTier(CPU)) for kind in (CountsOnTheHost, StreamingLLMCache)]
    levels = [
        StreamingModel(RecordedModel(model, caches[0], 3, OperationRecorder()), caches[0]),
        StreamingModel(model, caches[1]),
    ]
    for level in levels:
        level.prefill(random_prompt(20))
    with pytest.raises(AssertionError):
        for token in range(4):
            got, wanted = (level.append([token], 1) for level in levels)
            torch.testing.assert_close(got, wanted, **TOLERANCE)


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.max().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.unique(),
    ],
    ids=["item", "bool", "nonzero", "boolean index", "unique"],
)
def test_what_depends_on_data_cannot_be_recorded(operation):
    with pytest.raises(NotRecordableError):
        run_anew(lambda: operation(torch.randn(5)))
    run_anew(lambda: torch.randn(5)[torch.tensor([1, 2])])


def test_a_pass_that_cannot_be_recorded_is_computed_as_ever(model, caplog):
    def refuse(run):
        raise NotRecordableError("it depends on data")

    caches = [StreamingLLMCache(SHAPE, 4, 20, 12, DeviceTier(CPU)) for _ in range(2)]
    levels = [StreamingModel(RecordedModel(model, caches[0], 3, refuse), caches[0]), StreamingModel(model, caches[1])]
    for level in levels:
        level.prefill(random_prompt(20))
    for token in range(5):
        got, wanted = (level.append([token], 1) for level in levels)
        assert torch.equal(got, wanted)
    assert caplog.text.count("not recorded") == 1


def recording(config):
    return replace(config, decoding=replace(config.decoding, cuda_graphs=CudaGraphs.on))


def build(config, prompt: list[int], num_tokens: int) -> engine.LocalEngine:
    """Of what `prepare` refuses without a GPU."""
    return engine.build(task_for(recording(config), prompt, num_tokens, prepared=prepare(config)))


@pytest.mark.parametrize("tier", [DEVICE, HOST])
@pytest.mark.parametrize("mode", [Mode.triforce, Mode.retrieval, Mode.streaming])
def test_greedy_tokens_are_the_target_s(checkpoints, monkeypatch, mode, tier):
    recorder = OperationRecorder()
    monkeypatch.setattr(RoleBuilder, "_recorder", recorder)
    folder, drafter, prompt = checkpoints("llama"), checkpoints("llama", seed=3), random_prompt(150)
    wanted = generate(tiny_run(folder, mode=Mode.autoregressive), prompt, 60).tokens
    built = build(tiny_run(folder, drafter, mode, tier), prompt, 60)
    run_to_end(built.hierarchy)
    assert built.hierarchy.session.generated == wanted
    built.close()
    assert recorder.num_replays > 20


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("mistral", {}, "a sliding window"),
        ("llama", {"chunk_dtype": ChunkDtype.int8}, "quantised chunks"),
    ],
)
def test_what_cannot_be_recorded_runs_without_and_says_why(checkpoints, family, changes, reason):
    config = tiny_run(checkpoints(family), mode=Mode.retrieval, **changes)
    built = build(config, random_prompt(150), 8)
    assert f"model.target: no CUDA graphs, because of {reason}" in built.notes
    run_to_end(built.hierarchy)
    built.close()


def test_without_a_gpu_on_is_refused_and_auto_records_nothing(checkpoints):
    config = tiny_run(checkpoints("llama"), mode=Mode.retrieval, tier=FullCacheTier.device)
    with pytest.raises(ConfigError, match="decoding.cuda_graphs is 'on'; it must be auto or off on cpu"):
        prepare(recording(config))
    with engine_for(config, random_prompt(100), 4) as built:
        assert not built._builder.recorded
