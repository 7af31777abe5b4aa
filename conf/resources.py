"""Keys `cache`, `tiers` and `placement`: what a run takes of its machines. Standard library only."""

import math
from dataclasses import dataclass, field

from conf.values import (
    ADAPTIVE,
    AUTO,
    MAX_THREADS,
    NEVER,
    ChunkDtype,
    ConfigError,
    FullCacheTier,
    PlacementKind,
    RetrievalRuleName,
    expand_home,
    parse_auto_count,
    require,
)


@dataclass(kw_only=True, slots=True)
class RetrievalCacheConfig:
    """Level 2: the chunks of the context that the retrieval draft sees."""

    budget: int | str = 1024
    """Tokens per layer and kv head; 0 leaves the level out; more than the context is cut to it; auto: chosen at
    rebuilds from measured costs and running acceptance, of what a quarter of the context has room for."""
    chunk_size: int = 8
    """Tokens that are chosen together."""
    rule: RetrievalRuleName = RetrievalRuleName.attention
    """attention: what the last verifications attended to; mean_key: products of queries and the chunk's mean key, as in
    TriForce, which takes memory on the device."""
    dtype: ChunkDtype = ChunkDtype.auto
    """Number format of the chosen chunks: auto, int8 or int4, for a larger budget in the same memory. Reading them
    takes longer; what is generated does not change, since drafts are verified."""
    newest_share: float = 0.5
    """Share of the budget for the newest tokens, kept whatever their score; with 1 it is a recent window."""
    summary_tokens: int = 64
    """Tokens of a group: what is not chosen is seen in groups, each as one mean key and value; 0: not at all."""
    rebuild: str = ADAPTIVE
    """When chunks are chosen anew: `never`, `adaptive` (the recent acceptance fell), or every n verifications."""

    def __post_init__(self) -> None:
        key = "cache.retrieval"
        require(self.chunk_size >= 1, f"{key}.chunk_size", self.chunk_size, ">= 1, for example 8")
        legal = self.budget == AUTO if isinstance(self.budget, str) else self.budget >= 0
        require(legal, f"{key}.budget", self.budget, ">= 0, for example 1024, or auto")
        if isinstance(self.budget, int) and self.budget % self.chunk_size:
            nearest = max(1, round(self.budget / self.chunk_size)) * self.chunk_size
            rule = f"a multiple of {key}.chunk_size={self.chunk_size}, for example {nearest}"
            raise ConfigError(f"{key}.budget is {self.budget}; it must be {rule}")
        require(0 <= self.newest_share <= 1, f"{key}.newest_share", self.newest_share, "between 0 and 1")
        require(self.summary_tokens >= 0, f"{key}.summary_tokens", self.summary_tokens, ">= 0, for example 64")
        parse_auto_count(f"{key}.rebuild", self.rebuild, (NEVER, ADAPTIVE), minimum=1)


@dataclass(kw_only=True, slots=True)
class StreamingCacheConfig:
    """Level 1: the drafter's StreamingLLM cache."""

    sinks: int = 4
    """First tokens of the context, always kept."""
    window: int = 508
    """Newest tokens kept."""

    def __post_init__(self) -> None:
        require(self.sinks >= 0, "cache.streaming.sinks", self.sinks, ">= 0, for example 4")
        require(self.window >= 1, "cache.streaming.window", self.window, ">= 1, for example 508")


@dataclass(kw_only=True, slots=True)
class FullCacheConfig:
    """Level 3: the target's whole cache."""

    tier: FullCacheTier = FullCacheTier.auto
    """device, host, disk, or auto: as many layers on the device as fit, of the rest as many on the host as fit, the
    others on disk."""
    device_layers: str = AUTO
    """Layers kept on the device when others are not: an integer, or auto."""
    host_layers: str = AUTO
    """Layers kept on the host when others are on disk: an integer, or auto."""
    block_tokens: str = AUTO
    """Tokens of one block, which a tier stores and streams as one piece; auto: 8 MiB, or an eighth of the context."""
    stream_buffers: int = 4
    """Blocks in flight to the device."""

    def __post_init__(self) -> None:
        parse_auto_count("cache.full.device_layers", self.device_layers, (AUTO,))
        parse_auto_count("cache.full.host_layers", self.host_layers, (AUTO,))
        parse_auto_count("cache.full.block_tokens", self.block_tokens, (AUTO,), minimum=1)
        contradicts = self.tier == FullCacheTier.device and self.device_layers != AUTO
        rule = "auto where cache.full.tier is device, which puts every layer there"
        require(not contradicts, "cache.full.device_layers", self.device_layers, rule)
        contradicts = self.tier in (FullCacheTier.device, FullCacheTier.host) and self.host_layers != AUTO
        rule = f"auto where cache.full.tier is {self.tier}"
        require(not contradicts, "cache.full.host_layers", self.host_layers, rule)
        require(2 <= self.stream_buffers <= 64, "cache.full.stream_buffers", self.stream_buffers, "between 2 and 64")


@dataclass(kw_only=True, slots=True)
class CacheConfig:
    """The three caches."""

    full: FullCacheConfig = field(default_factory=FullCacheConfig)
    retrieval: RetrievalCacheConfig = field(default_factory=RetrievalCacheConfig)
    streaming: StreamingCacheConfig = field(default_factory=StreamingCacheConfig)


@dataclass(kw_only=True, slots=True)
class LinkConfig:
    """The link from host to device."""

    gb_per_s: float | None = None
    """Emulate a link of this speed, to study offloading on a machine without a GPU: copies to the device take turns,
    each as long as at this many 1e9 bytes a second. null: as fast as the machine is."""

    def __post_init__(self) -> None:
        legal = self.gb_per_s is None or (math.isfinite(self.gb_per_s) and self.gb_per_s > 0)
        require(legal, "tiers.link.gb_per_s", self.gb_per_s, "above 0, for example 25, or null")


@dataclass(kw_only=True, slots=True)
class HostConfig:
    """The host tier."""

    checksums: bool = False
    """Check every block when it is read, as the disk tier always does: slower, finds faulty memory and bugs."""


@dataclass(kw_only=True, slots=True)
class DiskConfig:
    """The disk tier."""

    folder: str | None = None
    """Folder of its files, which have no name and vanish with the run; null: the run's output folder."""
    readers: str = AUTO
    """Reads in flight: an integer, or auto: measured when the run starts."""

    def __post_init__(self) -> None:
        expand_home(self, "tiers.disk.", "folder")
        require(self.folder != "", "tiers.disk.folder", self.folder, "a folder that can be written, or null")
        readers = parse_auto_count("tiers.disk.readers", self.readers, (AUTO,), minimum=1)
        legal = isinstance(readers, str) or readers <= 64
        require(legal, "tiers.disk.readers", self.readers, "between 1 and 64, or auto")


@dataclass(kw_only=True, slots=True)
class TiersConfig:
    """The kinds of memory, and the link between them."""

    link: LinkConfig = field(default_factory=LinkConfig)
    host: HostConfig = field(default_factory=HostConfig)
    disk: DiskConfig = field(default_factory=DiskConfig)


@dataclass(kw_only=True, slots=True)
class PlacementConfig:
    """Spread of the roles over processes and devices."""

    kind: PlacementKind = PlacementKind.auto
    """inline: all roles in one process; colocated: one process for each GPU, all of them verifying and retrieving as
    one tensor-parallel model, the first drafting too; pipeline: a process for each role, the verifier tensor-parallel
    over the rest; auto: inline for one process, colocated for two or three, pipeline for more."""
    drafter_rank: int = 1
    """Rank that drafts in a pipeline."""
    retriever_rank: int = 2
    """Rank that drafts by retrieval in a pipeline. The orchestrator is rank 0, all others verify."""
    device: str = AUTO
    """auto: CUDA where there is a device, else cpu. A run in one process may also be told cuda:N; several processes
    spread over the devices of their node, the ranks of a verifier each on one of its own."""
    threads: str = AUTO
    """Threads of a CPU process: an integer, or auto: OMP_NUM_THREADS where it is set, else as many as cores are idle.
    In one process a verification and what is drafted beside it (decoding.overlap) share them."""
    device_memory_gib: float | None = None
    """GiB of the device's memory to plan for; null: what is free."""
    host_memory_gib: float | None = None
    """GiB of the host's memory to plan for; null: what is free, within the cgroup's limit."""
    disk_gib: float | None = None
    """GiB of the disk to plan for; null: what is free in tiers.disk.folder."""
    start_timeout_s: float = 600.0
    """Seconds until processes that have not joined and loaded end the run."""
    stall_timeout_s: float = 60.0
    """Seconds without progress after which a verifier ends the run; a drafter or retriever is restarted."""
    draft_timeout_s: float = 10.0
    """Seconds of one step after which a drafter or retriever is restarted, and the run goes on without it."""

    def __post_init__(self) -> None:
        parts = self.device.split(":")
        legal = self.device in (AUTO, "cpu", "cuda") or (len(parts) == 2 and parts[0] == "cuda" and parts[1].isdigit())
        require(legal, "placement.device", self.device, "auto, cpu, cuda or cuda:N")
        threads = parse_auto_count("placement.threads", self.threads, (AUTO,), minimum=1)
        legal = isinstance(threads, str) or threads <= MAX_THREADS
        require(legal, "placement.threads", self.threads, f"between 1 and {MAX_THREADS}, or auto")
        for key in ("start_timeout_s", "stall_timeout_s", "draft_timeout_s"):
            value = getattr(self, key)
            legal = math.isfinite(value) and value > 0
            require(legal, f"placement.{key}", value, "a number of seconds above 0, for example 60")
        for key in ("device_memory_gib", "host_memory_gib", "disk_gib"):
            value = getattr(self, key)
            legal = value is None or (math.isfinite(value) and value > 0)
            require(legal, f"placement.{key}", value, "above 0, or null")
