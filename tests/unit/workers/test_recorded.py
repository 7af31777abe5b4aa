"""A recorded forward pass, replayed, gives what the pass itself would, however the caches have changed meanwhile."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from conf.schema import ChunkDtype, ConfigError, CudaGraphs, FullCacheTier, Mode
from launch import engine
from launch.roles import RoleBuilder
from tests.recorded_operations import OperationRecorder
from tests.tiny_models import VOCAB_SIZE, random_prompt
from tests.tiny_runs import DEVICE, HOST, engine_for, generate, run_to_end, tiny_run
from tiers.base import CacheShape
from tiers.context_summary import Summary
from tiers.device_tier import DeviceTier
from tiers.retrieval_cache import LayerUpdate, RetrievalCache, RetrievalUpdate
from tiers.streaming_llm_cache import StreamingLLMCache
from workers.model import RetrievalModel, StreamingModel
from workers.pretrained import describe, load_model
from workers.recorded import NotRecordableError, RecordedModel, run_anew

CPU = torch.device("cpu")
RECORDERS = {"replayed": OperationRecorder, "computed anew": lambda: run_anew}
# Both attend to the same keys in fp32; empty slots only change the order of sums.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def model(checkpoints):
    """Grouped queries, two layers."""
    return load_model(describe("model.target", str(checkpoints("llama")), torch.float32), CPU, self_check=False)


SHAPE = CacheShape(num_layers=2, num_kv_heads=2, head_dim=8, dtype=torch.float32)


def random_update(generator: torch.Generator, length: int, budget: int, num_summaries: list[int]) -> RetrievalUpdate:
    """As of a rebuild after `length` tokens; layers differ in how many summaries they have."""

    def rows(count: int) -> torch.Tensor:
        return torch.randn(2, 2, count, 8, generator=generator)

    layers = []
    for count in num_summaries:
        positions = torch.arange(length - budget, length).expand(2, -1)
        summary = Summary(*rows(count), torch.randn(2, count, generator=generator)) if count else None
        layers.append(LayerUpdate(*rows(budget), positions, summary))
    return RetrievalUpdate(is_rebuild=True, start=0, length=length, layers=layers)


@pytest.mark.parametrize("recorder", RECORDERS)
def test_retrieval_draft_replays_what_it_would_compute(model, recorder):
    """Many steps of appends, roll backs, replaced keys and rebuilds."""
    record = RECORDERS[recorder]()
    caches = [RetrievalCache(SHAPE, 32, 60, 8, DeviceTier(CPU), 40) for _ in range(2)]
    recorded = RecordedModel(model, caches[0], 4, record)
    levels = [RetrievalModel(recorded, caches[0]), RetrievalModel(model, caches[1])]
    choices, generator = random.Random(0), torch.Generator().manual_seed(0)
    length, num_steps, sizes = 0, 0, set()
    for _ in range(6):
        length += 100
        update = random_update(generator, length, choices.choice([8, 24, 32]), choices.choices([0, 3, 30], k=2))
        for level in levels:
            level.load(update)
        base = length
        while not levels[0].is_full:
            count = choices.choice([1, 1, 2, 3, 4, 5])
            tokens, num_logits = choices.choices(range(VOCAB_SIZE), k=count), choices.randint(1, count)
            got, wanted = (level.append(tokens, num_logits) for level in levels)
            torch.testing.assert_close(got, wanted, **TOLERANCE)
            sizes.add(count)
            num_steps += 1
            length = choices.randint(max(base, levels[0].length - 3), levels[0].length)
            for level in levels:
                level.truncate(length)
            if choices.random() < 0.3 and length > base:
                k, v = torch.randn(2, 2, length - base, 8, generator=generator)
                true = RetrievalUpdate(is_rebuild=False, start=base, length=length, layers=[LayerUpdate(k, v)] * 2)
                for level in levels:
                    level.load(true)
    assert num_steps > 60 and sizes == {1, 2, 3, 4, 5}
    if recorder == "replayed":
        assert record.num_recordings == 4, "one for each number of tokens, none for more than may be recorded"
        assert record.num_replays > 50


@pytest.mark.parametrize("recorder", RECORDERS)
def test_drafter_replays_what_it_would_compute(model, recorder):
    """Its window slides and is read anew, tokens are rolled back."""
    record = RECORDERS[recorder]()
    caches = [StreamingLLMCache(SHAPE, 4, 20, 12, DeviceTier(CPU)) for _ in range(2)]
    levels = [
        StreamingModel(RecordedModel(model, caches[0], 3, record), caches[0]),
        StreamingModel(model, caches[1]),
    ]
    choices, prompt = random.Random(1), random_prompt(50)
    for level in levels:
        level.prefill(prompt)
    for _ in range(80):
        tokens = choices.choices(range(VOCAB_SIZE), k=choices.choice([1, 1, 1, 2, 3, 6]))
        got, wanted = (level.append(tokens, 1) for level in levels)
        torch.testing.assert_close(got, wanted, **TOLERANCE)
        length = levels[0].length - choices.choice([0, 0, 1, 2])
        for level in levels:
            level.truncate(length)
    assert levels[0].length > 100
    if recorder == "replayed":
        assert record.num_recordings == 3


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


def build(config, prompt: list[int], num_tokens: int) -> engine.Engine:
    """Of what `prepare` refuses without a GPU."""
    return engine.build(recording(config), engine.prepare(config), prompt, num_tokens, seed=0)


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
        engine.prepare(recording(config))
    with engine_for(config, random_prompt(100), 4) as built:
        assert not built._builder.recorded
