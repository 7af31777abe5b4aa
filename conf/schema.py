"""The typed configuration of a run: every key, its unit, its default and its legal values. Standard library only.

This is the door: other folders import from here. The keys are documented where they are defined,
    conf/generation.py    `model`, `prompt`, `decoding`, `sampling`, `generation`
    conf/resources.py     `cache`, `tiers`, `placement`
    conf/values.py        the words that some of them take
A bad value raises `ConfigError` with the full key, the value and a legal one; the launch programs print it and exit
with code 2.
"""

from dataclasses import dataclass, field, fields, is_dataclass
from enum import StrEnum
from typing import Any

from conf.generation import DecodingConfig, GenerationConfig, ModelConfig, PromptConfig, SamplingConfig
from conf.resources import (
    CacheConfig,
    DiskConfig,
    FullCacheConfig,
    HostConfig,
    LinkConfig,
    PlacementConfig,
    RetrievalCacheConfig,
    StreamingCacheConfig,
    TiersConfig,
)
from conf.values import (
    ADAPTIVE,
    AUTO,
    LOOKUP_DRAFTER,
    MAX_AUTO_GAMMA1,
    MAX_AUTO_GAMMA2,
    NEVER,
    NO_DRAFTER,
    STANDARD_INPUT,
    ChunkDtype,
    ConfigError,
    Coupling,
    CudaGraphs,
    Dataset,
    Dtype,
    FullCacheTier,
    Mode,
    Overlap,
    PlacementKind,
    PromptTask,
    PromptTemplate,
    RetrievalRuleName,
    expand_home,
    parse_auto_count,
    require,
    unescaped,
)

__all__ = [
    "ADAPTIVE",
    "AUTO",
    "CacheConfig",
    "ChunkDtype",
    "ConfigError",
    "Coupling",
    "CudaGraphs",
    "Dataset",
    "DecodingConfig",
    "DiskConfig",
    "Dtype",
    "FullCacheConfig",
    "FullCacheTier",
    "GenerationConfig",
    "HostConfig",
    "LOOKUP_DRAFTER",
    "LinkConfig",
    "MAX_AUTO_GAMMA1",
    "MAX_AUTO_GAMMA2",
    "Mode",
    "ModelConfig",
    "NEVER",
    "NO_DRAFTER",
    "Overlap",
    "PlacementConfig",
    "PlacementKind",
    "PromptConfig",
    "PromptTask",
    "PromptTemplate",
    "RetrievalCacheConfig",
    "RetrievalRuleName",
    "RunConfig",
    "STANDARD_INPUT",
    "SamplingConfig",
    "StreamingCacheConfig",
    "TiersConfig",
    "expand_home",
    "parse_auto_count",
    "require",
    "to_plain",
    "unescaped",
]


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
    """Folder of the run: result.json, rounds.jsonl, Hydra's record of the configuration. It is the run's alone while it
    runs: where another run is at work it is refused. What an earlier run left there is replaced."""

    def __post_init__(self) -> None:
        expand_home(self, "", "output")

    @property
    def uses_drafter(self) -> bool:
        """Whether level 1 takes part."""
        return (
            self.decoding.mode in (Mode.triforce, Mode.streaming)
            and self.model.drafter != NO_DRAFTER
            and self.decoding.gamma1 != 0
            and self.decoding.gamma2 != 0
        )

    @property
    def overlaps(self) -> bool:
        """Whether drafting goes on during verification."""
        drafts = self.uses_drafter or self.uses_retrieval
        return drafts and self.decoding.overlap is not Overlap.off

    @property
    def uses_retrieval(self) -> bool:
        """Whether level 2 takes part."""
        return (
            self.decoding.mode in (Mode.triforce, Mode.retrieval)
            and self.cache.retrieval.budget != 0
            and self.decoding.gamma2 != 0
        )


def to_plain(config: Any) -> Any:
    """A tree of dataclasses as JSON types."""
    if is_dataclass(config):
        return {item.name: to_plain(getattr(config, item.name)) for item in fields(config)}
    if isinstance(config, StrEnum):
        return str(config)
    if isinstance(config, list):
        return [to_plain(item) for item in config]
    return config
