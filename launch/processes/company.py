"""Puts a run together over several processes: their devices and memory plans, and what stands for their roles here."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import torch.distributed as dist

from conf.schema import RunConfig, to_plain
from launch.assembly.engine import Prepared, make_hierarchy, make_pace, make_session, plan_input_for
from launch.assembly.role_builder import disk_folder, overlap
from launch.assembly.sizing import FreeBytes, available_bytes, with_known_budget
from launch.processes.guard import CLOSING_SECONDS, ENDPOINTS
from launch.processes.rendezvous import publish_endpoints
from launch.processes.worker_process import WEIGHTS, Assignment
from orchestrator.crew import PROCESS, Crew, RunFailedError, TimeLimits
from orchestrator.hierarchy import Hierarchy
from orchestrator.placement import RETRIEVER_ROLE, VERIFIER_ROLE, Placement, Seat, devices_for, sharing_notes
from orchestrator.remote_roles import RemoteDrafter, RemoteRetriever, RemoteVerifier
from tiers.planning.plan import MemoryPlan, drafter_plan, make_plan, retriever_plan, without_retrieval_cache
from workers.messages import Attach, Built, Survey
from workers.parallel.shard import Shard
from workers.process.channel import Endpoints, Hub

GUARD_PROGRAM = Path(__file__).with_name("guard.py")
LOGS = "logs"
PATIENCE_SECONDS = 2.0


class Company:
    """The processes of a run, from the first greeting to the last: the crew, and what it takes to have one."""

    def __init__(
        self,
        config: RunConfig,
        placement: Placement,
        note: Callable[[str], None],
        look_around: Callable[[], None] = lambda: None,
    ):
        """`look_around` is called regularly, and may raise to leave what is waited for."""
        self.placement = placement
        # Ranks of other nodes reach the orchestrator by the address that they found torchrun's store at.
        is_one_node = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
        self._host = None if is_one_node else os.environ["MASTER_ADDR"]
        self._hub = Hub(secrets.token_hex(16), self._host)
        self._guards: list[subprocess.Popen] = []
        self._store: dist.TCPStore | None = None
        self._meeting_place: dist.Store | None = None
        limits = TimeLimits(
            start_s=config.placement.start_timeout_s,
            stall_s=config.placement.stall_timeout_s,
            draft_s=config.placement.draft_timeout_s,
        )
        self.crew = Crew(self._hub, placement, limits, note)
        self.crew.look_around = self._look_around
        self._start_s, self._look_elsewhere = config.placement.start_timeout_s, look_around

    @property
    def endpoints(self) -> Endpoints:
        return self._hub.endpoints

    def start(self) -> None:
        """Tells the other ranks where to come; a role of this rank gets a process of its own, too."""
        if 0 in self.placement.worker_ranks:
            environment = os.environ | {ENDPOINTS: msgspec.json.encode(self.endpoints).decode(), "RANK": "0"}
            self._guards.append(
                subprocess.Popen([sys.executable, str(GUARD_PROGRAM)], env=environment, start_new_session=True)
            )
        if len(self.placement.worker_ranks) > len(self._guards):
            self._meeting_place = publish_endpoints(self.endpoints, self._start_s)

    def _look_around(self) -> None:
        """torchrun looks after the guards of other ranks."""
        self._look_elsewhere()
        for guard in self._guards:
            if (exit_code := guard.poll()) is not None:
                raise RunFailedError("+".join(self.placement.roles_of(0)), 0, f"its guard ended with code {exit_code}")

    def store(self) -> tuple[str, int]:
        """Where the ranks of a sharded model find each other."""
        if self._store is None:
            host = self._host or "127.0.0.1"
            self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        return self._store.host, self._store.port

    def build(self, config: RunConfig, prepared: Prepared, prompt_ids, max_new_tokens: int, seed: int) -> RemoteEngine:
        """See `build_remote`."""
        return build_remote(config, prepared, prompt_ids, max_new_tokens, seed, self)

    def close(self, *, at_once: bool = False) -> None:
        """Ends all of them."""
        self.crew.close(at_once=at_once)
        for guard in self._guards:
            with suppress(subprocess.TimeoutExpired):
                guard.wait(0 if at_once else CLOSING_SECONDS + PATIENCE_SECONDS)
            guard.kill()  # and its worker with it, whatever state they are in
            guard.wait()


@dataclass(kw_only=True)
class RemoteEngine:
    """See launch.assembly.engine.Engine."""

    hierarchy: Hierarchy
    notes: list[str]
    _crew: Crew
    _plans: dict[int, MemoryPlan]
    _reports: dict[int, dict[str, Any]] | None = None

    def on_prefill_progress(self, callback: Callable[[int, int], None]) -> None:
        self._crew.on_progress = callback

    def reports(self) -> dict[int, dict[str, Any]]:
        """Of every process that is there; asked for once, at the end."""
        if self._reports is None:
            self._reports = self._crew.reports()
        return self._reports

    def memory_report(self) -> dict[str, Any]:
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
        """What each process is, and has; of one that is out of order: why it was the last time."""
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

    def streaming_report(self) -> dict[str, Any]:
        """Of all ranks of the verifier, which stream at the same time: the seconds are those of the slowest."""
        parts = [report["streaming"] for report in self.reports().values() if "streaming" in report]
        if not parts:
            return {}
        total = {name: sum(part[name] for part in parts) for name in ("bytes", "damaged_blocks")}
        slowest = {name: max(part[name] for part in parts) for name in ("seconds", "stall_s")}
        rate = total["bytes"] / slowest["seconds"] / 1e9 if slowest["seconds"] else 0.0
        return (
            total
            | slowest
            | {
                "gb_per_s": rate,
                "overlap": overlap(slowest["seconds"], slowest["stall_s"]),
                "emulated_link_gb_per_s": parts[0]["emulated_link_gb_per_s"],
            }
        )

    def close(self) -> None:
        """The processes are the company's to end."""


def build_remote(
    config: RunConfig, prepared: Prepared, prompt_ids: list[int], max_new_tokens: int, seed: int, company: Company
) -> RemoteEngine:
    """Plans the memory of all processes, and has them load and allocate. Raises ConfigError, RunFailedError."""
    crew, placement = company.crew, company.placement
    pace = make_pace(config, len(prompt_ids))
    config = with_known_budget(config, len(prompt_ids), notes := list(prepared.notes))
    shard_size = placement.tensor_parallel
    prepared.target.sharded(Shard(0, shard_size))  # raises ConfigError for a size that is not legal
    crew.gather()
    seats = {rank: member.seat for rank, member in crew.members.items()}
    devices = devices_for(placement, seats, config.placement.device)
    free = {
        rank: crew.wait(
            crew.post(f"{rank}.{PROCESS}", Survey(devices[rank], str(disk_folder(config).absolute()))),
            crew.limits.start_s,
        ).value
        for rank in placement.worker_ranks
    }
    sizes = {"max_tokens": len(prompt_ids) + max_new_tokens, "max_new_tokens": max_new_tokens}
    plans = _Planner(config, prepared, placement, seats, devices, free, sizes).plans()
    notes.append(plans[placement.verifier_ranks[0]].reason)
    notes += sharing_notes(placement, seats, devices, [rank for rank in free if free[rank]["has_mps"]])
    notes += [
        f"rank {rank} on {devices[rank]}: {', '.join(placement.roles_of(rank))}" for rank in placement.worker_ranks
    ]
    assignments = _assignments(config, prepared, company, seats, devices, plans, seed, max_new_tokens)
    absolute = replace(config, output=str(Path(config.output).absolute()))
    built = _build_all(crew, placement, to_plain(absolute), assignments)
    notes += sorted({note for each in built.values() for note in each.notes})
    if config.tiers.link.gb_per_s is not None:
        notes.append(f"the link from host to device is emulated: {config.tiers.link.gb_per_s:g} GB/s")

    def connect(of_retriever: Built) -> bool:
        if not of_retriever.shared:
            return True
        peers = [f"{rank}.{PROCESS}" for rank in placement.verifier_ranks]
        return all(reply.result.value for reply in crew.ask(peers, Attach(of_retriever.shared)))

    if config.uses_retrieval and not connect(built[placement.retriever_ranks[0]]):
        raise RunFailedError(RETRIEVER_ROLE, placement.retriever_ranks[0], "the verifier cannot map its memory")
    hierarchy = make_hierarchy(
        config,
        make_session(config, prepared, prompt_ids, max_new_tokens),
        pace=pace,
        verifier=RemoteVerifier(crew, placement.verifier_ranks),
        retriever=RemoteRetriever(crew, placement.retriever_ranks, connect) if config.uses_retrieval else None,
        drafter=RemoteDrafter(crew, placement.drafter_rank) if config.uses_drafter else None,
    )
    return RemoteEngine(hierarchy=hierarchy, notes=notes, _crew=crew, _plans=plans)


def _build_all(
    crew: Crew, placement: Placement, config: dict[str, Any], assignments: dict[int, dict[str, Any]]
) -> dict[int, Built]:
    """A retriever that takes a verifier's weights is built behind it, everything else at once."""
    takers = []
    if assignments[placement.verifier_ranks[0]]["gives_weights"]:
        takers = list(placement.retriever_ranks)
    built = crew.build(config, {rank: told for rank, told in assignments.items() if rank not in takers})
    for rank in takers:
        assignments[rank]["weights"] = built[placement.verifier_ranks[0]].shared[WEIGHTS]
        built |= crew.build(config, {rank: assignments[rank]})
    return built


# ---- What each process is told. ----


def _assignments(config, prepared, company, seats, devices, plans, seed, max_new_tokens) -> dict[int, dict[str, Any]]:
    placement, shard_size = company.placement, company.placement.tensor_parallel
    group = secrets.token_hex(4)
    is_one_machine = len({seats[rank].node for rank in placement.verifier_ranks}) == 1
    path = _update_path(placement, seats, devices)
    threads = _threads_each(config, prepared, placement, seats)
    folder = Path(config.output).absolute() / LOGS
    assignments = {}
    for rank in placement.worker_ranks:
        roles = [role for role in placement.roles_of(rank) if _is_used(config, role)]
        shard = placement.verifier_ranks.index(rank) if rank in placement.verifier_ranks else None
        assignment = Assignment(
            rank=rank,
            roles=roles,
            device=devices[rank],
            dtype=str(prepared.target.dtype).removeprefix("torch."),
            num_threads=threads,
            seed=seed,
            max_new_tokens=max_new_tokens,
            plan=plans[rank],
            shard_rank=shard or 0,
            shard_size=1 if shard is None else shard_size,
            group=group,
            store=company.store() if shard_size > 1 else None,
            same_host=is_one_machine,
            start_timeout_s=config.placement.start_timeout_s,
            stall_timeout_s=config.placement.stall_timeout_s,
            update_path=path,
            # A part of the weights is of no use to a retriever that has all of them.
            gives_weights=path == "shared_memory" and shard_size == 1 and VERIFIER_ROLE in roles,
            log=str(folder / f"rank{rank}-{'+'.join(roles) or 'idle'}.log"),
        )
        assignments[rank] = msgspec.to_builtins(assignment)
    return assignments


def _is_used(config: RunConfig, role: str) -> bool:
    return {"drafter": config.uses_drafter, "retriever": config.uses_retrieval}.get(role, True)


def _update_path(placement: Placement, seats: dict[int, Seat], devices: dict[int, str]) -> str:
    if placement.retriever_ranks == placement.verifier_ranks:
        return "same_process"
    ranks = (*placement.verifier_ranks, *placement.retriever_ranks)
    shares_memory = len({(seats[rank].node, devices[rank]) for rank in ranks}) == 1
    return "shared_memory" if shares_memory else "carried"


def _threads_each(config: RunConfig, prepared: Prepared, placement: Placement, seats: dict[int, Seat]) -> int:
    """Ranks of a verifier must have as many each, for the same bits; what idles meanwhile costs nothing."""
    if config.placement.threads != "auto":
        return int(config.placement.threads)
    busiest = max(
        sum(seats[rank].node == node for rank in placement.verifier_ranks)
        for node in {seat.node for seat in seats.values()}
    )
    return max(1, prepared.num_threads // busiest)


# ---- Memory. ----


class _Planner:
    """The memory plan of each process. Processes share what their node has."""

    def __init__(self, config, prepared, placement, seats, devices, free, sizes):
        self._config, self._prepared, self._placement = config, prepared, placement
        self._seats, self._devices, self._free, self._sizes = seats, devices, free, sizes

    def plans(self) -> dict[int, MemoryPlan]:
        """Raises ConfigError where the verifier's part does not fit."""
        placement, plans = self._placement, {}
        is_apart = placement.retriever_ranks != placement.verifier_ranks
        whole = self._inputs(self._prepared, FreeBytes(device=0, host=0, disk=0, device_is_host=True))
        if is_apart:
            retriever, drafter = placement.retriever_ranks[0], placement.drafter_rank
            plans[drafter] = drafter_plan(whole, self._config.cache)
            shares_weights = _update_path(placement, self._seats, self._devices) == "shared_memory"
            shares_weights &= placement.tensor_parallel == 1
            plans[retriever] = retriever_plan(whole, self._config.cache, has_weights=not shares_weights)
        verifier = self._verifier_plan(plans)
        for rank in placement.verifier_ranks:
            plans[rank] = without_retrieval_cache(verifier) if is_apart else verifier
        return plans

    def _verifier_plan(self, others: dict[int, MemoryPlan]) -> MemoryPlan:
        """The same for all ranks: of rank 0, which has the most heads, in what the rank with least has."""
        ranks = self._placement.verifier_ranks
        target = self._prepared.target.sharded(Shard(0, len(ranks)))
        has_drafter = self._placement.drafter_rank in ranks
        prepared = replace(self._prepared, target=target, drafter=self._prepared.drafter if has_drafter else None)
        left = [self._left_for(rank, others) for rank in ranks]
        free = FreeBytes(
            device=min(each.device for each in left),
            host=min(each.host for each in left),
            disk=min(each.disk for each in left),
            device_is_host=self._devices[ranks[0]] == "cpu",
        )
        return make_plan(self._inputs(prepared, free), self._config.cache)

    def _left_for(self, rank: int, others: dict[int, MemoryPlan]) -> FreeBytes:
        node, device = self._seats[rank].node, self._devices[rank]
        beside = [other for other in self._placement.verifier_ranks if self._seats[other].node == node]
        on_device = [other for other in beside if self._devices[other] == device]
        taken = sum(
            plan.totals["device"]
            for other, plan in others.items()
            if (self._seats[other].node, self._devices[other]) == (node, device)
        )
        found = FreeBytes(
            **{tier: self._free[rank][tier] for tier in ("device", "host", "disk")}, device_is_host=device == "cpu"
        )
        usable = available_bytes(self._config.placement, found)
        of_host = usable.host - taken if usable.device_is_host else usable.host
        return FreeBytes(
            device=max(0, (usable.device - taken) // len(on_device)),
            host=max(0, of_host // len(beside)),
            disk=usable.disk // len(beside),
            device_is_host=usable.device_is_host,
        )

    def _inputs(self, prepared: Prepared, free: FreeBytes):
        return plan_input_for(self._config, prepared, **self._sizes, free=free)
