"""The assignment of a worker process: what the orchestrator tells it to be."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from conf.schema import AUTO, Dtype, RunConfig
from launch.assembly.task import Task
from launch.processes.sites import RankSites
from orchestrator.placement import DRAFTER_ROLE, RETRIEVER_ROLE, VERIFIER_ROLE
from tiers.planning.plan import MemoryPlan
from workers.process.update_path import UpdatePath

LOGS = "logs"
"""Folder within a run's folder with a file for each worker process."""
RETRIEVAL_CACHE, WEIGHTS = "retrieval_cache", "weights"
"""Names of what processes share; see workers.messages.Built."""


class Assignment(msgspec.Struct, kw_only=True, frozen=True):
    """What one worker process is to be; it travels in a workers.messages.Build as plain JSON types."""

    rank: int
    roles: list[str]
    """Names of orchestrator.placement; none for a rank that the run's mode leaves idle."""
    device: str
    dtype: Dtype
    num_threads: int
    """Threads that it computes with on a CPU."""
    seed: int
    plan: MemoryPlan
    num_prompt_tokens: int
    max_new_tokens: int
    """Lengths of the task, on which rules of the model may depend; a restarted process begins with a longer prompt."""
    shard_rank: int = 0
    shard_size: int = 1
    """The part of the target that it has: number `shard_rank` of `shard_size`."""
    group: str = ""
    """A name that the ranks of a sharded model, and nobody else, have in common."""
    store: tuple[str, int] | None = None
    """Host and port where the ranks of a sharded model find each other."""
    same_host: bool = True
    """Whether all of them are on one machine."""
    start_timeout_s: float = 600.0
    stall_timeout_s: float = 60.0
    update_path: UpdatePath = UpdatePath.same_process
    gives_weights: bool = False
    """Whether a verifier shares its weights with a retriever on the same device, ..."""
    weights: dict[str, Any] | None = None
    """... which gets them by this description, of workers.models.shared_weights."""
    log: str | None = None
    """Path of a file for what this process has to say."""


def make_assignments(
    task: Task, sites: RankSites, plans: Mapping[int, MemoryPlan], store: tuple[str, int] | None
) -> dict[int, Assignment]:
    """The assignment of every rank that plays a role; `store` is where the ranks of a sharded model find each other."""
    config, placement = task.config, sites.placement
    group = secrets.token_hex(4)
    num_threads = _threads_each(task, sites)
    folder = Path(config.output).absolute() / LOGS
    assignments = {}
    for rank in placement.worker_ranks:
        roles = [role for role in placement.roles_of(rank) if _is_used(config, role)]
        is_verifier = rank in placement.verifier_ranks
        assignments[rank] = Assignment(
            rank=rank,
            roles=roles,
            device=sites.devices[rank],
            dtype=Dtype(str(task.prepared.target.dtype).removeprefix("torch.")),
            num_threads=num_threads,
            seed=task.seed,
            plan=plans[rank],
            num_prompt_tokens=task.num_prompt_tokens,
            max_new_tokens=task.max_new_tokens,
            shard_rank=placement.verifier_ranks.index(rank) if is_verifier else 0,
            shard_size=placement.tensor_parallel if is_verifier else 1,
            group=group,
            store=store,
            same_host=sites.is_verifier_on_one_node,
            start_timeout_s=config.placement.start_timeout_s,
            stall_timeout_s=config.placement.stall_timeout_s,
            update_path=sites.update_path,
            gives_weights=sites.shares_weights and VERIFIER_ROLE in roles,
            log=str(folder / f"rank{rank}-{'+'.join(roles) or 'idle'}.log"),
        )
    return assignments


def _is_used(config: RunConfig, role: str) -> bool:
    return {DRAFTER_ROLE: config.uses_drafter, RETRIEVER_ROLE: config.uses_retrieval}.get(role, True)


def _threads_each(task: Task, sites: RankSites) -> int:
    """Number of threads of each process.

    The ranks of a verifier must have as many each, for the same bits; what idles meanwhile costs nothing.
    """
    if task.config.placement.threads != AUTO:
        return int(task.config.placement.threads)
    return max(1, task.prepared.num_threads // sites.most_verifier_ranks_on_a_node)
