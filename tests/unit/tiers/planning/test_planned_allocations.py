"""The engine takes what the memory plan says, part by part: no size is known to a builder alone.

Engines of many shapes read a prompt and decode a few tokens; every allocation of every tier is held against its part of
the plan, see tests/support/recorded_allocations.py.
"""

from __future__ import annotations

import random
import tempfile
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.schema import (
    CacheConfig,
    ChunkDtype,
    Coupling,
    DecodingConfig,
    DiskConfig,
    Dtype,
    FullCacheConfig,
    FullCacheTier,
    HostConfig,
    Mode,
    ModelConfig,
    Overlap,
    PlacementConfig,
    RetrievalCacheConfig,
    RetrievalRuleName,
    RunConfig,
    SamplingConfig,
    StreamingCacheConfig,
    TiersConfig,
)
from launch.assembly import caches
from launch.assembly.engine import plan_input_for
from launch.assembly.prepare import prepare
from launch.assembly.role_builder import RoleBuilder
from launch.assembly.sizing import FreeBytes
from tests.support import fake_cuda
from tests.support.recorded_allocations import Allocations
from tests.support.tiny_models import random_prompt, save_checkpoint, tiny_config
from tests.support.tiny_runs import engine_for, task_for
from tiers.base import CacheShape
from tiers.planning.parts import RETRIEVAL_PARTS, Part
from tiers.planning.plan import MemoryPlan, make_plan
from tiers.planning.sizes import Sizes, TierName
from tiers.retrieval.rule import rule_class
from tiers.transfer import make_streamer

NUM_PROMPT, NUM_NEW, NUM_ROUNDS = 400, 60, 2
NOT_FROM_TIERS = (Part.target_weights, Part.drafter_weights, Part.activations, Part.places_of_chunks_ahead)
"""Weights are compared with those that were loaded; the others are torch's own, and pass."""
AT_MOST = {
    Part.workspace: "it is as large as the largest that passes: a layer of the prompt, or an update of torch's own",
    Part.page_buffers: "each thread makes its own when it first needs one: not all do in a short run",
    Part.hidden_states: "there is room for all tokens, in case they are read again; the prompt alone is shorter",
}
"""Parts of which an engine may take less than planned, and why."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints of three families, of as many layers as there are tiers."""
    root = tmp_path_factory.mktemp("models")
    changes: dict[str, dict[str, Any]] = {
        "llama": {"num_hidden_layers": 3},
        "qwen2": {"num_hidden_layers": 3, "tie_word_embeddings": True},
        "gemma2": {},
    }
    return {
        name: save_checkpoint(root / name, tiny_config(name, max_position_embeddings=4096, **more))
        for name, more in changes.items()
    }


def run_config(
    folders,
    *,
    target="llama",
    drafter="llama",
    mode=Mode.triforce,
    retrieval=None,
    overlap=Overlap.off,
    coupling=Coupling.maximal,
    checksums=False,
    window=100,
    gamma=(1, 3),
    **full,
) -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            target=str(folders[target]),
            drafter=drafter if drafter in ("lookup", "none") else str(folders[drafter]),
            dtype=Dtype.float32,
            self_check=False,
        ),
        decoding=DecodingConfig(mode=mode, overlap=overlap, gamma1=gamma[0], gamma2=gamma[1]),
        cache=CacheConfig(
            full=FullCacheConfig(**full),
            retrieval=RetrievalCacheConfig(**({"budget": 128} | (retrieval or {}))),
            streaming=StreamingCacheConfig(sinks=2, window=window),
        ),
        sampling=SamplingConfig(coupling=coupling),
        tiers=TiersConfig(disk=DiskConfig(readers="2"), host=HostConfig(checksums=checksums)),
        placement=PlacementConfig(device="cpu"),
        output=tempfile.gettempdir(),  # where files of the disk tier are, without a name
    )


HOST, DISK = FullCacheTier.host, FullCacheTier.disk
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "device": {"tier": FullCacheTier.device},
    "auto": {},
    "host": {"tier": HOST},
    "host, small blocks": {"tier": HOST, "block_tokens": "16"},
    "host, odd blocks, five buffers": {"tier": HOST, "block_tokens": "37", "stream_buffers": 5},
    "host, no complete block": {"tier": HOST, "block_tokens": "4096"},
    "host, a tail longer than its block": {"tier": HOST, "block_tokens": "48", "gamma": (2, 8)},
    "disk": {"tier": DISK, "block_tokens": "32"},
    "disk, host and device": {"tier": DISK, "device_layers": "1", "host_layers": "1", "block_tokens": "16"},
    "host and device": {"device_layers": "1", "block_tokens": "64"},
    "lookup": {"tier": HOST, "block_tokens": "32", "drafter": "lookup"},
    "no drafter": {"mode": Mode.retrieval, "drafter": "none", "device_layers": "1"},
    "streaming": {"mode": Mode.streaming, "tier": HOST, "block_tokens": "32"},
    "autoregressive": {"mode": Mode.autoregressive, "tier": HOST, "block_tokens": "32"},
    "budget above the prompt": {"retrieval": {"budget": 4096}},
    "budget and gammas auto": {"retrieval": {"budget": "auto"}, "gamma": ("auto", "auto"), "device_layers": "2"},
    "quantised chunks": {"retrieval": {"budget": 200, "dtype": ChunkDtype.int8}},
    "chunks of 4 bits, host": {"tier": HOST, "retrieval": {"budget": 256, "dtype": ChunkDtype.int4}},
    "odd chunks, never rebuilt": {"retrieval": {"budget": 130, "chunk_size": 13, "rebuild": "never"}},
    "sliding windows": {"target": "gemma2", "drafter": "gemma2", "device_layers": "1", "block_tokens": "16"},
    "tied weights": {"target": "qwen2", "drafter": "qwen2", "tier": HOST, "block_tokens": "16"},
}

FACTORS: dict[str, list[dict[str, Any]]] = {
    "layers": [
        {"tier": FullCacheTier.device},
        {"tier": HOST},
        {"tier": DISK},
        {"device_layers": "1"},
        {"tier": DISK, "host_layers": "1"},
    ],
    "blocks": [{"block_tokens": size} for size in ("auto", "16", "37")],
    "buffers": [{"stream_buffers": count} for count in (2, 5)],
    "checksums": [{"checksums": False}, {"checksums": True}],
    "drafter": [{"drafter": "llama", "window": 70}, {"drafter": "llama"}, {"drafter": "lookup"}, {"drafter": "none"}],
    "target": [{"target": "llama"}, {"target": "gemma2"}],
    "overlap": [
        {"overlap": Overlap.off},
        {"overlap": Overlap.ahead},
        {"overlap": Overlap.outcomes, "coupling": Coupling.gumbel},
    ],
    "gamma": [{"gamma": (1, 3)}, {"gamma": (2, 8)}],
}
OF_RETRIEVAL: dict[str, list[dict[str, Any]]] = {
    "chunks": [{"budget": 128}, {"budget": 130, "chunk_size": 13}, {"budget": 96, "chunk_size": 3}],
    "rule": [{"rule": rule} for rule in RetrievalRuleName],
    "dtype": [{"dtype": dtype} for dtype in ChunkDtype],
    "summary": [{"summary_tokens": size} for size in (0, 7, 64)],
    "rebuild": [{"rebuild": rebuild} for rebuild in ("never", "adaptive", "1")],
}


NUM_DRAWN = 16


def drawn(factors: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """So many configurations, mixed at random, in which each value of each factor is as frequent as the others."""
    configurations: list[dict[str, Any]] = [{} for _ in range(NUM_DRAWN)]
    for seed, values in enumerate(factors.values()):
        order = random.Random(seed).sample(range(NUM_DRAWN), NUM_DRAWN)
        for configuration, number in zip(configurations, order, strict=True):
            configuration.update(values[number % len(values)])
    return configurations


for number, (settings, retrieval) in enumerate(zip(drawn(FACTORS), drawn(OF_RETRIEVAL), strict=True)):
    CONFIGURATIONS[f"drawn {number}"] = settings | {"retrieval": retrieval}


def differences(plan: MemoryPlan, shape: CacheShape, allocations: Allocations) -> list[str]:
    """What was allocated otherwise than planned, a line for each tier and part; what passes is taken at its peak.

    `shape` is that of the target's cache.
    """
    planned = {
        (tier, part): num_bytes
        for tier, parts in (
            (TierName.device, plan.device_bytes),
            (TierName.host, plan.host_bytes),
            (TierName.disk, plan.disk_bytes),
        )
        for part, num_bytes in parts.items()
        if part not in NOT_FROM_TIERS
    }
    # A quantised retrieval cache allocates both of its parts.
    retrieval = sum(planned.pop((TierName.device, part), 0) for part in RETRIEVAL_PARTS)
    planned[TierName.device, Part.retrieval_cache] = retrieval
    spare = {}
    if plan.sizes.retrieval is not None and plan.sizes.capacity % plan.sizes.retrieval.chunk_size:
        # The last chunk will never be complete: a rule that looks at whole chunks alone has no room for it.
        spare[Part.chunk_scores] = rule_class(plan.sizes.retrieval.rule).planned_bytes(shape, 1)
    found = []
    for where in sorted({*planned, *allocations.peak}):
        need, have = planned.get(where, 0), allocations.peak[where]
        if have > need or (have < need - spare.get(where[1], 0) and where[1] not in AT_MOST):
            found.append(f"{where[1]} in the {where[0]} tier: {have} bytes allocated, {need} planned")
    return found


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_planned_bytes_are_those_that_the_engine_takes(folders, monkeypatch, name):
    config, allocations = run_config(folders, **CONFIGURATIONS[name]), Allocations(monkeypatch)
    prepared = prepare(config)
    with engine_for(config, random_prompt(NUM_PROMPT), NUM_NEW, prepared=prepared) as engine:
        plan, hierarchy = engine.plan, engine.hierarchy
        hierarchy.start()
        for _ in range(NUM_ROUNDS):
            if not hierarchy.session.is_finished:
                hierarchy.round()
        assert differences(plan, prepared.target.cache_shape, allocations) == []
        workspace = (TierName.device, Part.workspace)
        assert allocations.peak[workspace] > 0 == allocations.used[workspace], "a prompt was read, its memory is free"
        weights = [sum(weight.nbytes for weight in model.hf_model.parameters()) for model in engine.models]
        planned = [plan.device_bytes[part] for part in (Part.target_weights, Part.drafter_weights)]
        assert weights == planned[: len(weights)] and sum(planned) == sum(weights)

        full, report = config.cache.full, engine.memory_report()
        for tier in ("device", "host", "disk"):
            assert report[tier]["planned_bytes"] == plan.totals[tier]
            assert report[tier]["peak_bytes"] <= report[tier]["planned_bytes"]
        assert report["disk"]["peak_bytes"] == report["disk"]["planned_bytes"]
        assert (report["disk"]["planned_bytes"] > 0) == (full.tier is DISK)
        assert (plan.sizes.num_layers_in_blocks > 0) == (full.tier in (HOST, DISK) or full.device_layers != "auto")
        in_process = plan.totals["device"] + plan.totals["host"]
        assert report["process"]["planned_bytes"] > in_process and report["process"]["peak_bytes"] > in_process


@pytest.mark.parametrize(
    ("full", "is_staged"),
    [
        ({"tier": HOST, "block_tokens": "16"}, False),
        ({"tier": HOST, "block_tokens": "16", "checksums": True}, True),
        ({"tier": DISK, "host_layers": "1", "block_tokens": "64"}, True),
    ],
    ids=["host", "host with checksums", "disk"],
)
def test_planned_bytes_are_those_that_the_engine_takes_with_a_gpu(folders, monkeypatch, full, is_staged):
    """Hidden states are then on the host, and what is checked there goes through buffers; the GPU is made of lies."""
    fake_cuda.install(monkeypatch)
    allocations, config = Allocations(monkeypatch), run_config(folders, **full)

    def make_cuda_streamer(block_size, dtype, num_buffers, tier, device, *, link, **more):
        return make_streamer(block_size, dtype, num_buffers, tier, torch.device("cuda"), **more)

    monkeypatch.setattr(caches, "make_streamer", make_cuda_streamer)
    with closing(built_with_gpu(config)) as builder:
        target = builder.load_target()
        _, model = builder.verifier(target)
        builder.retriever(target)
        builder.drafter(prepare(config).drafter, target.vocab_size)
        model.prefill(random_prompt(NUM_PROMPT))
        assert differences(builder.plan, builder.target_facts.cache_shape, allocations) == []
    assert (allocations.peak[TierName.host, Part.staging_buffers] > 0) == is_staged
    assert (
        allocations.peak[TierName.host, Part.hidden_states] > 0 == allocations.used[TierName.host, Part.hidden_states]
    )


def built_with_gpu(config: RunConfig) -> RoleBuilder:
    """With a plan for a machine whose device has memory of its own."""
    prepared, plenty = prepare(config), 1 << 40
    free = FreeBytes(device=plenty, host=plenty, disk=plenty, device_is_host=False)
    inputs = plan_input_for(task_for(config, random_prompt(NUM_PROMPT), NUM_NEW, prepared=prepared), free)
    return RoleBuilder(config, prepared.target, prepared.device, make_plan(inputs, config.cache), seed=0)


# ---- Negative controls: a size that is changed where the caches are made, and nowhere else. ----


def with_more_tokens(sizes: Sizes) -> Sizes:
    return replace(sizes, max_tokens=sizes.max_tokens + 64)


def with_retrieval(sizes: Sizes, **changes) -> Sizes:
    assert sizes.retrieval is not None
    return replace(sizes, retrieval=replace(sizes.retrieval, **changes))


WRONG_SIZES = {
    "more tokens": ("full_cache", with_more_tokens, Part.full_cache),
    "a larger slack": ("full_cache", lambda sizes: replace(sizes, slack_tokens=64), Part.tails),
    "larger blocks": ("full_cache", lambda sizes: replace(sizes, block_tokens=32), Part.stream_buffers),
    "one more buffer": ("full_cache", lambda sizes: replace(sizes, stream_buffers=5), Part.stream_buffers),
    "a longer tail": ("retrieval_cache", partial(with_retrieval, tail_tokens=300), Part.retrieval_cache),
    "a larger budget": ("retrieval_cache", partial(with_retrieval, budget=256), Part.retrieval_cache),
    "more groups": ("retrieval_cache", partial(with_retrieval, summary_tokens=1), Part.retrieval_cache),
    "another budget ahead": ("selection", partial(with_retrieval, budget=120), Part.chunks_ahead),
    "smaller chunks": ("selection", partial(with_retrieval, chunk_size=4), Part.chunk_scores),
    "larger groups": ("selection", partial(with_retrieval, summary_tokens=80), Part.group_means),
    "a drafter with less slack": ("streaming_cache", lambda sizes: replace(sizes, slack=0), Part.streaming_cache),
}


@pytest.mark.parametrize("name", WRONG_SIZES)
def test_negative_control_a_size_that_is_changed_in_a_builder_alone_is_found(folders, monkeypatch, name):
    maker, changed, part = WRONG_SIZES[name]
    config, make = run_config(folders, tier=HOST, device_layers="1", block_tokens="16"), getattr(caches, maker)
    allocations = Allocations(monkeypatch)
    monkeypatch.setattr(caches, maker, lambda sizes, *rest: make(changed(sizes), *rest))
    prepared = prepare(config)
    with engine_for(config, random_prompt(NUM_PROMPT), NUM_NEW, prepared=prepared) as engine:
        found = differences(engine.plan, prepared.target.cache_shape, allocations)
    assert any(line.startswith(part) for line in found), found


def test_negative_control_an_allocation_that_the_plan_knows_nothing_of_is_found(folders, monkeypatch):
    config = run_config(folders)
    Allocations(monkeypatch)
    with closing(built_with_gpu(config)) as builder, pytest.raises(AssertionError, match="no part of the plan"):
        builder.tiers.device.allocate(8, dtype=torch.uint8)
