"""Times messages between processes: python -m torch.distributed.run --nproc-per-node=4 -m launch.measure.messages

A real pipeline whose roles compute nothing: what is left of an inner step, in which the orchestrator asks the drafter,
then the retriever, is what the processes cost. On a busy machine the figures show the scheduler's time slices: read
them when nothing else runs.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from conf.schema import PlacementConfig, PlacementKind, RunConfig
from launch.assembly.start_checks import world_size
from launch.processes import guard, worker_process
from orchestrator.placement import place
from orchestrator.remote_roles import RemoteDrafter, RemoteRetriever
from workers.messages import DRAFTER, RETRIEVAL, Draft, InnerStep

GAMMA1 = 2
VOCABULARIES = (0, 2048, 32_000, 128_256)
"""Of the distributions that go with drafts under the maximal coupling; 0: token ids alone, as under gumbel."""
WARM_UP, REPETITIONS = 50, 500


class InstantRole:
    """Drafts and verifies whatever is there already."""

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
    """See workers.process.worker.RoleSet."""

    def __init__(self, config: dict[str, Any], assignment: dict[str, Any]):
        torch.set_num_threads(1)
        self.roles = {name: InstantRole(assignment["vocab_size"]) for name in assignment["roles"]}
        self.notes, self.shared, self.is_first_shard, self.device = [], {}, True, torch.device("cpu")

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


def measure() -> None:
    from launch.processes.company import Company

    placement = place(PlacementConfig(kind=PlacementKind.pipeline), world_size())
    company = Company(RunConfig(), placement, print)
    company.start()
    try:
        company.crew.gather()
        print("| tokens with | ask the drafter | ask the retriever | both: an inner step | 95 % below |")
        print("|---|---|---|---|---|")
        for vocab_size in VOCABULARIES:
            print(_row(company.crew, placement, vocab_size), flush=True)
    finally:
        company.close()


def _row(crew, placement, vocab_size: int) -> str:
    assignments = {
        rank: {"roles": placement.roles_of(rank), "vocab_size": vocab_size, "device": "cpu"}
        for rank in placement.worker_ranks
    }
    crew.build({}, assignments)
    drafter = RemoteDrafter(crew, placement.drafter_rank)
    retriever = RemoteRetriever(crew, placement.retriever_ranks, lambda built: True)
    draft = drafter.propose([], GAMMA1)
    ways: list[Callable[[], Any]] = [
        lambda: drafter.propose([1] * 6, GAMMA1),
        lambda: retriever.extend([1] * 6, draft),
        lambda: retriever.extend([1] * 6, drafter.propose([1] * 6, GAMMA1)),
    ]
    times = [_milliseconds(way) for way in ways]
    medians = [f"{statistics.median(of):.3f} ms" for of in times]
    what = f"distributions over {vocab_size:,}" if vocab_size else "ids alone"
    return f"| {what} | {' | '.join(medians)} | {statistics.quantiles(times[-1], n=20)[-1]:.3f} ms |"


def _milliseconds(call: Callable[[], Any]) -> list[float]:
    times = []
    for _ in range(WARM_UP + REPETITIONS):
        began = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - began))
    return times[WARM_UP:]


def main() -> int:
    if guard.PIPE in os.environ or guard.ENDPOINTS in os.environ:
        return worker_process.main(InstantRoles)
    if os.environ["RANK"] != "0":
        return guard.Guard(PlacementConfig().start_timeout_s, worker_module="launch.measure.messages").run()
    measure()
    return 0


if __name__ == "__main__":
    sys.exit(main())
