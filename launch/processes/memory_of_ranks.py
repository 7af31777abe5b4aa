"""The memory plan of each process of a run; processes share what their node has."""

from __future__ import annotations

from dataclasses import replace

from conf.schema import RunConfig
from launch.assembly.engine import plan_input_for
from launch.assembly.sizing import FreeBytes, available_bytes
from launch.assembly.task import Task
from launch.processes.sites import RankSites
from tiers.planning.plan import MemoryPlan, drafter_plan, make_plan, retriever_plan, without_retrieval_cache
from workers.parallel.shard import Shard

NOTHING = FreeBytes(device=0, host=0, disk=0, device_is_host=True)
"""Free bytes for plans that only say what is needed; nothing is held against them."""


def plan_ranks(task: Task, sites: RankSites) -> dict[int, MemoryPlan]:
    """The plan of every rank that plays a role. Raises ConfigError where the verifier's part does not fit."""
    placement, cache = sites.placement, task.config.cache
    plans: dict[int, MemoryPlan] = {}
    if sites.is_retriever_apart:
        assert placement.drafter_rank is not None, "a retriever of its own has a drafter beside it"
        whole = plan_input_for(task, NOTHING)
        plans[placement.drafter_rank] = drafter_plan(whole, cache)
        has_weights = not sites.shares_weights
        plans[placement.retriever_ranks[0]] = retriever_plan(whole, cache, has_weights=has_weights)
    verifier = _verifier_plan(task, sites, plans)
    if sites.is_retriever_apart:
        verifier = without_retrieval_cache(verifier)
    return plans | dict.fromkeys(placement.verifier_ranks, verifier)


def _verifier_plan(task: Task, sites: RankSites, others: dict[int, MemoryPlan]) -> MemoryPlan:
    """The plan that all ranks of the verifier have: for rank 0, which has the most heads, in what the poorest has."""
    placement, prepared = sites.placement, task.prepared
    ranks = placement.verifier_ranks
    prepared = replace(
        prepared,
        target=prepared.target.sharded(Shard(0, len(ranks))),
        drafter=prepared.drafter if placement.drafter_rank in ranks else None,
    )
    left = [_left_for(rank, task.config, sites, others) for rank in ranks]
    poorest = FreeBytes(
        device=min(each.device for each in left),
        host=min(each.host for each in left),
        disk=min(each.disk for each in left),
        device_is_host=left[0].device_is_host,
    )
    return make_plan(plan_input_for(replace(task, prepared=prepared), poorest), task.config.cache)


def _left_for(rank: int, config: RunConfig, sites: RankSites, others: dict[int, MemoryPlan]) -> FreeBytes:
    """A verifier rank's part of what its node has, or of what the configuration allows, behind the others' plans."""
    usable = available_bytes(config.placement, sites.free[rank])
    site = sites.device_of_node(rank)
    beside = [other for other in sites.placement.verifier_ranks if sites.seats[other].node == sites.seats[rank].node]
    on_device = [other for other in beside if sites.devices[other] == sites.devices[rank]]
    taken = sum(plan.totals["device"] for other, plan in others.items() if sites.device_of_node(other) == site)
    of_host = usable.host - taken if usable.device_is_host else usable.host
    return FreeBytes(
        device=max(0, (usable.device - taken) // len(on_device)),
        host=max(0, of_host // len(beside)),
        disk=usable.disk // len(beside),
        device_is_host=usable.device_is_host,
    )
