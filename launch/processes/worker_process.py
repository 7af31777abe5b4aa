"""The process of a worker: joins the run, and builds and plays the roles that the orchestrator assigns to it."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from conf.schema import RunConfig
from launch.assembly.engine import memory_shortage_as_config_error
from launch.assembly.role_builder import RoleBuilder
from launch.processes import mps
from launch.processes.guard import ENDPOINTS, FOUND_NOBODY, PIPE, STACKS_SIGNAL, START_TIMEOUT, same_host
from launch.processes.rendezvous import wait_for_endpoints
from orchestrator.placement import DRAFTER_ROLE, RETRIEVER_ROLE, VERIFIER_ROLE
from tiers.planning.memory import device_free_bytes, disk_free_bytes, host_free_bytes
from tiers.planning.plan import RETRIEVAL_PARTS, MemoryPlan
from tiers.shared_memory import AttachedPart, SharedArena
from workers.models.causal_model import CausalModel
from workers.models.facts import describe
from workers.models.retrieval_model import ReceivingRetrievalModel, SharedRetrievalModel
from workers.models.shared_weights import SharedWeights
from workers.parallel.collectives import ByThread, GroupAllReduce, SharedMemoryAllReduce, has_ordered_stores
from workers.parallel.shard import WHOLE, Shard, own_heads
from workers.parallel.tensor_parallel import AllReduce, pooled_scores
from workers.process.channel import Endpoints, Line, PingListener
from workers.process.update_path import (
    Carried,
    Carrying,
    IntoItsMemory,
    SameProcess,
    UpdatePath,
)
from workers.process.worker import Worker
from workers.retrieval_drafter import RetrievalDrafter

logger = logging.getLogger(__name__)

SHARDED = (VERIFIER_ROLE, RETRIEVER_ROLE)
RETRIEVAL_CACHE, WEIGHTS = "retrieval_cache", "weights"
"""Names of what processes share; see workers.messages.Built."""


class Assignment(msgspec.Struct, kw_only=True):
    """What the orchestrator tells a process to be."""

    rank: int
    roles: list[str]
    device: str
    dtype: str
    num_threads: int
    seed: int
    max_new_tokens: int
    plan: MemoryPlan
    shard_rank: int = 0
    shard_size: int = 1
    group: str = ""
    """A name that the ranks of a sharded model, and nobody else, have in common."""
    store: tuple[str, int] | None = None
    """Host and port where they find each other."""
    same_host: bool = True
    """All of them are on one machine."""
    start_timeout_s: float = 600.0
    stall_timeout_s: float = 60.0
    update_path: str = "same_process"
    """same_process, shared_memory or carried; see workers.process.update_path."""
    gives_weights: bool = False
    """To a retriever on the same device..."""
    weights: dict[str, Any] | None = None
    """...which gets them by this description."""
    log: str | None = None
    """A file for what this process has to say."""


class Roles:
    """See workers.process.worker.RoleSet."""

    def __init__(self, config: RunConfig, assignment: Assignment):
        self._config, self._assignment = config, assignment
        self.device = torch.device(assignment.device)
        self._group: dist.ProcessGroup | None = None
        self._arena: SharedArena | None = None
        self._weights: SharedWeights | None = None
        self._prefill = (0, 0)
        self._sums: ByThread | None = None
        self.is_first_shard = assignment.shard_rank == 0
        self.roles: dict[str, Any] = {}
        self.shared: dict[str, Any] = {}
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        else:
            torch.set_num_threads(assignment.num_threads)
        dtype = getattr(torch, assignment.dtype)
        self._whole = describe("model.target", config.model.target, dtype, config.model.max_positions)
        self._shard = Shard(assignment.shard_rank, assignment.shard_size)
        self._builder = RoleBuilder(
            config,
            self._whole.sharded(self._shard),
            self.device,
            assignment.plan,
            seed=assignment.seed,
            in_threads=True,
        )
        self._make(dtype)
        self._finish_queued()
        self.notes = self._builder.notes

    def _make(self, dtype: torch.dtype) -> None:
        roles, builder = self._assignment.roles, self._builder
        target = self._load_target() if {VERIFIER_ROLE, RETRIEVER_ROLE} & set(roles) else None
        path = SameProcess() if self._assignment.update_path == UpdatePath.same_process else None
        if RETRIEVER_ROLE in roles:
            self.roles[RETRIEVER_ROLE] = self._make_retriever(target, path)
        if VERIFIER_ROLE in roles:
            verifier, model = builder.verifier(target)
            model.on_prefill_progress = lambda done, total: setattr(self, "_prefill", (done, total))
            # Where it writes to another's memory it is told by `attach`; until then, nothing leaves.
            verifier.publisher = path or Carrying(sends=self._is_owner())
            self.roles[VERIFIER_ROLE] = verifier
        if DRAFTER_ROLE in roles:
            facts = None
            if self._config.model.drafter != "lookup":
                facts = describe("model.drafter", self._config.model.drafter, dtype)
            self.roles[DRAFTER_ROLE] = builder.drafter(facts, self._whole.config.get_text_config().vocab_size)

    def _finish_queued(self) -> None:
        """What this thread queued on the device: the roles, on streams of their own, do not wait for it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _load_target(self) -> CausalModel:
        if self._assignment.weights is not None:
            return self._builder.take_target(self._assignment.weights)
        if self._shard == WHOLE:
            target = self._builder.load_target()
            if self._assignment.gives_weights:
                self._weights = SharedWeights(target)
                self.shared[WEIGHTS] = self._weights.description()
            return target
        all_reduce, shape = self._all_reduce(), self._whole.cache_shape
        if self._shard.size > shape.num_kv_heads:
            self._builder.pool_scores = partial(pooled_scores, all_reduce, self._heads(), shape.num_kv_heads)
        return self._builder.load_target(all_reduce=all_reduce)

    def _all_reduce(self) -> AllReduce:
        """NCCL between GPUs; between processors of one machine shared memory, else gloo. Each role has its own."""
        assignment = self._assignment
        timeout = timedelta(seconds=self._sum_timeout_s)
        host, port = assignment.store
        store = dist.PrefixStore(assignment.group, dist.TCPStore(host, port, is_master=False, timeout=timeout))
        if self.device.type == "cpu" and assignment.same_host and has_ordered_stores():
            ways = {role: self._shared_memory_sum(store, role) for role in sorted(assignment.roles) if role in SHARDED}
        else:
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(
                backend, store=store, rank=self._shard.rank, world_size=self._shard.size, timeout=timeout
            )
            self._group = dist.group.WORLD
            roles = sorted(role for role in assignment.roles if role in SHARDED)
            ways = {role: GroupAllReduce(dist.new_group(timeout=timeout)) for role in roles}
        self._sums = ByThread(ways[VERIFIER_ROLE], ways)
        return self._sums

    @property
    def _sum_timeout_s(self) -> float:
        """The orchestrator is to find a stall first, and who is to blame; this is for when it is blind to it."""
        return 2 * self._assignment.stall_timeout_s

    def _shared_memory_sum(self, store: dist.Store, role: str) -> SharedMemoryAllReduce:
        if self._shard.rank == 0:
            file = os.memfd_create("tierforce-sums")  # no name: nothing is left of it, however the ranks end
            store.set(role, f"/proc/{os.getpid()}/fd/{file}")
        path = Path(store.get(role).decode())
        return SharedMemoryAllReduce(
            path,
            self._shard,
            timeout_seconds=self._sum_timeout_s,
            start_timeout_seconds=self._assignment.start_timeout_s,
        )

    def _make_retriever(self, target: CausalModel, path: SameProcess | None) -> RetrievalDrafter:
        builder = self._builder
        if path is not None or self._assignment.update_path == UpdatePath.carried:
            make_model = partial(ReceivingRetrievalModel, receiver=path or Carried())
            return builder.retriever(target, make_model=make_model)
        planned = self._assignment.plan.device_bytes
        self._arena = SharedArena(sum(planned[name] for name in RETRIEVAL_PARTS if name in planned), self.device)
        retriever = builder.retriever(target, self._arena, SharedRetrievalModel)
        self.shared[RETRIEVAL_CACHE] = self._arena.description()
        return retriever

    def _heads(self):
        text_config = self._whole.config.get_text_config()
        return own_heads(text_config.num_attention_heads, self._whole.cache_shape.num_kv_heads, self._shard)

    def _is_owner(self) -> bool:
        """Of the ranks that share this one's kv heads, the first."""
        heads, kv_heads = self._heads(), self._whole.cache_shape.num_kv_heads
        group = self._whole.config.get_text_config().num_attention_heads // kv_heads
        return heads.query.start == heads.kv.start * group

    def attach(self, shared: dict[str, Any]) -> bool:
        """The retriever's memory is there: from now on updates are written to it. False: it is gone again."""
        try:
            part = AttachedPart(shared[RETRIEVAL_CACHE], self._heads().kv.start)
        except (OSError, RuntimeError):
            logger.exception("the retriever's memory cannot be mapped")
            return False
        cache = self._builder.retrieval_cache(part)
        self._finish_queued()
        self.roles[VERIFIER_ROLE].publisher = IntoItsMemory(cache, writes=self._is_owner())
        return True

    def report(self) -> dict[str, Any]:
        peaks = self._builder.peak_bytes()
        if self._arena is not None and self.device.type == "cpu":
            peaks["device"] += self._arena.peak_bytes
        report: dict[str, Any] = {
            "peak_bytes": peaks,
            "failed_drafts": sum(map(_num_failed_drafts, self.roles.values())),
        }
        if VERIFIER_ROLE in self.roles:
            report["streaming"] = self._builder.streaming_report()
        return report

    def progress(self) -> tuple[int, int, int]:
        return sum(model.progress.num_layers for model in self._builder.models), *self._prefill

    def waits_for_others(self) -> bool:
        return self._sums is not None and bool(self._sums.summing)

    def close(self) -> None:
        self._builder.close()
        if self._group is not None:
            dist.destroy_process_group()


def build(config: dict[str, Any], assignment: dict[str, Any]) -> Roles:
    """See workers.process.worker.Worker."""
    assigned = msgspec.convert(assignment, Assignment)
    if assigned.log is not None:
        _log_to(Path(assigned.log))
    run_config = msgspec.convert(config, RunConfig)
    with memory_shortage_as_config_error(run_config):
        return Roles(run_config, assigned)


def _num_failed_drafts(role: Any) -> int:
    """So many times a drafting role's logits were not finite, and it drafted nothing or less."""
    return getattr(role, "num_failures", 0)


def survey(device: str, disk_folder: str) -> dict[str, int]:
    """Free bytes of each tier, as this process sees them, and whether it is a client of MPS."""
    folder = Path(disk_folder)
    return {
        "device": device_free_bytes(torch.device(device)),
        "host": host_free_bytes(),
        "disk": disk_free_bytes(folder),
        "has_mps": mps.is_available(os.environ),
    }


def _log_to(path: Path) -> None:
    """All that this process and its libraries print; the terminal is the orchestrator's. Lines of ours name rank and
    role, as the file does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)
    logging.basicConfig(
        stream=sys.stderr,
        format=f"%(asctime)s {path.stem} %(threadName)s %(levelname)s %(message)s",
        level=logging.INFO,
        force=True,
    )
    # A handler in C: it shows a thread that never gives the interpreter back, too.
    faulthandler.register(STACKS_SIGNAL, all_threads=True)


def serve(endpoints: Endpoints, rank: int, node: int, *, same_host: bool) -> None:
    """Until the orchestrator ends it."""
    messages, pings = endpoints.for_host(same_host=same_host)
    pid = endpoints.pid if same_host else None
    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0

    def connect(name: str, *tensors) -> Line:
        return Line(messages, f"{rank}.{name}", endpoints.secret, *tensors, node=node, num_devices=num_devices)

    Worker(connect, partial(PingListener, pings, time.monotonic, pid), survey, build).run()


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the orchestrator decides
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if ENDPOINTS in os.environ:
        endpoints = msgspec.json.decode(os.environ[ENDPOINTS], type=Endpoints)
    else:
        try:
            endpoints = wait_for_endpoints(float(os.environ[START_TIMEOUT]))
        except TimeoutError as error:
            print(f"tierforce: failed in phase start, rank {os.environ['RANK']}: {error}", file=sys.stderr, flush=True)
            return FOUND_NOBODY
        with os.fdopen(int(os.environ[PIPE]), "wb") as pipe:
            pipe.write(msgspec.json.encode(endpoints) + b"\n")
    serve(endpoints, int(os.environ["RANK"]), int(os.environ.get("GROUP_RANK", "0")), same_host=same_host())
    return 0


if __name__ == "__main__":
    sys.exit(main())
