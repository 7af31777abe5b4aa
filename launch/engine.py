"""Puts a run together in one process: models, tiers, caches, roles, and the hierarchy over them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from conf.schema import LOOKUP_DRAFTER, ChunkRule, ConfigError, Dtype, RunConfig
from launch.sizing import (
    PIECE_TOKENS,
    FreeBytes,
    ModelSize,
    plan_input,
    retrieval_tail_tokens,
    streaming_slack,
)
from orchestrator.hierarchy import Hierarchy
from orchestrator.rebuild_policy import RebuildPolicy
from orchestrator.session import Session
from orchestrator.text_stream import TextStream
from tiers.attention_mass import AttentionMass
from tiers.base import BlockShape, CacheShape
from tiers.chunk_index import ChunkIndex
from tiers.context_summary import ContextSummary
from tiers.device_tier import DeviceTier
from tiers.disk_tier import DiskTier, best_num_readers
from tiers.errors import OutOfTierMemoryError
from tiers.full_cache import BlockLayer, DeviceLayer, FullCache
from tiers.memory import device_free_bytes, disk_free_bytes, host_free_bytes, num_idle_cores
from tiers.pinned_host_tier import PinnedHostTier, can_pin
from tiers.plan import MemoryPlan, PlanInput, make_plan
from tiers.quantised_retrieval_cache import make_retrieval_cache
from tiers.retrieval_selection import RetrievalSelection
from tiers.streaming_llm_cache import StreamingLLMCache
from tiers.transfer import BlockWriter, Link, make_streamer
from workers.acceptance import KeyedRandom, make_coupling
from workers.drafter import Drafter
from workers.lookup_drafter import LookupDrafter
from workers.model import RetrievalModel, StreamingModel, TargetModel
from workers.pretrained import ModelFacts, check_same_vocabulary, describe, load_model
from workers.retrieval_drafter import RetrievalDrafter
from workers.target_verifier import TargetVerifier

LEVEL_DRAFTER, LEVEL_RETRIEVAL, LEVEL_TARGET = 1, 2, 3


@dataclass(kw_only=True)
class Prepared:
    """A configuration resolved against its models, no weights read yet."""

    device: torch.device
    target: ModelFacts
    drafter: ModelFacts | None
    notes: list[str] = field(default_factory=list)

    @property
    def tokenizer(self):
        return self.target.tokenizer

    @property
    def max_positions(self) -> int:
        return self.target.max_positions

    @property
    def eos_ids(self) -> frozenset[int]:
        return self.target.eos_ids


def prepare(config: RunConfig) -> Prepared:
    """Chooses device and dtype, reads configurations and tokenizers, checks that they fit. Raises ConfigError."""
    device = _choose_device(config.placement.device)
    if device.type == "cuda" and config.tiers.link.gb_per_s is not None:
        raise ConfigError(
            f"tiers.link.gb_per_s is {config.tiers.link.gb_per_s}; it must be null on {device}, whose link is real"
        )
    num_threads = _set_threads(config.placement.threads) if device.type == "cpu" else torch.get_num_threads()
    dtype = _choose_dtype(config.model.dtype, device)
    target = describe("model.target", config.model.target, dtype, config.model.max_positions)
    drafter = None
    if config.uses_drafter and config.model.drafter != LOOKUP_DRAFTER:
        drafter = describe("model.drafter", config.model.drafter, dtype)
        check_same_vocabulary(target, drafter)
        _check_drafter_window(config, drafter)
    where = f"device {device}" + (f", threads: {num_threads}" if device.type == "cpu" else "")
    return Prepared(device=device, target=target, drafter=drafter, notes=[f"{where}, {str(dtype).split('.')[-1]}"])


def _choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda:0" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        device = torch.device("cuda:0" if name == "cuda" else name)
        if device.index >= count:
            raise ConfigError(f"placement.device is {name!r}; this machine has {count} CUDA devices: use cpu or auto")
        return device
    return torch.device(name)


def _set_threads(threads: str) -> int:
    """`auto` is OMP_NUM_THREADS where the user set it (torchrun may, to 1), else the number of idle cores."""
    of_user = os.environ.get("OMP_NUM_THREADS")
    if threads != "auto":
        torch.set_num_threads(int(threads))
    elif not of_user or (of_user == "1" and os.environ.get("TORCHELASTIC_RUN_ID")):
        torch.set_num_threads(num_idle_cores())
    return torch.get_num_threads()


def _choose_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    if dtype is not Dtype.auto:
        return getattr(torch, dtype)
    computes_bf16 = device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if computes_bf16 else torch.float32


def _check_drafter_window(config: RunConfig, drafter: ModelFacts) -> None:
    streaming = config.cache.streaming
    most = drafter.max_positions - streaming.sinks - streaming_slack(config)
    if streaming.window > most:
        raise ConfigError(
            f"cache.streaming.window is {streaming.window}; it must be at most {most}: the drafter knows "
            f"{drafter.max_positions} positions, {streaming.sinks} of them for cache.streaming.sinks and "
            f"{streaming_slack(config)} for tokens in flight"
        )


@dataclass(kw_only=True)
class Engine:
    """A run ready to start, with what it reports at the end."""

    hierarchy: Hierarchy
    plan: MemoryPlan
    notes: list[str]
    _device: torch.device
    _device_tier: DeviceTier
    _host_tier: PinnedHostTier
    _disk_tier: DiskTier
    _link: Link
    _weight_bytes: int
    _full_cache: FullCache
    _target: TargetModel

    def on_prefill_progress(self, callback) -> None:
        """`callback(done, total)`, in tokens through all layers, is called as the prompt is read."""
        self._target.on_prefill_progress = callback

    def memory_report(self) -> dict[str, dict[str, int]]:
        """Planned and peak bytes of each tier; peak: what the allocator (CUDA) or our tiers have handed out."""
        peaks = {tier.name: tier.peak_bytes for tier in (self._device_tier, self._host_tier, self._disk_tier)}
        peaks["device"] += self._weight_bytes
        if self._device.type == "cuda":
            peaks["device"] = torch.cuda.max_memory_allocated(self._device)
        totals = self.plan.totals
        return {name: {"planned_bytes": totals[name], "peak_bytes": peaks[name]} for name in totals}

    def streaming_report(self) -> dict[str, float | None]:
        """What was streamed from host and disk; `emulated_link_gb_per_s` is null where the link is the machine's."""
        stats = self._full_cache.stream_stats
        rate = stats.num_bytes / stats.seconds / 1e9 if stats.seconds else 0.0
        return {
            "bytes": stats.num_bytes,
            "seconds": stats.seconds,
            "gb_per_s": rate,
            "stall_s": stats.stall_seconds,
            "emulated_link_gb_per_s": self._link.gb_per_s,
            "damaged_blocks": self._disk_tier.num_damaged + self._host_tier.num_damaged,
        }

    def close(self) -> None:
        self._full_cache.close()
        self._disk_tier.close()


def build(config: RunConfig, prepared: Prepared, prompt_ids: list[int], max_new_tokens: int, seed: int) -> Engine:
    """Plans the memory, then loads weights and makes the caches. Raises ConfigError."""
    max_tokens = len(prompt_ids) + max_new_tokens
    config = _with_budget_in_context(config, len(prompt_ids), notes := list(prepared.notes))
    plan = make_plan(_plan_input(config, prepared, max_tokens, max_new_tokens), config.cache)
    notes.append(plan.reason)
    try:
        return _Builder(config, prepared, plan, seed, max_new_tokens, notes).build(prompt_ids)
    except OutOfTierMemoryError as error:
        raise ConfigError(
            f"{error}. A smaller prompt.max_tokens (it is {config.prompt.max_tokens}) needs less; "
            "page-locked memory is limited by `ulimit -l` too"
        ) from error


def _with_budget_in_context(config: RunConfig, num_prompt_tokens: int, notes: list[str]) -> RunConfig:
    retrieval = config.cache.retrieval
    most = -(-num_prompt_tokens // retrieval.chunk_size) * retrieval.chunk_size
    if not config.uses_retrieval or retrieval.budget <= most:
        return config
    notes.append(f"cache.retrieval.budget={retrieval.budget} is more than the prompt: cut to {most}")
    return replace(config, cache=replace(config.cache, retrieval=replace(retrieval, budget=most)))


def _plan_input(config: RunConfig, prepared: Prepared, max_tokens: int, max_new_tokens: int) -> PlanInput:
    gib, placement = 2**30, config.placement
    device_limit, host_limit, disk_limit = placement.device_memory_gib, placement.host_memory_gib, placement.disk_gib
    free = FreeBytes(
        device=int(device_limit * gib) if device_limit else device_free_bytes(prepared.device),
        host=int(host_limit * gib) if host_limit else host_free_bytes(),
        disk=int(disk_limit * gib) if disk_limit else disk_free_bytes(_disk_folder(config)),
        device_is_host=prepared.device.type != "cuda",
    )
    drafter = _size_of(prepared.drafter) if prepared.drafter else None
    tokens = {"max_tokens": max_tokens, "max_new_tokens": max_new_tokens}
    return plan_input(config, _size_of(prepared.target), drafter, **tokens, free=free)


def _size_of(facts: ModelFacts) -> ModelSize:
    text_config = facts.config.get_text_config()
    return ModelSize(
        cache_shape=facts.cache_shape,
        num_weight_bytes=facts.num_weight_bytes,
        hidden_size=text_config.hidden_size,
        intermediate_size=getattr(text_config, "intermediate_size", None) or 4 * text_config.hidden_size,
    )


def _disk_folder(config: RunConfig) -> Path:
    return Path(config.tiers.disk.folder or config.output)


class _Builder:
    """The steps of `build` share these."""

    def __init__(self, config: RunConfig, prepared: Prepared, plan: MemoryPlan, seed: int, max_new_tokens: int, notes):
        self._config, self._prepared, self._plan = config, prepared, plan
        self._max_new_tokens, self._notes = max_new_tokens, notes
        self._device_tier = DeviceTier(prepared.device)
        pin, checksums = prepared.device.type == "cuda" and can_pin(), config.tiers.host.checksums
        self._host_tier = PinnedHostTier(pin=pin, checksums=checksums)
        if prepared.device.type == "cuda" and not self._host_tier.pin and plan.host_bytes:
            notes.append("host memory is not pinned (cupy is missing): copies will be slow")
        if plan.num_disk_layers:
            _disk_folder(config).mkdir(parents=True, exist_ok=True)
        self._disk_tier = DiskTier(_disk_folder(config))
        self._link = Link(config.tiers.link.gb_per_s)
        if self._link.gb_per_s is not None:
            notes.append(f"the link from host to device is emulated: {self._link.gb_per_s:g} GB/s")
        self._random = KeyedRandom(seed)

    def build(self, prompt_ids: list[int]) -> Engine:
        config, prepared = self._config, self._prepared
        target = load_model(prepared.target, prepared.device, self_check=config.model.self_check)
        full_cache = self._full_cache()
        retrieval = config.cache.retrieval
        target_model = TargetModel(
            target,
            full_cache,
            piece_tokens=PIECE_TOKENS,
            hidden_tier=self._device_tier if self._plan.hidden_tier == "device" else self._host_tier,
            selection=self._selection(full_cache) if config.uses_retrieval else None,
        )
        hierarchy = Hierarchy(
            session=Session(
                prompt=prompt_ids,
                max_new_tokens=self._max_new_tokens,
                text_stream=TextStream(self._decode, config.generation.stop),
                eos_ids=frozenset() if config.generation.ignore_eos else prepared.eos_ids,
            ),
            verifier=TargetVerifier(target_model, self._coupling(LEVEL_TARGET)),
            retriever=self._retriever(target) if config.uses_retrieval else None,
            drafter=self._drafter(target.vocab_size) if config.uses_drafter else None,
            gamma1=config.decoding.gamma1,
            gamma2=config.decoding.gamma2,
            rebuild_policy=RebuildPolicy(int(retrieval.rebuild) if retrieval.rebuild.isdigit() else retrieval.rebuild),
        )
        weights = prepared.target.num_weight_bytes + (prepared.drafter.num_weight_bytes if prepared.drafter else 0)
        return Engine(
            hierarchy=hierarchy,
            plan=self._plan,
            notes=self._notes,
            _device=prepared.device,
            _device_tier=self._device_tier,
            _host_tier=self._host_tier,
            _disk_tier=self._disk_tier,
            _link=self._link,
            _weight_bytes=weights,
            _full_cache=full_cache,
            _target=target_model,
        )

    def _decode(self, ids: list[int]) -> str:
        return self._prepared.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _coupling(self, level: int):
        return make_coupling(self._config.sampling, self._random, level, is_last=level == LEVEL_TARGET)

    def _full_cache(self) -> FullCache:
        plan, facts = self._plan, self._prepared.target
        shape, slack, device = facts.cache_shape, plan.slack_tokens, self._prepared.device
        block = BlockShape(
            num_kv_heads=shape.num_kv_heads, num_tokens=plan.block_tokens, head_dim=shape.head_dim, dtype=shape.dtype
        )
        # Layers in blocks come first, the slowest first of all: their stream starts with the pass.
        tiers = [self._disk_tier] * plan.num_disk_layers + [self._host_tier] * plan.num_host_layers
        num_blocks = plan.max_tokens // plan.block_tokens
        layers: list = [
            BlockLayer(shape, tier.blocks(block, num_blocks), slack, self._device_tier, self._link) for tier in tiers
        ]
        layers += [
            DeviceLayer(shape, plan.max_tokens + slack, self._device_tier) for _ in range(plan.num_device_layers)
        ]
        if not tiers:
            return FullCache(layers, facts.windows)
        readers = self._num_readers(block) if plan.num_disk_layers else 1
        needs_staging = plan.num_disk_layers > 0 or self._host_tier.checksums
        streamer = make_streamer(
            block.size,
            shape.dtype,
            plan.stream_buffers,
            self._device_tier,
            device,
            num_threads=readers,
            link=self._link,
            staging_tier=self._host_tier if needs_staging else None,
        )
        make_space = partial(_space, shape, self._device_tier)
        return FullCache(layers, facts.windows, streamer, BlockWriter(device), make_space)

    def _num_readers(self, block: BlockShape) -> int:
        configured = self._config.tiers.disk.readers
        if configured != "auto":
            return int(configured)
        num_readers, gb_per_s = best_num_readers(self._disk_tier.folder, block)
        self._notes.append(f"disk: {gb_per_s:.1f} GB/s with {num_readers} reads in flight")
        return num_readers

    def _selection(self, full_cache: FullCache) -> RetrievalSelection:
        capacity, facts = self._plan.max_tokens + self._plan.slack_tokens, self._prepared.target
        retrieval, shape, tier = self._config.cache.retrieval, facts.cache_shape, self._device_tier
        make_rule = ChunkIndex if retrieval.rule == ChunkRule.mean_key else AttentionMass
        rule = make_rule(shape, capacity, retrieval.chunk_size, tier)
        summary = ahead = None
        if retrieval.summary_tokens:
            summary = ContextSummary(shape, capacity, retrieval.summary_tokens, tier)
        if self._plan.chooses_ahead:
            size = (len(full_cache.layers_in_blocks), 2, shape.num_kv_heads * retrieval.budget, shape.head_dim)
            ahead = tier.allocate(*size, dtype=shape.dtype).zero_()
        share = retrieval.newest_share
        return RetrievalSelection(full_cache, rule, facts.windows, retrieval.budget, share, summary, ahead)

    def _retriever(self, target) -> RetrievalDrafter:
        tail = retrieval_tail_tokens(self._config, self._max_new_tokens)
        retrieval, slack = self._config.cache.retrieval, self._plan.slack_tokens
        num_summaries = 0
        if retrieval.summary_tokens:
            num_summaries = (self._plan.max_tokens + slack) // retrieval.summary_tokens
        shape = self._prepared.target.cache_shape
        sizes = (shape, retrieval.budget, tail, slack, self._device_tier, num_summaries)
        cache = make_retrieval_cache(retrieval.dtype.bits, *sizes)
        return RetrievalDrafter(RetrievalModel(target, cache), self._coupling(LEVEL_RETRIEVAL))

    def _drafter(self, vocab_size: int):
        config, facts = self._config, self._prepared.drafter
        if facts is None:
            coupling = self._config.sampling.coupling
            one_hot = coupling == "maximal" and not self._config.sampling.is_greedy
            return LookupDrafter(vocab_size, one_hot=one_hot)
        streaming = config.cache.streaming
        slack = streaming_slack(config)
        cache = StreamingLLMCache(facts.cache_shape, streaming.sinks, streaming.window, slack, self._device_tier)
        model = load_model(facts, self._prepared.device, self_check=config.model.self_check)
        return Drafter(StreamingModel(model, cache), self._coupling(LEVEL_DRAFTER), vocab_size)


@contextmanager
def _space(shape: CacheShape, tier: DeviceTier, num_tokens: int) -> Iterator[DeviceLayer]:
    """A layer on the device, while a prompt is read."""
    layer = DeviceLayer(shape, num_tokens, tier)
    try:
        yield layer
    finally:
        tier.free(layer.kv)
