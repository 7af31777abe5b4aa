"""The engine of a run over several processes: what it needs of them, and what stands for their roles here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from conf.schema import RunConfig, to_plain
from launch.assembly.engine import make_hierarchy, make_pace
from launch.assembly.role_builder import disk_folder
from launch.assembly.sizing import FreeBytes, with_known_budget
from launch.assembly.task import Task
from launch.processes.assignment import WEIGHTS, Assignment, make_assignments
from launch.processes.company import Company
from launch.processes.memory_of_ranks import plan_ranks
from launch.processes.sites import RankSites
from orchestrator.calls import RunFailedError
from orchestrator.crew import Crew
from orchestrator.hierarchy import Hierarchy
from orchestrator.placement import RETRIEVER_ROLE, devices_for, sharing_notes
from orchestrator.remote_roles import RemoteDrafter, RemoteRetriever, RemoteVerifier
from tiers.planning.plan import MemoryPlan
from tiers.transfer import StreamStats
from workers.messages import Attach, Built, Plain, Result, Survey
from workers.parallel.shard import Shard
from workers.process.peers import PROCESS, peer_name


@dataclass(kw_only=True)
class RemoteEngine:
    """The launch.assembly.engine.Engine whose roles are in other processes."""

    hierarchy: Hierarchy
    notes: list[str]
    _crew: Crew
    _plans: dict[int, MemoryPlan]
    _reports: dict[int, dict[str, Any]] | None = None

    def on_prefill_progress(self, callback: Callable[[int, int], None]) -> None:
        """See Engine."""
        self._crew.on_progress = callback

    def reports(self) -> dict[int, dict[str, Any]]:
        """What every process that is there reports, by rank; they are asked once, at the end."""
        if self._reports is None:
            self._reports = self._crew.reports()
        return self._reports

    def memory_report(self) -> dict[str, dict[str, int]]:
        """Sums over all processes, for each tier."""
        reports = self.reports()
        return {
            tier: {
                "planned_bytes": sum(plan.totals[tier] for plan in self._plans.values()),
                "peak_bytes": sum(report["peak_bytes"][tier] for report in reports.values()),
            }
            for tier in ("device", "host", "disk")
        }

    def processes_report(self) -> list[dict[str, Any]]:
        """What each process is, and has; `last_failure` is why it was last out of order."""
        reports = self.reports()
        return [
            {
                "rank": rank,
                "roles": member.roles,
                "device": member.assignment["device"],
                "restarts": member.num_restarts,
                "failed_drafts": reports.get(rank, {}).get("failed_drafts", 0),
                "is_out_of_order": member.is_lost,
                "last_failure": member.why_lost or None,
                "planned_bytes": self._plans[rank].totals,
                "peak_bytes": reports.get(rank, {}).get("peak_bytes"),
            }
            for rank, member in self._crew.members.items()
        ]

    def streaming_report(self) -> dict[str, float | None]:
        """What all ranks of the verifier streamed; they do at the same time, so the seconds are the slowest one's."""
        parts = [report["streaming"] for report in self.reports().values() if "streaming" in report]
        if not parts:
            return {}
        total = {name: sum(part[name] for part in parts) for name in ("bytes", "damaged_blocks")}
        slowest = {name: max(part[name] for part in parts) for name in ("seconds", "stall_s")}
        stats = StreamStats(total["bytes"], slowest["seconds"], slowest["stall_s"])
        return {
            **total,
            **slowest,
            "gb_per_s": stats.gb_per_s,
            "overlap": stats.hidden_share,
            "emulated_link_gb_per_s": parts[0]["emulated_link_gb_per_s"],
        }

    def close(self) -> None:
        """Closes nothing: the processes are the company's to end."""


def build_remote(task: Task, company: Company) -> RemoteEngine:
    """Plans the memory of all processes, and has them load and allocate. Raises ConfigError, RunFailedError."""
    crew, placement = company.crew, company.placement
    pace = make_pace(task)
    config = with_known_budget(task.config, task.num_prompt_tokens, notes := list(task.prepared.notes))
    task = replace(task, config=config)
    task.prepared.target.sharded(Shard(0, placement.tensor_parallel))  # raises ConfigError for a size that is not legal
    crew.gather()
    sites = _survey(crew, config)
    plans = plan_ranks(task, sites)
    notes.append(plans[placement.verifier_ranks[0]].reason)
    notes += sharing_notes(placement, sites.seats, sites.devices, sites.ranks_with_mps)
    notes += [
        f"rank {rank} on {sites.devices[rank]}: {', '.join(placement.roles_of(rank))}"
        for rank in placement.worker_ranks
    ]
    store = company.store() if placement.tensor_parallel > 1 else None
    built = _build_all(crew, config, make_assignments(task, sites, plans, store))
    notes += sorted({note for each in built.values() for note in each.notes})
    if config.tiers.link.gb_per_s is not None:
        notes.append(f"the link from host to device is emulated: {config.tiers.link.gb_per_s:g} GB/s")

    def connect(of_retriever: Built) -> bool:
        """Has the verifier's ranks map the memory that a retriever shares; whether all of them could."""
        if not of_retriever.shared:
            return True
        peers = [peer_name(rank, PROCESS) for rank in placement.verifier_ranks]
        return all(_value(reply.result) for reply in crew.ask(peers, Attach(of_retriever.shared)))

    if config.uses_retrieval and not connect(built[placement.retriever_ranks[0]]):
        raise RunFailedError(RETRIEVER_ROLE, placement.retriever_ranks[0], "the verifier cannot map its memory")
    assert placement.drafter_rank is not None, "several processes have a rank for the drafter"
    hierarchy = make_hierarchy(
        task,
        pace=pace,
        verifier=RemoteVerifier(crew, placement.verifier_ranks),
        retriever=RemoteRetriever(crew, placement.retriever_ranks, connect) if config.uses_retrieval else None,
        drafter=RemoteDrafter(crew, placement.drafter_rank) if config.uses_drafter else None,
    )
    return RemoteEngine(hierarchy=hierarchy, notes=notes, _crew=crew, _plans=plans)


def _survey(crew: Crew, config: RunConfig) -> RankSites:
    """Has every process, all of which are there, say what is free where it runs. Raises ConfigError, RunFailedError."""
    placement, folder = crew.placement, str(disk_folder(config).absolute())
    seats = {rank: member.seat for rank, member in crew.members.items() if member.seat is not None}
    devices = devices_for(placement, seats, config.placement.device)
    found = {
        rank: _value(crew.wait(crew.post(peer_name(rank, PROCESS), Survey(devices[rank], folder)), crew.limits.start_s))
        for rank in placement.worker_ranks
    }
    free = {
        rank: FreeBytes(
            device=each["device"], host=each["host"], disk=each["disk"], device_is_host=devices[rank] == "cpu"
        )
        for rank, each in found.items()
    }
    ranks_with_mps = frozenset(rank for rank, each in found.items() if each["has_mps"])
    return RankSites(placement=placement, seats=seats, devices=devices, free=free, ranks_with_mps=ranks_with_mps)


def _build_all(crew: Crew, config: RunConfig, assignments: dict[int, Assignment]) -> dict[int, Built]:
    """What all processes built, by rank.

    A retriever that takes a verifier's weights is built behind it, everything else at once.
    """
    told = to_plain(replace(config, output=str(Path(config.output).absolute())))
    givers = [rank for rank, assignment in assignments.items() if assignment.gives_weights]
    takers = crew.placement.retriever_ranks if givers else ()
    plain = {rank: msgspec.to_builtins(assignment) for rank, assignment in assignments.items()}
    built = crew.build(told, {rank: assignment for rank, assignment in plain.items() if rank not in takers})
    for rank in takers:
        plain[rank]["weights"] = built[givers[0]].shared[WEIGHTS]
        built |= crew.build(told, {rank: plain[rank]})
    return built


def _value(result: Result) -> Any:
    """The value of a result of JSON types."""
    assert isinstance(result, Plain), f"{result} is no plain value"
    return result.value
