"""Placement: which rank plays which role, on which device. Numbers in, a Placement or a ConfigError out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from conf.schema import ConfigError, PlacementConfig, PlacementKind

DRAFTER_ROLE, RETRIEVER_ROLE, VERIFIER_ROLE = "drafter", "retriever", "verifier"
MIN_PIPELINE_RANKS = 4


@dataclass(kw_only=True, frozen=True)
class Placement:
    """`inline` has no other ranks. A role that a run's mode does not use leaves its rank idle."""

    kind: PlacementKind
    verifier_ranks: tuple[int, ...] = ()
    retriever_ranks: tuple[int, ...] = ()
    """One, which holds the whole model; or, colocated, the verifier's, which hold their parts for both."""
    drafter_rank: int | None = None

    @property
    def tensor_parallel(self) -> int:
        return max(1, len(self.verifier_ranks))

    @property
    def worker_ranks(self) -> list[int]:
        """All ranks that play a role, apart from the orchestrator's."""
        drafter = () if self.drafter_rank is None else (self.drafter_rank,)
        return sorted({*self.verifier_ranks, *self.retriever_ranks, *drafter})

    def roles_of(self, rank: int) -> list[str]:
        return [
            role
            for role, ranks in (
                (VERIFIER_ROLE, self.verifier_ranks),
                (RETRIEVER_ROLE, self.retriever_ranks),
                (DRAFTER_ROLE, (self.drafter_rank,)),
            )
            if rank in ranks
        ]


def place(config: PlacementConfig, world_size: int) -> Placement:
    """Spreads the roles over `world_size` ranks, of which 0 is the orchestrator's. Raises ConfigError."""
    kind = config.kind
    if kind is PlacementKind.auto:
        few = PlacementKind.colocated if world_size > 1 else PlacementKind.inline
        kind = PlacementKind.pipeline if world_size >= MIN_PIPELINE_RANKS else few
    if kind is PlacementKind.inline:
        _require_ranks(world_size == 1, kind, world_size, "1 (or placement colocated or pipeline)")
        return Placement(kind=kind)
    if config.device.startswith("cuda:"):
        raise ConfigError(
            f"placement.device is {config.device!r}; with placement={kind} it must be auto, cpu or cuda: every process "
            "gets a device of its own where there are enough"
        )
    if kind is PlacementKind.colocated:
        ranks = tuple(range(world_size))
        return Placement(kind=kind, verifier_ranks=ranks, retriever_ranks=ranks, drafter_rank=0)
    _require_ranks(
        world_size >= MIN_PIPELINE_RANKS,
        kind,
        world_size,
        f"{MIN_PIPELINE_RANKS} or more: an orchestrator, a drafter, a retriever and the verifier's ranks",
    )
    for key, rank in (("drafter_rank", config.drafter_rank), ("retriever_rank", config.retriever_rank)):
        if not 1 <= rank < world_size:
            raise ConfigError(f"placement.{key} is {rank}; it must be between 1 and {world_size - 1}")
    if config.drafter_rank == config.retriever_rank:
        raise ConfigError(
            f"placement.drafter_rank is {config.drafter_rank}; it must differ from placement.retriever_rank"
        )
    others = {0, config.drafter_rank, config.retriever_rank}
    return Placement(
        kind=kind,
        verifier_ranks=tuple(rank for rank in range(world_size) if rank not in others),
        retriever_ranks=(config.retriever_rank,),
        drafter_rank=config.drafter_rank,
    )


def _require_ranks(condition: bool, kind: PlacementKind, world_size: int, rule: str) -> None:
    if not condition:
        raise ConfigError(
            f"WORLD_SIZE is {world_size} (torchrun --nproc-per-node); with placement={kind} it must be {rule}"
        )


@dataclass(kw_only=True, frozen=True)
class Seat:
    """Node and devices of a rank."""

    node: int
    num_devices: int
    """CUDA devices of its node; 0: it computes on the CPU."""


def devices_for(placement: Placement, seats: Mapping[int, Seat], wanted: str) -> dict[int, str]:
    """The device of every rank that plays a role: a GPU of its own for each verifier, the others beside them.

    `wanted` is placement.device: `cpu`, or `auto` or `cuda` for GPUs where there are any. Raises ConfigError.
    """
    devices: dict[int, str] = {}
    for node in sorted({seats[rank].node for rank in placement.worker_ranks}):
        ranks = [rank for rank in placement.worker_ranks if seats[rank].node == node]
        count = 0 if wanted == "cpu" else min(seats[rank].num_devices for rank in ranks)
        if not count and wanted not in ("auto", "cpu"):
            raise ConfigError(f"placement.device is {wanted!r}; node {node} has no CUDA device: use cpu or auto")
        devices |= _devices_of_node(placement, ranks, count)
    if len({devices[rank] == "cpu" for rank in placement.verifier_ranks}) > 1:
        nodes = sorted({seats[rank].node for rank in placement.verifier_ranks if devices[rank] == "cpu"})
        raise ConfigError(
            f"placement.device is {wanted!r}; it must be cpu where, of the nodes with a verifier's ranks, node "
            f"{nodes[0]} has no CUDA device and another has: the ranks compute on devices of one kind"
        )
    return devices


def _devices_of_node(placement: Placement, ranks: list[int], count: int) -> dict[int, str]:
    if not count:
        return dict.fromkeys(ranks, "cpu")
    verifiers = [rank for rank in ranks if rank in placement.verifier_ranks]
    if len(verifiers) > count:
        raise ConfigError(
            f"ranks {verifiers[0]} and {verifiers[count]} would verify on one GPU, cuda:0: this node has {count} CUDA "
            "devices and NCCL wants one for each rank of a verifier; start fewer ranks, or set placement.device=cpu"
        )
    free = list(range(len(verifiers), count))
    devices = {rank: f"cuda:{index}" for index, rank in enumerate(verifiers)}
    # The drafter is small: where room is short, it is the retriever that gets a GPU of its own.
    for rank, shared in ((placement.retriever_ranks[0], 0), (placement.drafter_rank, count - 1)):
        if rank in ranks and rank not in devices:
            devices[rank] = f"cuda:{free.pop(0) if free else shared}"
    return devices


def sharing_notes(
    placement: Placement, seats: Mapping[int, Seat], devices: Mapping[int, str], with_mps: Collection[int]
) -> list[str]:
    """Notes for the user on GPUs that several processes share; `with_mps` are the ranks that may use MPS."""
    by_device: dict[tuple[int, str], list[int]] = {}
    for rank in placement.worker_ranks:
        if devices[rank] != "cpu":
            by_device.setdefault((seats[rank].node, devices[rank]), []).append(rank)
    notes = []
    for (node, device), ranks in by_device.items():
        if len(ranks) == 1:
            continue
        who = f"ranks {', '.join(map(str, ranks))} share {device} of node {node}"
        if set(ranks) <= set(with_mps):
            notes.append(f"{who} by MPS: they compute side by side")
        else:
            notes.append(
                f"{who} without MPS: they take turns, and drafting does not overlap verification. It does with "
                "nvidia-cuda-mps-control in the PATH, with more GPUs, or in one process: placement=colocated"
            )
    return notes
