"""The configuration of launch/bench.py: a run, what is to be measured of it, and what it is held against. No torch."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field, fields

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.schema import (
    STANDARD_INPUT,
    ConfigError,
    Dtype,
    FullCacheTier,
    GenerationConfig,
    Mode,
    PlacementKind,
    RunConfig,
    require,
)
from launch.command_line.overrides import check_override, compose_program, parse_override

PEER_NAMES = (
    *("transformers", "transformers_static", "transformers_offloaded", "assisted", "prompt_lookup"),
    *("llama_cpp", "llama_cpp_lookup"),
)
COMMON_KEYS = (
    *("sampling.temperature", "sampling.top_", "sampling.seed", "prompt", "generation", "model.target"),
    *("model.dtype", "model.max_positions", "placement", "output"),
)
"""Beginnings of the keys that all contenders have in common: a comparison of anything else is none."""
SCHEDULES = ("constant", "heuristic", "heuristic_transient")


@dataclass(kw_only=True, slots=True)
class GridConfig:
    """Each context in each tier, and where keys and values stream, over each link: a cell of the grid."""

    contexts: list[int] = field(default_factory=lambda: [8192])
    """Tokens in all: the prompt is so much shorter that what is generated fits."""
    tiers: list[FullCacheTier] = field(default_factory=lambda: [FullCacheTier.device])
    """Tiers of our full cache. Peers have theirs on the device, and run in that tier's cells (and in those of auto)."""
    links_gb_per_s: list[float | None] = field(default_factory=lambda: [None])
    """Emulated links to the device, for the tiers that stream; null: the machine's own."""

    def __post_init__(self) -> None:
        legal = bool(self.contexts) and all(context >= 2 for context in self.contexts)
        require(legal, "grid.contexts", self.contexts, "a list of numbers of tokens, for example [8192,32768]")
        require(bool(self.tiers), "grid.tiers", self.tiers, "a list of tiers, for example [device,host]")
        legal = bool(self.links_gb_per_s) and all(link is None or link > 0 for link in self.links_gb_per_s)
        require(legal, "grid.links_gb_per_s", self.links_gb_per_s, "a list like [null,2]: null, or above 0")

    def cells(self) -> list[tuple[int, FullCacheTier, float | None]]:
        """Every (context, tier, link); only what may stream has a link."""
        return [
            (context, tier, link)
            for context in self.contexts
            for tier in self.tiers
            for link in ([None] if tier is FullCacheTier.device else self.links_gb_per_s)
        ]


@dataclass(kw_only=True, slots=True)
class PeerSettings:
    """Knobs of the peers."""

    num_assistant_tokens: int = 5
    """Tokens that the assistant drafts at a time, with its schedule `num_assistant_tokens_schedule`."""
    num_assistant_tokens_schedule: str = "constant"
    """constant, heuristic or heuristic_transient."""
    assistant_confidence_threshold: float = 0.4
    """The assistant stops drafting below it; 0: never."""
    prompt_lookup_num_tokens: int = 10
    """Tokens that prompt lookup drafts at a time, in transformers and in llama.cpp."""
    llama_cpp_weights: Dtype = Dtype.auto
    """Type of the matrices in the GGUF file; auto: as the run's."""

    def __post_init__(self) -> None:
        for key in ("num_assistant_tokens", "prompt_lookup_num_tokens"):
            require(getattr(self, key) >= 1, f"peer.{key}", getattr(self, key), ">= 1, for example 10")
        schedule, threshold = self.num_assistant_tokens_schedule, self.assistant_confidence_threshold
        rule = f"one of {', '.join(SCHEDULES)}"
        require(schedule in SCHEDULES, "peer.num_assistant_tokens_schedule", schedule, rule)
        require(0 <= threshold <= 1, "peer.assistant_confidence_threshold", threshold, "between 0 and 1")


@dataclass(kw_only=True, slots=True)
class BenchConfig(RunConfig):
    """A run, as often as there are contenders."""

    generation: GenerationConfig = field(
        default_factory=lambda: GenerationConfig(max_new_tokens=48, ignore_eos=True, use_model_rules=False)
    )
    """Its max_new_tokens are those of one repetition."""
    contenders: dict[str, str] = field(default_factory=dict)
    """Contenders of our engine, by name: overrides of the run, separated by spaces. One called as a mode has it."""
    peers: list[str] = field(default_factory=list)
    """Some of PEER_NAMES."""
    peer: PeerSettings = field(default_factory=PeerSettings)
    only: list[str] = field(default_factory=list)
    """Names of the contenders and peers that run; none: all."""
    repetitions: int = 3
    """Turns of each contender that are counted; one before them is the warm-up."""
    grid: GridConfig = field(default_factory=GridConfig)

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        legal = self.prompt.path != STANDARD_INPUT
        require(legal, "prompt.path", self.prompt.path, "a file, which each cell reads anew, for example book.txt")
        for name in self.peers:
            require(name in PEER_NAMES, "peers", name, f"a list of some of {', '.join(PEER_NAMES)}")
        for name in self.contenders:
            require(name not in PEER_NAMES, "contenders", name, "a name that no peer has")
        names = [*self.contenders, *self.peers]
        for name in self.only:
            require(name in names, "only", name, f"a list of some of {', '.join(names)}")
        require(self.repetitions >= 1, "repetitions", self.repetitions, ">= 1, for example 3")
        legal = self.placement.kind in (PlacementKind.auto, PlacementKind.inline)
        require(legal, "placement.kind", self.placement.kind, "auto or inline: all contenders run in one process")
        generation, peer = self.generation, self.peer
        require(not generation.stop, "generation.stop", generation.stop, "empty: all contenders write as much")
        require(generation.ignore_eos, "generation.ignore_eos", False, "true: all contenders write as much")
        require(not generation.use_model_rules, "generation.use_model_rules", True, "false: no peer applies them")
        of_peers = (peer.num_assistant_tokens + 1, peer.prompt_lookup_num_tokens + 1)
        most = max(*of_peers, *map(most_per_round, self.runs_of_ours().values()))
        rule = f"above {most}, what a round of some contender may bring"
        legal = generation.max_new_tokens > most
        require(legal, "generation.max_new_tokens", generation.max_new_tokens, rule)

    @property
    def run_config(self) -> RunConfig:
        """The run that contenders change: the keys that launch/run.py has, too."""
        return RunConfig(**{item.name: getattr(self, item.name) for item in fields(RunConfig)})

    def runs_of_ours(self, base: RunConfig | None = None) -> dict[str, RunConfig]:
        """The run of each of our contenders, by name; `base` is what they change. Raises ConfigError."""
        base = base or self.run_config
        return {name: contender_config(name, text, base) for name, text in self.contenders.items() if self.runs(name)}

    def runs(self, name: str) -> bool:
        """Whether `only` lets this contender or peer take part."""
        return not self.only or name in self.only


ConfigStore.instance().store(name="bench_schema", node=BenchConfig)


def read_bench_config(overrides: list[str]) -> BenchConfig:
    """The configuration that these overrides make. Raises ConfigError."""
    keys = "conf/schema.py, launch/benchmark/config.py"
    config = compose_program("bench", [_with_plus(text) for text in overrides], keys)
    assert isinstance(config, BenchConfig)
    return config


def _with_plus(text: str) -> str:
    """An override in Hydra's grammar, which wants a plus before a new name."""
    return f"++{text}" if text.startswith("contenders.") else text


def most_per_round(config: RunConfig) -> int:
    """Tokens that one round can bring at most."""
    return config.decoding.most_gamma1 + config.decoding.most_gamma2 + 1


def contender_config(name: str, overrides: str, base: RunConfig) -> RunConfig:
    """`base` with the changes of one contender. Raises ConfigError."""
    given = [f"decoding.mode={name}"] if name in list(Mode) else []
    config, parsed = OmegaConf.structured(base), None
    try:
        for text in given + shlex.split(overrides):
            parsed = parse_override(text)
            check_override(parsed)
            if parsed.key_or_group.startswith(COMMON_KEYS):
                raise ConfigError(f"{text!r} would make it another task; set it for all contenders")
            OmegaConf.update(config, parsed.key_or_group, parsed.value())
        changed = OmegaConf.to_object(config)
    except (ConfigError, ValueError, OmegaConfBaseException) as error:
        raise ConfigError(f"contenders.{name} is {overrides!r}: {error}") from None
    assert isinstance(changed, RunConfig)
    return changed
