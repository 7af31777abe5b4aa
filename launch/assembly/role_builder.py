"""Makes the roles that one process plays: their weights, tiers, caches and couplings, as the memory plan says."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch

from conf.schema import Coupling, CudaGraphs, Overlap, RunConfig
from launch.assembly import caches
from launch.assembly.caches import Tiers
from tiers.base import Tier
from tiers.device_tier import DeviceTier
from tiers.disk_tier import DiskTier, best_num_readers
from tiers.fixed_slots import SlotCache
from tiers.full_cache import FullCache
from tiers.link import Link
from tiers.pinned_host_tier import PinnedHostTier, can_pin
from tiers.planning.numa import bind_to_node_of
from tiers.planning.plan import MemoryPlan
from tiers.planning.sizes import TierName
from tiers.retrieval.rule import Pool, not_pooled
from tiers.retrieval.selection import RetrievalSelection
from tiers.retrieval_cache import RetrievalCache, RetrievalUpdate
from workers.acceptance import NO_WARPERS, KeyedRandom, make_coupling
from workers.checkpoint.facts import ModelFacts
from workers.checkpoint.shared_vocabulary import shared_vocabulary
from workers.drafter import Drafter
from workers.level import LevelCoupling
from workers.lookup_drafter import LookupDrafter
from workers.models.causal_model import CausalModel, DraftingModel
from workers.models.cuda_graphs import CudaRecorder, RecordedModel, Recorder, run_anew
from workers.models.loading import load_model
from workers.models.model_rules import ModelRules
from workers.models.retrieval_model import RetrievalModel
from workers.models.shared_ids_model import on_shared_ids
from workers.models.shared_weights import load_shared_model
from workers.models.streaming_model import StreamingModel
from workers.models.target_model import TargetModel
from workers.models.token_rules import TokenRules
from workers.parallel.shard import WHOLE
from workers.parallel.tensor_parallel import AllReduce
from workers.retrieval_drafter import RetrievalCachedModel, RetrievalDrafter
from workers.target_verifier import TargetVerifier

UpdateT = TypeVar("UpdateT")
LEVEL_DRAFTER, LEVEL_RETRIEVAL, LEVEL_TARGET = 1, 2, 3


class RoleBuilder:
    """Roles of one process on one device, with caches of the sizes in `plan`.

    `target` are the facts of the model, or of the part of it that this process has. What the roles have in common,
    tiers and the link to the device, is here, and is closed with `close`. `in_threads`: each role has its own.
    `rules` are the target's for this task.
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
        rules: ModelRules | None = None,
        in_threads: bool = False,
        on_locked: Callable[[int, int], None] = lambda done, total: None,
    ):
        self.config, self.target_facts, self.device, self.plan = config, target, device, plan
        self.sizes, self._rules = plan.sizes, rules
        self._seed, self._random = seed, None if in_threads else KeyedRandom(seed)
        self.notes: list[str] = []
        if device.type == "cuda" and (node := bind_to_node_of(pci_address(device))) is not None:
            self.notes.append(f"cores and host memory of NUMA node {node}, that of {device}")
        self.tiers = self._make_tiers(on_locked)
        self.full_cache: FullCache | None = None
        self.models: list[CausalModel] = []
        self.recorded: list[RecordedModel] = []
        self.weight_bytes = 0
        self.pool_scores: Pool = not_pooled
        """Makes scores of chunks the same on all ranks of a verifier; see tiers.retrieval.rule.Pool."""

    def _make_tiers(self, on_locked: Callable[[int, int], None]) -> Tiers:
        is_gpu, folder = self.device.type == "cuda", disk_folder(self.config)
        host = PinnedHostTier(
            pin=is_gpu and can_pin(),
            checksums=self.config.tiers.host.checksums,
            on_locked=lambda num_bytes: on_locked(num_bytes, self.plan.totals["host"]),
        )
        if is_gpu and not host.pin and self.plan.host_bytes:
            self.notes.append("host memory is not pinned (cupy is missing): copies will be slow")
        if self.sizes.num_disk_layers:
            folder.mkdir(parents=True, exist_ok=True)
        link = Link(self.config.tiers.link.gb_per_s)
        return Tiers(device=DeviceTier(self.device), host=host, disk=DiskTier(folder), link=link)

    def close(self) -> None:
        """Ends the threads that copy, and gives the disk's space back."""
        if self.full_cache is not None:
            self.full_cache.close()
        self.tiers.disk.close()

    def peak_bytes(self) -> dict[str, int]:
        """Peak of each tier: what the allocator (CUDA) or our tiers have handed out, weights included."""
        peaks = {tier.name: tier.peak_bytes for tier in (self.tiers.device, self.tiers.host, self.tiers.disk)}
        peaks["device"] += self.weight_bytes
        if self.device.type == "cuda":
            peaks["device"] = torch.cuda.max_memory_allocated(self.device)
        return peaks

    def streaming_report(self) -> dict[str, float | None]:
        """Bytes and seconds of streaming from host and disk.

        `emulated_link_gb_per_s` is null where the link is the machine's.
        """
        assert self.full_cache is not None, "there is no verifier here"
        stats = self.full_cache.stream_stats
        return {
            "bytes": stats.num_bytes,
            "seconds": stats.seconds,
            "gb_per_s": stats.gb_per_s,
            "stall_s": stats.stall_seconds,
            "overlap": stats.hidden_share,
            "emulated_link_gb_per_s": self.tiers.link.gb_per_s,
            "damaged_blocks": self.tiers.disk.num_damaged + self.tiers.host.num_damaged,
        }

    # ---- Models. ----

    def load_target(self, all_reduce: AllReduce | None = None) -> CausalModel:
        """The target with weights of its own; see workers.models.loading.load_model. Raises ConfigError."""
        return self._load(self.target_facts, all_reduce)

    def take_target(self, description: dict[str, Any]) -> CausalModel:
        """The target on the weights of another process; see workers.models.shared_weights."""
        self.models.append(load_shared_model(self.target_facts, description, self.device))
        return self.models[-1]

    def _load(self, facts: ModelFacts, all_reduce: AllReduce | None = None, *, layer_major: bool = True) -> CausalModel:
        self.weight_bytes += facts.num_weight_bytes
        self_check = self.config.model.self_check
        model = load_model(facts, self.device, self_check=self_check, layer_major=layer_major, all_reduce=all_reduce)
        self.models.append(model)
        return model

    # ---- Roles. ----

    def verifier(self, target: CausalModel) -> tuple[TargetVerifier, TargetModel]:
        """The role that verifies, and the model that it plays."""
        self.full_cache = self._full_cache()
        model = TargetModel(
            target,
            self.full_cache,
            piece_tokens=self.sizes.piece_tokens,
            hidden_tier=self.tiers.device if self.sizes.hidden_tier is TierName.device else self.tiers.host,
            selection=self._selection(self.full_cache) if self.config.uses_retrieval else None,
        )
        return TargetVerifier(model, self._coupling(LEVEL_TARGET), rules=self._level_rules()), model

    def retriever(self, target: CausalModel) -> RetrievalDrafter[RetrievalUpdate]:
        """The role that drafts by retrieval beside its verifier, which hands it the updates themselves."""
        return self.retriever_with(RetrievalModel, target)

    def retriever_with(
        self,
        make_model: Callable[[DraftingModel, RetrievalCache], RetrievalCachedModel[UpdateT]],
        target: CausalModel,
        tier: Tier | None = None,
    ) -> RetrievalDrafter[UpdateT]:
        """The role that drafts by retrieval on `make_model(model, cache)`; the cache is in `tier`, or on the device.

        The kind of model says how updates come: see workers.models.retrieval_model.
        """
        cache = self.retrieval_cache(self.tiers.device if tier is None else tier)
        coupling, facts = self._coupling(LEVEL_RETRIEVAL), self.target_facts
        model = make_model(self._recorded(facts, target, cache), cache)
        rules = self._level_rules()
        return RetrievalDrafter(model, coupling, names_runners_up=self._wants_runners_up, rules=rules)

    def drafter(self, facts: ModelFacts | None, vocab_size: int) -> Drafter | LookupDrafter:
        """The role that drafts; without `facts` of a model it looks up n-grams. `vocab_size` is the target's."""
        config = self.config
        if facts is None:
            one_hot = config.sampling.coupling is Coupling.maximal and not config.sampling.is_greedy
            return LookupDrafter(vocab_size, one_hot=one_hot)
        assert self.sizes.streaming is not None, "the plan has no drafter"
        cache = caches.streaming_cache(self.sizes.streaming, facts.cache_shape, self.tiers.device)
        streaming = StreamingModel(self._recorded(facts, self._load(facts, layer_major=False), cache), cache)
        model = on_shared_ids(streaming, shared_vocabulary(self.target_facts, facts))
        coupling = self._coupling(LEVEL_DRAFTER)
        # Where the retrieval draft stands between, it names the runners-up of what it hands on.
        names_runners_up = self._wants_runners_up and not config.uses_retrieval
        rules = self._level_rules()
        return Drafter(model, coupling, vocab_size, names_runners_up=names_runners_up, rules=rules)

    def _recorded(self, facts: ModelFacts, model: CausalModel, cache: SlotCache) -> CausalModel | RecordedModel:
        """`model`, or what replays its passes over `cache`, where that is asked for and can be."""
        if self.config.decoding.cuda_graphs is not CudaGraphs.on:
            return model
        reasons = {
            "a sliding window": any(facts.windows),
            "a rotary embedding that depends on length": model.depends_on_length,
            "weights on several devices": facts.shard != WHOLE,
            "roles in threads of their own": self._random is None,
            "quantised chunks": not cache.can_record,
        }
        reason = next((reason for reason, holds in reasons.items() if holds), None)
        if reason is not None:
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
        """Likely tokens beside the drafted ones are named, for what is drafted after each of them."""
        return self.config.decoding.overlap is Overlap.outcomes

    def _coupling(self, level: int) -> LevelCoupling:
        # Numbers are keyed: a source for each role, which roles in threads of their own need, draws what one would.
        random = self._random or KeyedRandom(self._seed)
        warpers = NO_WARPERS if self._rules is None else self._rules.warpers()
        return make_coupling(self.config.sampling, random, level, is_last=level == LEVEL_TARGET, warpers=warpers)

    def _level_rules(self) -> TokenRules | None:
        """Each level follows the sequence by itself."""
        return None if self._rules is None else self._rules.for_level()

    # ---- Caches. ----

    def retrieval_cache(self, tier: Tier) -> RetrievalCache:
        """The retrieval cache, in `tier`."""
        return caches.retrieval_cache(self.sizes, self.target_facts.cache_shape, tier)

    def _full_cache(self) -> FullCache:
        facts = self.target_facts
        num_readers = self._num_readers() if self.sizes.num_disk_layers else 1
        return caches.full_cache(self.sizes, facts.cache_shape, facts.windows, self.tiers, self.device, num_readers)

    def _num_readers(self) -> int:
        """Number of reads from disk in flight: as configured, else the fewest that are about as fast as it gets."""
        configured = self.config.tiers.disk.readers
        if configured != "auto":
            return int(configured)
        block = self.sizes.block_shape(self.target_facts.cache_shape)
        num_readers, gb_per_s = best_num_readers(self.tiers.disk.folder, block, self.sizes.stream_buffers)
        self.notes.append(f"disk: {gb_per_s:.1f} GB/s with {num_readers} reads in flight")
        return num_readers

    def _selection(self, full_cache: FullCache) -> RetrievalSelection:
        facts, share = self.target_facts, self.config.cache.retrieval.newest_share
        of_target = (facts.cache_shape, facts.windows, share)
        return caches.selection(self.sizes, full_cache, *of_target, self.tiers.device, self.pool_scores)


def disk_folder(config: RunConfig) -> Path:
    """Where the disk tier has its files."""
    return Path(config.tiers.disk.folder or config.output)


def pci_address(device: torch.device) -> str:
    """Address of a CUDA device, as the system names it."""
    facts: Any = torch.cuda.get_device_properties(device)  # torch's types know nothing of addresses
    return f"{facts.pci_domain_id:04x}:{facts.pci_bus_id:02x}:{facts.pci_device_id:02x}.0"
