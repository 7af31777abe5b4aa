"""Runs of the real engine on tiny checkpoints, in this process."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from conf.schema import (
    CacheConfig,
    ChunkDtype,
    DecodingConfig,
    DiskConfig,
    Dtype,
    FullCacheConfig,
    FullCacheTier,
    GenerationConfig,
    Mode,
    ModelConfig,
    PlacementConfig,
    RetrievalCacheConfig,
    RetrievalRuleName,
    RunConfig,
    SamplingConfig,
    StreamingCacheConfig,
    TiersConfig,
)
from launch.assembly.engine import LocalEngine, build
from launch.assembly.prepare import Prepared, prepare
from launch.assembly.task import Task
from orchestrator.hierarchy import Hierarchy
from orchestrator.rebuild_policy import RebuildPolicy
from orchestrator.round import Round
from orchestrator.session import Session
from orchestrator.text_stream import TextStream

CHUNK = 8
BLOCK_TOKENS = 16
DEVICE, HOST, DISK = FullCacheTier.device, FullCacheTier.host, FullCacheTier.disk
GREEDY = SamplingConfig(temperature=0.0)
ALL = 4096
"""A budget beyond every prompt here: the retrieval cache holds the whole context."""


def tiny_run(
    target: Path | str,
    drafter: Path | str = "none",
    mode: Mode = Mode.triforce,
    tier: FullCacheTier = DEVICE,
    *,
    gamma1: int = 2,
    gamma2: int = 6,
    budget: int = 4 * CHUNK,
    rebuild: str = "adaptive",
    rule: RetrievalRuleName = RetrievalRuleName.attention,
    chunk_dtype: ChunkDtype = ChunkDtype.auto,
    summary_tokens: int = 2 * CHUNK,
    sinks: int = 4,
    window: int = 40,
    sampling: SamplingConfig = GREEDY,
    dtype: Dtype = Dtype.float32,
    ignore_eos: bool = True,
    self_check: bool = True,
) -> RunConfig:
    """A configuration with caches so small that blocks stream, chunks are chosen and windows slide."""
    return RunConfig(
        model=ModelConfig(target=str(target), drafter=str(drafter), dtype=dtype, self_check=self_check),
        decoding=DecodingConfig(mode=mode, gamma1=gamma1, gamma2=gamma2),
        cache=CacheConfig(
            full=FullCacheConfig(tier=tier, block_tokens=str(BLOCK_TOKENS)),
            retrieval=RetrievalCacheConfig(
                budget=budget,
                chunk_size=CHUNK,
                rebuild=rebuild,
                rule=rule,
                dtype=chunk_dtype,
                summary_tokens=summary_tokens,
            ),
            streaming=StreamingCacheConfig(sinks=sinks, window=window),
        ),
        sampling=sampling,
        generation=GenerationConfig(ignore_eos=ignore_eos),
        placement=PlacementConfig(device="cpu"),
        tiers=TiersConfig(disk=DiskConfig(readers="3")),
        output=tempfile.gettempdir(),  # where files of the disk tier are, without a name
    )


@dataclass
class Generated:
    """What a run gave."""

    tokens: list[int]
    rounds: list[Round]
    finish_reason: str
    num_streamed_bytes: int

    @property
    def num_proposed(self) -> int:
        return sum(len(record.proposed) for record in self.rounds)

    @property
    def num_accepted(self) -> int:
        return sum(record.num_accepted for record in self.rounds)

    @property
    def inner_steps(self) -> list[tuple[int, int]]:
        return [step for record in self.rounds for step in record.inner_steps]


def task_for(
    config: RunConfig, prompt: list[int], num_tokens: int, seed: int = 0, prepared: Prepared | None = None
) -> Task:
    """The task of a run; `prepared` if it is not what the configuration says."""
    return Task(
        config=config,
        prepared=prepared or prepare(config),
        prompt_ids=prompt,
        max_new_tokens=num_tokens,
        seed=seed,
    )


@contextmanager
def engine_for(
    config: RunConfig, prompt: list[int], num_tokens: int, seed: int = 0, prepared: Prepared | None = None
) -> Iterator[LocalEngine]:
    """The engine of a task (see `task_for`), closed at the end."""
    built = build(task_for(config, prompt, num_tokens, seed, prepared))
    try:
        yield built
    finally:
        built.close()


def run_to_end(hierarchy: Hierarchy) -> list[Round]:
    rounds = [hierarchy.start()]
    while not hierarchy.session.is_finished:
        rounds.append(hierarchy.round())
    return rounds


def generate(
    config: RunConfig, prompt: list[int], num_tokens: int, seed: int = 0, prepared: Prepared | None = None
) -> Generated:
    """The whole text of a task; see `task_for`."""
    with engine_for(config, prompt, num_tokens, seed, prepared) as built:
        rounds = run_to_end(built.hierarchy)
        session = built.hierarchy.session
        num_bytes = int(built.streaming_report()["bytes"])
        return Generated(session.generated, rounds, session.finish_reason, num_bytes)


def next_session(hierarchy: Hierarchy, prompt: list[int], num_tokens: int, rebuild: str = "adaptive") -> Hierarchy:
    """The same roles, with what their caches hold, before another prompt."""
    session = Session(prompt=prompt, max_new_tokens=num_tokens, text_stream=TextStream(lambda ids: ""))
    policy = RebuildPolicy(int(rebuild) if rebuild.isdigit() else rebuild)
    return replace(hierarchy, session=session, num_rounds=0, rebuild_policy=policy)
