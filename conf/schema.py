"""The typed configuration of a run: every key, its unit, its default and its legal values. Standard library only.

A bad value raises `ConfigError` with the full key, the value and a legal one; the launch programs print it and exit
with code 2.
"""

import math
from dataclasses import dataclass, field, fields, is_dataclass
from enum import StrEnum
from typing import Any

MAX_GAMMA1 = 64
MAX_GAMMA2 = 256
AUTO = "auto"
MAX_AUTO_GAMMA1, MAX_AUTO_GAMMA2 = 8, 64
MAX_STOP_STRINGS = 64
MAX_THREADS = 1024
MAX_TURNS = 20
GREEDY_BELOW_TEMPERATURE = 1e-5
LOOKUP_DRAFTER, NO_DRAFTER = "lookup", "none"


class ConfigError(ValueError):
    """A configuration or input the program refuses: the message names key, value and a legal value."""


class Mode(StrEnum):
    """Which levels take part in decoding."""

    triforce = "triforce"
    retrieval = "retrieval"
    streaming = "streaming"
    autoregressive = "autoregressive"


class FullCacheTier(StrEnum):
    """Where the full cache lives."""

    auto = "auto"
    device = "device"
    host = "host"
    disk = "disk"


class Coupling(StrEnum):
    """How a draft is coupled to the model that verifies it."""

    maximal = "maximal"
    gumbel = "gumbel"


class Overlap(StrEnum):
    """What is drafted while the target verifies."""

    off = "off"
    ahead = "ahead"
    outcomes = "outcomes"


class CudaGraphs(StrEnum):
    """Whether forward passes of the draft levels are recorded and replayed."""

    auto = "auto"
    on = "on"
    off = "off"


class RetrievalRuleName(StrEnum):
    """By what the chunks of the retrieval cache are chosen."""

    attention = "attention"
    mean_key = "mean_key"


class ChunkDtype(StrEnum):
    """How the chosen chunks of the retrieval cache are stored; `auto` is as the model has them."""

    auto = "auto"
    int8 = "int8"
    int4 = "int4"

    @property
    def bits(self) -> int | None:
        """Of a value; None: those of the model's."""
        return {ChunkDtype.int8: 8, ChunkDtype.int4: 4}.get(self)


class Dtype(StrEnum):
    """Of weights and caches; `auto` is bfloat16 where the processor computes in it, else float32."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Dataset(StrEnum):
    """A published collection of long texts."""

    pg19 = "pg19"
    narrativeqa = "narrativeqa"


class PromptTask(StrEnum):
    """What is asked of the document."""

    continuation = "continuation"
    summary = "summary"
    question = "question"
    needle = "needle"


class PlacementKind(StrEnum):
    """How roles are spread over processes."""

    auto = "auto"
    inline = "inline"
    colocated = "colocated"
    pipeline = "pipeline"


def require(condition: bool, key: str, value: Any, rule: str) -> None:
    """Raises `ConfigError` "<key> is <value>; it must be <rule>" unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{key} is {value!r}; it must be {rule}")


def parse_auto_count(key: str, value: str, words: tuple[str, ...], minimum: int = 0) -> int | str:
    """One of `words`, or an integer >= minimum."""
    if value in words:
        return value
    is_number = value.isascii() and value.isdigit() and int(value) >= minimum
    require(is_number, key, value, f"{', '.join(words)} or an integer >= {minimum}")
    return int(value)


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The pair of models."""

    target: str = "assets/demo/target"
    """Local folder or hub id of the target model; a relative folder is looked for here, then in the project."""
    drafter: str = "assets/demo/drafter"
    """Local folder or hub id of the drafter, or `lookup` (n-gram lookup in the context), or `none`."""
    dtype: Dtype = Dtype.auto
    """Of weights, activations and caches of both models."""
    max_positions: int | None = None
    """Positions of the target, if it is to have more than it was trained on: YaRN (arXiv 2309.00071) stretches its
    rotary embedding, as Qwen's model cards advise; null: as its configuration says."""
    self_check: bool = True
    """Compare our attention with transformers' own on a few tokens after loading; refuse the model on a mismatch."""

    def __post_init__(self) -> None:
        require(bool(self.target), "model.target", self.target, "a local folder or a hub id")
        legal = self.max_positions is None or self.max_positions >= 1
        require(legal, "model.max_positions", self.max_positions, ">= 1, for example 131072, or null")
        require(bool(self.drafter), "model.drafter", self.drafter, "a local folder, a hub id, lookup or none")


@dataclass(kw_only=True, slots=True)
class DecodingConfig:
    """The speculation hierarchy."""

    mode: Mode = Mode.triforce
    """triforce: all levels; retrieval: no drafter; streaming: drafter straight to the target; autoregressive: none."""
    gamma1: int | str = 2
    """Tokens drafted per inner step; 0 leaves the drafter out; auto: chosen before each round from measured costs and
    running acceptance. The tokens of a seed then depend on the machine's speed, unless sampling.coupling is gumbel."""
    gamma2: int | str = 8
    """Tokens proposed per verification, at least; 0 is autoregressive decoding; auto: chosen likewise, 0 among them."""
    overlap: Overlap = Overlap.off
    """What is drafted while the target verifies: off: nothing; ahead: what follows if the whole block is accepted;
    outcomes: what follows each likely outcome, best with sampling.coupling=gumbel."""
    cuda_graphs: CudaGraphs = CudaGraphs.auto
    """Record forward passes of drafter and retrieval draft as CUDA graphs, which saves launching their kernels one by
    one. auto is off: they have not been run on a card yet (docs/gpu.md)."""

    def __post_init__(self) -> None:
        for key, value, limit in (("gamma1", self.gamma1, MAX_GAMMA1), ("gamma2", self.gamma2, MAX_GAMMA2)):
            legal = value == AUTO if isinstance(value, str) else 0 <= value <= limit
            require(legal, f"decoding.{key}", value, f"an integer between 0 and {limit}, or auto")

    @property
    def most_gamma1(self) -> int:
        """The largest that a round may have."""
        return MAX_AUTO_GAMMA1 if self.gamma1 == AUTO else int(self.gamma1)

    @property
    def most_gamma2(self) -> int:
        """See `most_gamma1`."""
        return MAX_AUTO_GAMMA2 if self.gamma2 == AUTO else int(self.gamma2)


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
    """Of the chosen chunks: auto, int8 or int4, for a larger budget in the same memory. Reading them takes longer; what
    is generated does not change, since drafts are verified."""
    newest_share: float = 0.5
    """Of the budget: newest tokens, kept whatever their score; 1 makes it a recent window, for comparison."""
    summary_tokens: int = 64
    """The tokens that are not chosen are seen in groups of so many, each as one mean key and value; 0: not at all."""
    rebuild: str = "adaptive"
    """When chunks are chosen anew: `never`, `adaptive` (the recent acceptance fell), or every n verifications."""

    def __post_init__(self) -> None:
        key = "cache.retrieval"
        require(self.chunk_size >= 1, f"{key}.chunk_size", self.chunk_size, ">= 1, for example 8")
        legal = self.budget == AUTO if isinstance(self.budget, str) else self.budget >= 0
        require(legal, f"{key}.budget", self.budget, ">= 0, for example 1024, or auto")
        if self.budget != AUTO and self.budget % self.chunk_size:
            nearest = max(1, round(self.budget / self.chunk_size)) * self.chunk_size
            rule = f"a multiple of {key}.chunk_size={self.chunk_size}, for example {nearest}"
            raise ConfigError(f"{key}.budget is {self.budget}; it must be {rule}")
        require(0 <= self.newest_share <= 1, f"{key}.newest_share", self.newest_share, "between 0 and 1")
        require(self.summary_tokens >= 0, f"{key}.summary_tokens", self.summary_tokens, ">= 0, for example 64")
        parse_auto_count(f"{key}.rebuild", self.rebuild, ("never", "adaptive"), minimum=1)


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
    device_layers: str = "auto"
    """Layers kept on the device when others are not: an integer, or auto."""
    host_layers: str = "auto"
    """Layers kept on the host when others are on disk: an integer, or auto."""
    block_tokens: str = "auto"
    """Tokens of one block, which a tier stores and streams as one piece; auto: 8 MiB, or an eighth of the context."""
    stream_buffers: int = 4
    """Blocks in flight to the device."""

    def __post_init__(self) -> None:
        parse_auto_count("cache.full.device_layers", self.device_layers, ("auto",))
        parse_auto_count("cache.full.host_layers", self.host_layers, ("auto",))
        parse_auto_count("cache.full.block_tokens", self.block_tokens, ("auto",), minimum=1)
        contradicts = self.tier == FullCacheTier.device and self.device_layers != "auto"
        rule = "auto where cache.full.tier is device, which puts every layer there"
        require(not contradicts, "cache.full.device_layers", self.device_layers, rule)
        contradicts = self.tier in (FullCacheTier.device, FullCacheTier.host) and self.host_layers != "auto"
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
    """Where its files are, which have no name and vanish with the run; null: the run's output folder."""
    readers: str = "auto"
    """Reads in flight: an integer, or auto: measured when the run starts."""

    def __post_init__(self) -> None:
        require(self.folder != "", "tiers.disk.folder", self.folder, "a folder that can be written, or null")
        readers = parse_auto_count("tiers.disk.readers", self.readers, ("auto",), minimum=1)
        require(readers == "auto" or readers <= 64, "tiers.disk.readers", self.readers, "between 1 and 64, or auto")


@dataclass(kw_only=True, slots=True)
class TiersConfig:
    """The kinds of memory and what is between them."""

    link: LinkConfig = field(default_factory=LinkConfig)
    host: HostConfig = field(default_factory=HostConfig)
    disk: DiskConfig = field(default_factory=DiskConfig)


@dataclass(kw_only=True, slots=True)
class SamplingConfig:
    """How the target samples; every level samples alike."""

    temperature: float = 0.6
    """0 is greedy."""
    top_p: float = 0.9
    """Keep the smallest set of tokens with at least this probability; 1 is off."""
    top_k: int = 0
    """Keep this many most probable tokens; 0 is off."""
    seed: int | None = 0
    """Random numbers are keyed by it; null draws one and reports it."""
    coupling: Coupling = Coupling.maximal
    """maximal: rejection sampling with residual; gumbel: tokens that do not depend on the drafter."""
    block_verification: bool = False
    """Judge a block as a whole at the last level (arXiv 2403.10444); with `maximal` only."""

    def __post_init__(self) -> None:
        temperature, top_p = self.temperature, self.top_p
        legal = math.isfinite(temperature) and 0 <= temperature <= 100
        require(legal, "sampling.temperature", temperature, "between 0 (greedy) and 100")
        require(math.isfinite(top_p) and 0 < top_p <= 1, "sampling.top_p", top_p, "above 0 and at most 1 (off)")
        require(self.top_k >= 0, "sampling.top_k", self.top_k, ">= 0 (0 is off)")
        legal = self.seed is None or 0 <= self.seed < 2**64
        require(legal, "sampling.seed", self.seed, "between 0 and 2**64 - 1, or null")
        legal = not (self.block_verification and self.coupling == Coupling.gumbel)
        require(legal, "sampling.block_verification", True, "false with sampling.coupling=gumbel")

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW_TEMPERATURE


@dataclass(kw_only=True, slots=True)
class GenerationConfig:
    """How much is generated."""

    max_new_tokens: int = 256
    """Tokens; fewer if the end of sequence, a stop string or the model's last position comes first."""
    stop: list[str] = field(default_factory=list)
    """Generation ends before the first of these strings; the text is cut there."""
    ignore_eos: bool = False
    """Go on past the end-of-sequence token, for measuring."""

    def __post_init__(self) -> None:
        require(self.max_new_tokens >= 1, "generation.max_new_tokens", self.max_new_tokens, ">= 1, for example 256")
        require(all(self.stop), "generation.stop", self.stop, "a list of non-empty strings")
        legal = len(self.stop) <= MAX_STOP_STRINGS
        require(legal, "generation.stop", f"{len(self.stop)} strings", f"at most {MAX_STOP_STRINGS}")


@dataclass(kw_only=True, slots=True)
class PromptConfig:
    """What is read, a file, a text, an item of a data set, or (none of them) the source of Python's standard library;
    and what is asked of it."""

    path: str | None = None
    """A UTF-8 text file; with `dataset`, the folder that has it."""
    text: str | None = None
    max_tokens: int | None = 8192
    """The document is cut so that the prompt has so many tokens; null reads all of it."""
    dataset: Dataset | None = None
    """pg19: books; narrativeqa: stories with questions. From the folder `path`, else from the hub."""
    item: int = 0
    """Of the data set: which book, or which question."""
    task: PromptTask = PromptTask.continuation
    """continuation: go on writing; summary: tell the story; question: answer `question`; needle: find facts that are
    hidden in the document, and whose answer is known."""
    question: str | None = None
    """Asked after the document with task=question; null: that of narrativeqa's item."""
    depth: float = 0.5
    """Of the needle asked for last: 0 is the document's beginning, 1 its end."""
    turns: int = 1
    """Questions of task=needle over one document, each about a needle of its own; all but the last are answered."""

    def __post_init__(self) -> None:
        both = self.path is not None and self.text is not None
        require(not both, "prompt.text", self.text, "unset where prompt.path is set")
        legal = self.max_tokens is None or self.max_tokens >= 1
        require(legal, "prompt.max_tokens", self.max_tokens, ">= 1, or null for the whole text")
        require(self.text is None or self.text != "", "prompt.text", self.text, "at least one character")
        both = self.text is not None and self.dataset is not None
        require(not both, "prompt.text", self.text, "unset where prompt.dataset is set")
        require(self.item >= 0, "prompt.item", self.item, ">= 0, for example 0")
        require(self.item == 0 or self.dataset is not None, "prompt.item", self.item, "0 where prompt.dataset is null")
        require(0 <= self.depth <= 1, "prompt.depth", self.depth, "between 0 (the beginning) and 1 (the end)")
        legal = 1 <= self.turns <= MAX_TURNS
        require(legal, "prompt.turns", self.turns, f"between 1 and {MAX_TURNS}")
        legal = self.turns == 1 or self.task is PromptTask.needle
        require(legal, "prompt.turns", self.turns, "1 unless prompt.task=needle")
        if self.task is PromptTask.question:
            legal = bool(self.question) or (self.question is None and self.dataset is Dataset.narrativeqa)
            require(legal, "prompt.question", self.question, "a question, unless prompt.dataset=narrativeqa has one")
        else:
            require(self.question is None, "prompt.question", self.question, "null unless prompt.task=question")


@dataclass(kw_only=True, slots=True)
class PlacementConfig:
    """Which process plays which role on which device."""

    kind: PlacementKind = PlacementKind.auto
    """inline: all roles in one process; colocated: one process for each GPU, all of them verifying and retrieving as
    one tensor-parallel model, the first drafting too; pipeline: a process for each role, the verifier tensor-parallel
    over the rest; auto: inline for one process, colocated for two or three, pipeline for more."""
    drafter_rank: int = 1
    """Of the pipeline: the rank that drafts."""
    retriever_rank: int = 2
    """Of the pipeline: the rank that drafts by retrieval. The orchestrator is rank 0, all others verify."""
    device: str = "auto"
    """auto: CUDA where there is a device, else cpu. Of a run in one process also cuda:N; several processes spread over
    the devices of their node, the ranks of a verifier each on one of its own."""
    threads: str = "auto"
    """Of a CPU process: an integer, or auto: OMP_NUM_THREADS if the user set it, else as many as cores are idle. In one
    process a verification and what is drafted beside it (decoding.overlap) share them."""
    device_memory_gib: float | None = None
    """Plan for this much memory on the device; null: what is free."""
    host_memory_gib: float | None = None
    """Plan for this much memory on the host; null: what is free, within the cgroup's limit."""
    disk_gib: float | None = None
    """Plan for this much of the disk; null: what is free in tiers.disk.folder."""
    start_timeout_s: float = 600.0
    """Processes that have not joined and loaded by then end the run."""
    stall_timeout_s: float = 60.0
    """A verifier that makes no progress for so long ends the run; a drafter or retriever is restarted."""
    draft_timeout_s: float = 10.0
    """A drafter or retriever that takes so long for one step is restarted, and the run goes on without it."""

    def __post_init__(self) -> None:
        parts = self.device.split(":")
        legal = self.device in ("auto", "cpu", "cuda") or (
            len(parts) == 2 and parts[0] == "cuda" and parts[1].isdigit()
        )
        require(legal, "placement.device", self.device, "auto, cpu, cuda or cuda:N")
        threads = parse_auto_count("placement.threads", self.threads, ("auto",), minimum=1)
        legal = threads == "auto" or threads <= MAX_THREADS
        require(legal, "placement.threads", self.threads, f"between 1 and {MAX_THREADS}, or auto")
        for key in ("start_timeout_s", "stall_timeout_s", "draft_timeout_s"):
            value = getattr(self, key)
            legal = math.isfinite(value) and value > 0
            require(legal, f"placement.{key}", value, "a number of seconds above 0, for example 60")
        for key in ("device_memory_gib", "host_memory_gib", "disk_gib"):
            value = getattr(self, key)
            legal = value is None or (math.isfinite(value) and value > 0)
            require(legal, f"placement.{key}", value, "above 0, or null")


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """One run of launch/run.py."""

    model: ModelConfig = field(default_factory=ModelConfig)
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    tiers: TiersConfig = field(default_factory=TiersConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    output: str = "outputs/run"
    """Folder of the run: result.json, rounds.jsonl, Hydra's record of the configuration."""

    @property
    def uses_drafter(self) -> bool:
        """Level 1 takes part."""
        return (
            self.decoding.mode in (Mode.triforce, Mode.streaming)
            and self.model.drafter != NO_DRAFTER
            and self.decoding.gamma1 != 0
            and self.decoding.gamma2 != 0
        )

    @property
    def overlaps(self) -> bool:
        """Drafting goes on during verification."""
        drafts = self.uses_drafter or self.uses_retrieval
        return drafts and self.decoding.overlap is not Overlap.off

    @property
    def uses_retrieval(self) -> bool:
        """Level 2 takes part."""
        return (
            self.decoding.mode in (Mode.triforce, Mode.retrieval)
            and self.cache.retrieval.budget != 0
            and self.decoding.gamma2 != 0
        )


def to_plain(config: Any) -> Any:
    """A dataclass tree as JSON types."""
    if is_dataclass(config):
        return {item.name: to_plain(getattr(config, item.name)) for item in fields(config)}
    if isinstance(config, StrEnum):
        return str(config)
    if isinstance(config, list):
        return [to_plain(item) for item in config]
    return config
