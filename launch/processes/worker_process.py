"""The process of a worker: joins the run, and builds and plays the roles that the orchestrator assigns to it."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore  # torch.distributed does not export it by name
from torch.distributed.distributed_c10d import PrefixStore, Store

from conf.schema import LOOKUP_DRAFTER, RunConfig
from launch.assembly.engine import memory_shortage_as_config_error
from launch.assembly.prepare import DTYPES, rules_of
from launch.assembly.role_builder import RoleBuilder
from launch.processes import mps
from launch.processes.assignment import RETRIEVAL_CACHE, WEIGHTS, Assignment
from launch.processes.guard import ENDPOINTS, FOUND_NOBODY, PIPE, STACKS_SIGNAL, START_TIMEOUT, same_host
from launch.processes.rendezvous import wait_for_endpoints
from orchestrator.placement import DRAFTER_ROLE, RETRIEVER_ROLE, VERIFIER_ROLE
from tiers.planning.memory import device_free_bytes, disk_free_bytes, host_free_bytes
from tiers.planning.parts import RETRIEVAL_PARTS
from tiers.shared_memory import AttachedPart, SharedArena
from workers.checkpoint.facts import describe
from workers.messages import UpdateNotice
from workers.models.causal_model import CausalModel
from workers.models.retrieval_model import ReceivingRetrievalModel, SharedRetrievalModel
from workers.models.shared_weights import SharedWeights
from workers.parallel.collectives import ByThread, GroupAllReduce, SharedMemoryAllReduce, has_ordered_stores
from workers.parallel.shard import WHOLE, Heads, Shard, own_heads
from workers.parallel.tensor_parallel import AllReduce, pooled_scores
from workers.process.channel import Endpoints, Line, PingListener
from workers.process.peers import peer_name
from workers.process.update_path import (
    Carried,
    Carrying,
    IntoItsMemory,
    SameProcess,
    UpdatePath,
)
from workers.process.worker import RoleSet, Worker
from workers.retrieval_drafter import RetrievalDrafter

logger = logging.getLogger(__name__)
Build = Callable[[dict[str, Any], dict[str, Any]], RoleSet]

SHARDED = (VERIFIER_ROLE, RETRIEVER_ROLE)
"""Roles that compute with the target's weights, of which several ranks have a part each."""


class AssignedRoles:
    """The roles that this process was assigned: what workers.process.worker.Worker serves as its RoleSet."""

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
        dtype = DTYPES[assignment.dtype]
        self._whole = describe("model.target", config.model.target, dtype, config.model.max_positions)
        self._shard = Shard(assignment.shard_rank, assignment.shard_size)
        self._builder = RoleBuilder(
            config,
            self._whole.sharded(self._shard),
            self.device,
            assignment.plan,
            seed=assignment.seed,
            rules=rules_of(config, self._whole).of_task(assignment.num_prompt_tokens, assignment.max_new_tokens),
            in_threads=True,
        )
        self._make(dtype)
        self._finish_queued()
        self.notes = self._builder.notes

    def _make(self, dtype: torch.dtype) -> None:
        roles, builder = self._assignment.roles, self._builder
        if set(SHARDED) & set(roles):
            self._make_sharded(self._load_target())
        if DRAFTER_ROLE in roles:
            facts = None
            if self._config.model.drafter != LOOKUP_DRAFTER:
                facts = describe("model.drafter", self._config.model.drafter, dtype)
            self.roles[DRAFTER_ROLE] = builder.drafter(facts, self._whole.config.get_text_config().vocab_size)

    def _make_sharded(self, target: CausalModel) -> None:
        """The retriever and the verifier, as far as they are assigned."""
        roles = self._assignment.roles
        path = SameProcess() if self._assignment.update_path is UpdatePath.same_process else None
        if RETRIEVER_ROLE in roles:
            self.roles[RETRIEVER_ROLE] = self._make_retriever(target, path)
        if VERIFIER_ROLE in roles:
            verifier, model = self._builder.verifier(target)
            model.on_prefill_progress = self._note_prefill
            # Where it writes to another's memory it is told by `attach`; until then, nothing leaves.
            verifier.publisher = path or Carrying(sends=self._is_owner())
            self.roles[VERIFIER_ROLE] = verifier

    def _note_prefill(self, done: int, total: int) -> None:
        self._prefill = done, total

    def _finish_queued(self) -> None:
        """Waits for what this thread queued on the device: the roles, on streams of their own, do not."""
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
        """What sums over the ranks of the target: each role that computes with its weights has a way of its own.

        NCCL between GPUs; between processors of one machine shared memory, else gloo.
        """
        assignment = self._assignment
        timeout = timedelta(seconds=self._sum_timeout_s)
        assert assignment.store is not None, "the ranks of a sharded model are told where they find each other"
        host, port = assignment.store
        store = PrefixStore(assignment.group, TCPStore(host, port, is_master=False, timeout=timeout))
        ways: dict[str, AllReduce]
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
        """Seconds after which a sum gives up.

        The orchestrator is to find a stall first, and who is to blame; this is for when it is blind to it.
        """
        return 2 * self._assignment.stall_timeout_s

    def _shared_memory_sum(self, store: Store, role: str) -> SharedMemoryAllReduce:
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

    def _make_retriever(self, target: CausalModel, path: SameProcess | None) -> RetrievalDrafter[list[UpdateNotice]]:
        """The retriever, which is told of updates by notices, whichever way they come."""
        if path is not None or self._assignment.update_path is UpdatePath.carried:
            make_model = partial(ReceivingRetrievalModel, receiver=path or Carried())
            return self._builder.retriever_with(make_model, target)
        planned = self._assignment.plan.device_bytes
        self._arena = SharedArena(sum(planned[name] for name in RETRIEVAL_PARTS if name in planned), self.device)
        retriever = self._builder.retriever_with(SharedRetrievalModel, target, self._arena)
        self.shared[RETRIEVAL_CACHE] = self._arena.description()  # of what lies in it by now
        return retriever

    def _heads(self) -> Heads:
        """The heads of the target that this rank has."""
        text_config = self._whole.config.get_text_config()
        return own_heads(text_config.num_attention_heads, self._whole.cache_shape.num_kv_heads, self._shard)

    def _is_owner(self) -> bool:
        """Whether this is the first of the ranks that share its kv heads."""
        heads, kv_heads = self._heads(), self._whole.cache_shape.num_kv_heads
        group = self._whole.config.get_text_config().num_attention_heads // kv_heads
        return bool(heads.query.start == heads.kv.start * group)

    def attach(self, shared: dict[str, Any]) -> bool:
        """Maps the retriever's memory, to which updates are written from now on. False: it is gone again."""
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
        """Peak bytes of each tier, failed drafts and, of a verifier, what it streamed; JSON types."""
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
        """See RoleSet: number of layers computed so far; and of prefill, tokens done and tokens in all."""
        return sum(model.progress.num_layers for model in self._builder.models), *self._prefill

    def waits_for_others(self) -> bool:
        """See RoleSet: whether a thread of this process is in a sum."""
        return self._sums is not None and bool(self._sums.summing)

    def close(self) -> None:
        """Gives back caches and files, and leaves the group of ranks."""
        self._builder.close()
        if self._group is not None:
            dist.destroy_process_group()


def build(config: dict[str, Any], assignment: dict[str, Any]) -> AssignedRoles:
    """Makes the roles of an Assignment, which like the RunConfig comes in plain JSON types. Raises ConfigError."""
    assigned = msgspec.convert(assignment, Assignment)
    if assigned.log is not None:
        _log_to(Path(assigned.log))
    run_config = msgspec.convert(config, RunConfig)
    with memory_shortage_as_config_error(run_config):
        return AssignedRoles(run_config, assigned)


def _num_failed_drafts(role: Any) -> int:
    """How often a role's logits were not finite, so that it drafted nothing or less; 0 for one that does not draft."""
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
    """Sends all that this process and its libraries print to a file: the terminal is the orchestrator's.

    Lines of ours name rank and role, as the file does.
    """
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


def serve(endpoints: Endpoints, rank: int, node: int, build: Build, *, same_host: bool) -> None:
    """Does what the orchestrator says, until that one ends it."""
    messages, pings = endpoints.for_host(same_host=same_host)
    pid = endpoints.pid if same_host else None
    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0

    def connect(name: str, *tensors: Any) -> Line:
        return Line(messages, peer_name(rank, name), endpoints.secret, *tensors, node=node, num_devices=num_devices)

    Worker(connect, partial(PingListener, pings, time.monotonic, pid), survey, build).run()


def main(build: Build = build) -> int:
    """The exit code of a worker, when the run is over; its environment is from launch.processes.guard.

    `build(config, assignment)` makes its roles.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
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
    serve(endpoints, int(os.environ["RANK"]), int(os.environ.get("GROUP_RANK", "0")), build, same_host=same_host())
    return 0


if __name__ == "__main__":
    sys.exit(main())
