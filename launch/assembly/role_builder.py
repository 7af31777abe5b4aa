"""Makes the roles that one process plays: their weights, tiers, caches and couplings, as the memory plan says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path

import torch

from conf.schema import CudaGraphs, Overlap, RunConfig
from launch.assembly.sizing import PIECE_TOKENS, retrieval_tail_tokens, streaming_slack
from tiers.base import BlockShape, CacheShape, Tier
from tiers.block_layer import BlockLayer
from tiers.block_writer import BlockWriter
from tiers.device_layer import DeviceLayer
from tiers.device_tier import DeviceTier
from tiers.disk_tier import DiskTier, best_num_readers
from tiers.full_cache import FullCache
from tiers.link import Link
from tiers.pinned_host_tier import PinnedHostTier, can_pin
from tiers.planning.numa import bind_to_node_of
from tiers.planning.plan import MemoryPlan
from tiers.quantised_retrieval_cache import make_retrieval_cache
from tiers.retrieval.context_summary import ContextSummary
from tiers.retrieval.rule import Pool, not_pooled, rule_class
from tiers.retrieval.selection import RetrievalSelection
from tiers.retrieval_cache import RetrievalCache
from tiers.streaming_llm_cache import StreamingLLMCache
from tiers.transfer import make_streamer
from workers.acceptance import KeyedRandom, make_coupling
from workers.drafter import Drafter
from workers.lookup_drafter import LookupDrafter
from workers.models.cached_models import CausalModel, RetrievalModel, StreamingModel, TargetModel
from workers.models.cuda_graphs import CudaRecorder, RecordedModel, Recorder, run_anew
from workers.models.pretrained import ModelFacts, load_model
from workers.models.shared_weights import load_shared_model
from workers.parallel.shard import WHOLE
from workers.retrieval_drafter import RetrievalDrafter
from workers.target_verifier import TargetVerifier

LEVEL_DRAFTER, LEVEL_RETRIEVAL, LEVEL_TARGET = 1, 2, 3


class RoleBuilder:
    """Roles of one process on one device; see tiers.planning.plan.MemoryPlan for what `plan` means.

    `target` are the facts of the model, or of the part of it that this process has. What the roles have in common,
    tiers and the link to the device, is here, and is closed with `close`. `in_threads`: each role has its own.
    `on_locked(done, total)` is called as bytes of host memory are page-locked, which takes a while.
    """

    def __init__(
        self,
        config: RunConfig,
        target: ModelFacts,
        device: torch.device,
        plan: MemoryPlan,
        *,
        seed: int,
        max_new_tokens: int,
        in_threads: bool = False,
        on_locked: Callable[[int, int], None] = lambda done, total: None,
    ):
        self.config, self.target_facts, self.device, self.plan = config, target, device, plan
        self._max_new_tokens = max_new_tokens
        self._seed, self._random = seed, None if in_threads else KeyedRandom(seed)
        self.notes: list[str] = []
        if device.type == "cuda" and (node := bind_to_node_of(pci_address(device))) is not None:
            self.notes.append(f"cores and host memory of NUMA node {node}, that of {device}")
        self.device_tier = DeviceTier(device)
        pin, checksums = device.type == "cuda" and can_pin(), config.tiers.host.checksums
        self.host_tier = PinnedHostTier(
            pin=pin,
            checksums=checksums,
            on_locked=lambda num_bytes: on_locked(num_bytes, plan.totals["host"]),
        )
        if device.type == "cuda" and not self.host_tier.pin and plan.host_bytes:
            self.notes.append("host memory is not pinned (cupy is missing): copies will be slow")
        if plan.num_disk_layers:
            disk_folder(config).mkdir(parents=True, exist_ok=True)
        self.disk_tier = DiskTier(disk_folder(config))
        self.link = Link(config.tiers.link.gb_per_s)
        self.full_cache: FullCache | None = None
        self.models: list[CausalModel] = []
        self.recorded: list[RecordedModel] = []
        self.weight_bytes = 0
        self.pool_scores: Pool = not_pooled
        """Of chunks, over the ranks of a verifier; see tiers.retrieval.rule.Pool."""

    def close(self) -> None:
        if self.full_cache is not None:
            self.full_cache.close()
        self.disk_tier.close()

    def peak_bytes(self) -> dict[str, int]:
        """Of each tier: what the allocator (CUDA) or our tiers have handed out, weights included."""
        peaks = {tier.name: tier.peak_bytes for tier in (self.device_tier, self.host_tier, self.disk_tier)}
        peaks["device"] += self.weight_bytes
        if self.device.type == "cuda":
            peaks["device"] = torch.cuda.max_memory_allocated(self.device)
        return peaks

    def streaming_report(self) -> dict[str, float | None]:
        """What was streamed from host and disk; `emulated_link_gb_per_s` is null where the link is the machine's."""
        stats = self.full_cache.stream_stats
        rate = stats.num_bytes / stats.seconds / 1e9 if stats.seconds else 0.0
        return {
            "bytes": stats.num_bytes,
            "seconds": stats.seconds,
            "gb_per_s": rate,
            "stall_s": stats.stall_seconds,
            "overlap": overlap(stats.seconds, stats.stall_seconds),
            "emulated_link_gb_per_s": self.link.gb_per_s,
            "damaged_blocks": self.disk_tier.num_damaged + self.host_tier.num_damaged,
        }

    # ---- Models. ----

    def load_target(self, **how) -> CausalModel:
        """See workers.models.pretrained.load_model. Raises ConfigError."""
        return self._load(self.target_facts, **how)

    def take_target(self, description: dict) -> CausalModel:
        """On the weights of another process; see workers.models.shared_weights."""
        self.models.append(load_shared_model(self.target_facts, description, self.device))
        return self.models[-1]

    def _load(self, facts: ModelFacts, **how) -> CausalModel:
        self.weight_bytes += facts.num_weight_bytes
        self.models.append(load_model(facts, self.device, self_check=self.config.model.self_check, **how))
        return self.models[-1]

    # ---- Roles. ----

    def verifier(self, target: CausalModel) -> tuple[TargetVerifier, TargetModel]:
        self.full_cache = self._full_cache()
        model = TargetModel(
            target,
            self.full_cache,
            piece_tokens=PIECE_TOKENS,
            hidden_tier=self.device_tier if self.plan.hidden_tier == "device" else self.host_tier,
            selection=self._selection(self.full_cache) if self.config.uses_retrieval else None,
        )
        return TargetVerifier(model, self._coupling(LEVEL_TARGET)), model

    def retriever(
        self, target: CausalModel, tier: Tier | None = None, make_model: Callable = RetrievalModel
    ) -> RetrievalDrafter:
        """Its cache is in `tier`; on the device, if None."""
        cache = self.retrieval_cache(self.device_tier if tier is None else tier)
        coupling, facts = self._coupling(LEVEL_RETRIEVAL), self.target_facts
        model = make_model(self._recorded(facts, target, cache), cache)
        return RetrievalDrafter(model, coupling, names_runners_up=self._wants_runners_up)

    def drafter(self, facts: ModelFacts | None, vocab_size: int) -> Drafter | LookupDrafter:
        """Without `facts` of a model it looks up n-grams. `vocab_size` is the target's."""
        config = self.config
        if facts is None:
            one_hot = config.sampling.coupling == "maximal" and not config.sampling.is_greedy
            return LookupDrafter(vocab_size, one_hot=one_hot)
        streaming = config.cache.streaming
        slack = streaming_slack(config)
        cache = StreamingLLMCache(facts.cache_shape, streaming.sinks, streaming.window, slack, self.device_tier)
        model = StreamingModel(self._recorded(facts, self._load(facts), cache), cache)
        coupling = self._coupling(LEVEL_DRAFTER)
        # Where the retrieval draft stands between, it names the runners-up of what it hands on.
        names_runners_up = self._wants_runners_up and not config.uses_retrieval
        return Drafter(model, coupling, vocab_size, names_runners_up=names_runners_up)

    def _recorded(self, facts: ModelFacts, model: CausalModel, cache) -> CausalModel | RecordedModel:
        """`model`, or what replays its passes over `cache`, where that is asked for and can be."""
        if self.config.decoding.cuda_graphs is not CudaGraphs.on:
            return model
        for reason, holds in (
            ("a sliding window", any(facts.windows)),
            ("a rotary embedding that depends on length", model.depends_on_length),
            ("weights on several devices", facts.shard != WHOLE),
            ("roles in threads of their own", self._random is None),
            ("quantised chunks", not isinstance(cache, RetrievalCache | StreamingLLMCache)),
        ):
            if holds:
                self.notes.append(f"{facts.key}: no CUDA graphs, because of {reason}")
                return model
        # A step reads what is drafted, and the tokens before that the level above brought.
        max_rows = self.config.decoding.most_gamma1 + 2
        self.recorded.append(RecordedModel(model, cache, max_rows, self._recorder))
        return self.recorded[-1]

    @cached_property
    def _recorder(self) -> Recorder:
        """One for all levels: their graphs share memory."""
        return CudaRecorder(self.device) if self.device.type == "cuda" else run_anew

    @property
    def _wants_runners_up(self) -> bool:
        return self.config.decoding.overlap is Overlap.outcomes

    def _coupling(self, level: int):
        # Numbers are keyed: a source for each role, which roles in threads of their own need, draws what one would.
        random = self._random or KeyedRandom(self._seed)
        return make_coupling(self.config.sampling, random, level, is_last=level == LEVEL_TARGET)

    # ---- Caches. ----

    def retrieval_cache(self, tier: Tier):
        retrieval, slack = self.config.cache.retrieval, self.plan.slack_tokens
        tail = retrieval_tail_tokens(self.config, self._max_new_tokens)
        num_summaries = 0
        if retrieval.summary_tokens:
            num_summaries = (self.plan.max_tokens + slack) // retrieval.summary_tokens
        sizes = (self.target_facts.cache_shape, retrieval.budget, tail, slack, tier, num_summaries)
        return make_retrieval_cache(retrieval.dtype.bits, *sizes)

    def _full_cache(self) -> FullCache:
        plan, facts = self.plan, self.target_facts
        shape, slack, device = facts.cache_shape, plan.slack_tokens, self.device
        block = BlockShape(
            num_kv_heads=shape.num_kv_heads, num_tokens=plan.block_tokens, head_dim=shape.head_dim, dtype=shape.dtype
        )
        # Layers in blocks come first, the slowest first of all: their stream starts with the pass.
        tiers = [self.disk_tier] * plan.num_disk_layers + [self.host_tier] * plan.num_host_layers
        num_blocks = plan.max_tokens // plan.block_tokens
        layers: list = [
            BlockLayer(shape, tier.blocks(block, num_blocks), slack, self.device_tier, self.link) for tier in tiers
        ]
        layers += [DeviceLayer(shape, plan.max_tokens + slack, self.device_tier) for _ in range(plan.num_device_layers)]
        if not tiers:
            return FullCache(layers, facts.windows)
        readers = self._num_readers(block) if plan.num_disk_layers else 1
        needs_staging = plan.num_disk_layers > 0 or self.host_tier.checksums
        streamer = make_streamer(
            block.size,
            shape.dtype,
            plan.stream_buffers,
            self.device_tier,
            device,
            num_threads=readers,
            link=self.link,
            staging_tier=self.host_tier if needs_staging else None,
        )
        make_space = partial(_space, shape, self.device_tier)
        return FullCache(layers, facts.windows, streamer, BlockWriter(device), make_space)

    def _num_readers(self, block: BlockShape) -> int:
        configured = self.config.tiers.disk.readers
        if configured != "auto":
            return int(configured)
        num_readers, gb_per_s = best_num_readers(self.disk_tier.folder, block, self.plan.stream_buffers)
        self.notes.append(f"disk: {gb_per_s:.1f} GB/s with {num_readers} reads in flight")
        return num_readers

    def _selection(self, full_cache: FullCache) -> RetrievalSelection:
        capacity, facts = self.plan.max_tokens + self.plan.slack_tokens, self.target_facts
        retrieval, shape, tier = self.config.cache.retrieval, facts.cache_shape, self.device_tier
        rule = rule_class(retrieval.rule)(shape, capacity, retrieval.chunk_size, tier, self.pool_scores)
        summary = ahead = None
        if retrieval.summary_tokens:
            summary = ContextSummary(shape, capacity, retrieval.summary_tokens, tier)
        if self.plan.chooses_ahead:
            size = (len(full_cache.layers_in_blocks), 2, shape.num_kv_heads * retrieval.budget, shape.head_dim)
            ahead = tier.allocate(*size, dtype=shape.dtype).zero_()
        share = retrieval.newest_share
        return RetrievalSelection(full_cache, rule, facts.windows, retrieval.budget, share, summary, ahead)


def disk_folder(config: RunConfig) -> Path:
    """Where the disk tier has its files."""
    return Path(config.tiers.disk.folder or config.output)


def overlap(seconds: float, stall_seconds: float) -> float | None:
    """Of the seconds in which copies were under way, the share in which attention did not wait for them."""
    return max(0.0, 1 - stall_seconds / seconds) if seconds else None


def pci_address(device: torch.device) -> str:
    """Of a CUDA device, as the system names it."""
    facts = torch.cuda.get_device_properties(device)
    return f"{facts.pci_domain_id:04x}:{facts.pci_bus_id:02x}:{facts.pci_device_id:02x}.0"


@contextmanager
def _space(shape: CacheShape, tier: DeviceTier, num_tokens: int) -> Iterator[DeviceLayer]:
    """A layer on the device, while a prompt is read."""
    layer = DeviceLayer(shape, num_tokens, tier)
    try:
        yield layer
    finally:
        tier.free(layer.kv)
