"""Times messages between processes: python -m torch.distributed.run --nproc-per-node=4 -m launch.measure.messages

A real pipeline whose roles compute nothing: what is left of an inner step, in which the orchestrator asks the drafter,
then the retriever, is what the processes cost. On a busy machine the figures show the scheduler's time slices: read
them when nothing else runs. Keys, as key=value: conf/measure_messages.yaml and `MeasureMessagesConfig`. Exit codes: 0
measured; 2 a bad configuration; 130 interrupted.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hydra.core.config_store import ConfigStore

from conf.schema import PlacementConfig, PlacementKind, RunConfig, require
from launch.assembly.start_checks import world_size
from launch.command_line.cluster import read_place
from launch.command_line.outcome import ExitCode
from launch.command_line.overrides import compose_program
from launch.command_line.program import program
from launch.command_line.tables import markdown_head, markdown_row
from launch.command_line.timing import repeated_seconds
from launch.processes import guard, worker_process
from orchestrator.crew import Crew
from orchestrator.placement import Placement, place
from orchestrator.remote_roles import RemoteDrafter, RemoteRetriever
from workers.messages import DRAFTER, RETRIEVAL, Draft, InnerStep

GAMMA1 = 2
CONTEXT = [1] * 6
"""Tokens that each call comes after."""
HEADS = ("tokens with", "ask the drafter", "ask the retriever", "both: an inner step", "95 % below")


@dataclass(kw_only=True, slots=True)
class MeasureMessagesConfig:
    """Messages to time."""

    vocabularies: list[int] = field(default_factory=lambda: [0, 2048, 32_000, 128_256])
    """Sizes of the distributions that go with drafts under the maximal coupling; 0: ids alone, as under gumbel."""
    warm_up: int = 50
    """Calls that are not counted."""
    repetitions: int = 500

    def __post_init__(self) -> None:
        legal = bool(self.vocabularies) and min(self.vocabularies) >= 0
        require(legal, "vocabularies", self.vocabularies, "sizes >= 0, for example [0,32000]")
        require(self.warm_up >= 0, "warm_up", self.warm_up, ">= 0")
        require(self.repetitions >= 2, "repetitions", self.repetitions, ">= 2")


ConfigStore.instance().store(name="measure_messages_schema", node=MeasureMessagesConfig)


class InstantRole:
    """A drafter and retriever that has its answers already."""

    def __init__(self, vocab_size: int):
        probs = [torch.full((vocab_size,), 1 / vocab_size) for _ in range(GAMMA1 + 1)] if vocab_size else None
        self._draft = Draft(tokens=[1] * GAMMA1, origins=[DRAFTER] * GAMMA1, probs=probs and probs[:GAMMA1])
        kept = Draft(tokens=[1] * (GAMMA1 + 1), origins=[RETRIEVAL] * (GAMMA1 + 1), probs=probs)
        self._step = InnerStep(draft=kept, num_proposed=GAMMA1, num_accepted=GAMMA1)

    def propose(self, after: list[int], count: int, branch: int) -> Draft:
        return self._draft

    def extend(self, after: list[int], draft: Draft, branch: int) -> InnerStep:
        return self._step


class InstantRoles:
    """The roles of one process, as a workers.process.worker.RoleSet."""

    def __init__(self, config: dict[str, Any], assignment: dict[str, Any]):
        torch.set_num_threads(1)
        self.roles = {name: InstantRole(assignment["vocab_size"]) for name in assignment["roles"]}
        self.is_first_shard, self.device = True, torch.device("cpu")
        self.notes: list[str] = []
        self.shared: dict[str, Any] = {}

    def attach(self, shared: dict[str, Any]) -> bool:
        return True

    def report(self) -> dict[str, Any]:
        return {}

    def progress(self) -> tuple[int, int, int]:
        return time.monotonic_ns(), 0, 0

    def waits_for_others(self) -> bool:
        return False

    def close(self) -> None:
        """Nothing is open."""


def measure(config: MeasureMessagesConfig) -> None:
    """Starts the pipeline and prints a row for each size of a vocabulary."""
    from launch.processes.company import Company

    placement = place(PlacementConfig(kind=PlacementKind.pipeline), world_size())
    company = Company(RunConfig(), placement, print)
    company.start()
    try:
        company.crew.gather()
        print(markdown_head(HEADS))
        for vocab_size in config.vocabularies:
            print(markdown_row(_cells(company.crew, placement, vocab_size, config)), flush=True)
    finally:
        company.close()


def _cells(crew: Crew, placement: Placement, vocab_size: int, config: MeasureMessagesConfig) -> list[str]:
    assignments = {
        rank: {"roles": placement.roles_of(rank), "vocab_size": vocab_size, "device": "cpu"}
        for rank in placement.worker_ranks
    }
    crew.build({}, assignments)
    assert placement.drafter_rank is not None
    drafter = RemoteDrafter(crew, placement.drafter_rank)
    retriever = RemoteRetriever(crew, placement.retriever_ranks, lambda built: True)
    draft = drafter.propose([], GAMMA1)
    ways: list[Callable[[], Any]] = [
        lambda: drafter.propose(CONTEXT, GAMMA1),
        lambda: retriever.extend(CONTEXT, draft),
        lambda: retriever.extend(CONTEXT, drafter.propose(CONTEXT, GAMMA1)),
    ]
    times = [repeated_seconds(way, config.repetitions, warm_up=config.warm_up) for way in ways]
    seconds = [*map(statistics.median, times), statistics.quantiles(times[-1], n=20)[-1]]
    what = f"distributions over {vocab_size:,}" if vocab_size else "ids alone"
    return [what, *(f"{1e3 * each:.3f} ms" for each in seconds)]


@program
def main(argv: list[str]) -> int:
    if guard.PIPE in os.environ or guard.ENDPOINTS in os.environ:
        return worker_process.main(InstantRoles)
    if read_place(os.environ).rank != 0:
        return guard.Guard(PlacementConfig().start_timeout_s, worker_module="launch.measure.messages").run()
    measure(compose_program("measure_messages", argv, "launch/measure/messages.py"))
    return ExitCode.done


if __name__ == "__main__":
    sys.exit(main())
