"""launch/processes/sites.py and assignment.py: what ranks share where they are, and what each is told to be."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import msgspec
import pytest
import torch

from conf.schema import DecodingConfig, Dtype, Mode, PlacementConfig, PlacementKind, RunConfig
from launch.assembly.sizing import FreeBytes
from launch.assembly.task import Task
from launch.processes.assignment import Assignment, make_assignments
from launch.processes.sites import RankSites
from orchestrator.placement import DRAFTER_ROLE, RETRIEVER_ROLE, VERIFIER_ROLE, Seat, place
from tiers.planning.plan import MemoryPlan
from tiers.planning.sizes import Sizes
from workers.process.update_path import UpdatePath

SIZES = Sizes(
    max_tokens=64,
    slack_tokens=8,
    piece_tokens=32,
    num_device_layers=2,
    num_host_layers=0,
    num_disk_layers=0,
    block_tokens=16,
    stream_buffers=2,
)
PLAN = MemoryPlan(sizes=SIZES)
STORE = ("127.0.0.1", 1)


def sites(kind: PlacementKind, num_ranks: int, *, devices: dict[int, str] | None = None, second_node=()) -> RankSites:
    """All ranks on the CPU of one node, but for those of `second_node` and those with other `devices`."""
    placement = place(PlacementConfig(kind=kind), num_ranks)
    ranks = placement.worker_ranks
    free = FreeBytes(device=1, host=1, disk=1, device_is_host=True)
    return RankSites(
        placement=placement,
        seats={rank: Seat(node=int(rank in second_node), num_devices=0) for rank in ranks},
        devices=dict.fromkeys(ranks, "cpu") | (devices or {}),
        free=dict.fromkeys(ranks, free),
        ranks_with_mps=frozenset(),
    )


def pipeline(num_ranks: int = 4, **changes) -> RankSites:
    return sites(PlacementKind.pipeline, num_ranks, **changes)


def colocated(num_ranks: int, **changes) -> RankSites:
    return sites(PlacementKind.colocated, num_ranks, **changes)


def task(mode: Mode = Mode.triforce, threads: str = "auto") -> Task:
    """A task of a machine with eight threads, whose models nobody asks for more than their dtype."""
    config = RunConfig(decoding=DecodingConfig(mode=mode), placement=PlacementConfig(threads=threads))
    prepared = SimpleNamespace(target=SimpleNamespace(dtype=torch.bfloat16), num_threads=8)
    return Task(config=config, prepared=prepared, prompt_ids=[1, 2], max_new_tokens=5, seed=7)


def assigned(where: RankSites, what: Task | None = None) -> dict[int, Assignment]:
    return make_assignments(what or task(), where, dict.fromkeys(where.placement.worker_ranks, PLAN), STORE)


@pytest.mark.parametrize(
    ("where", "path", "shares_weights"),
    [
        (colocated(1), UpdatePath.same_process, False),
        (colocated(2), UpdatePath.same_process, False),
        (pipeline(4), UpdatePath.shared_memory, True),
        (pipeline(5), UpdatePath.shared_memory, False),
        (pipeline(4, second_node={3}), UpdatePath.carried, False),
        (pipeline(4, devices={3: "cuda:0"}), UpdatePath.carried, False),
        (pipeline(4, devices={2: "cuda:0", 3: "cuda:0"}), UpdatePath.shared_memory, True),
    ],
    ids=["colocated-1", "colocated-2", "pipeline-1", "pipeline-2", "other node", "other device", "one GPU"],
)
def test_updates_and_weights_go_the_nearest_way(where, path, shares_weights):
    assert where.update_path is path and where.shares_weights == shares_weights
    told = assigned(where)
    assert {each.update_path for each in told.values()} == {path}
    givers = [rank for rank, each in told.items() if each.gives_weights]
    assert givers == (list(where.placement.verifier_ranks) if shares_weights else [])


def test_each_rank_is_told_its_roles_its_part_and_where_to_log():
    told = assigned(pipeline(5))
    assert {rank: each.roles for rank, each in told.items()} == {
        1: [DRAFTER_ROLE],
        2: [RETRIEVER_ROLE],
        3: [VERIFIER_ROLE],
        4: [VERIFIER_ROLE],
    }
    parts = {rank: (each.shard_rank, each.shard_size) for rank, each in told.items()}
    assert parts == {1: (0, 1), 2: (0, 1), 3: (0, 2), 4: (1, 2)}
    assert [each.log.rpartition("/")[2] for each in told.values()] == [
        "rank1-drafter.log",
        "rank2-retriever.log",
        "rank3-verifier.log",
        "rank4-verifier.log",
    ]
    assert {each.dtype for each in told.values()} == {Dtype.bfloat16} and {each.seed for each in told.values()} == {7}


def test_a_role_that_the_mode_does_not_use_leaves_its_rank_idle():
    told = assigned(pipeline(4), task(Mode.autoregressive))
    assert [each.roles for each in told.values()] == [[], [], [VERIFIER_ROLE]]
    assert told[1].log.endswith("rank1-idle.log")


@pytest.mark.parametrize(
    ("where", "threads", "wanted"),
    [
        (colocated(1), "auto", 8),
        (colocated(4), "auto", 2),
        (colocated(4, second_node={2, 3}), "auto", 4),
        (pipeline(4), "auto", 8),
        (colocated(16), "auto", 1),
        (colocated(4), "3", 3),
    ],
)
def test_the_ranks_of_a_verifier_share_the_threads_of_their_node(where, threads, wanted):
    assert {each.num_threads for each in assigned(where, task(threads=threads)).values()} == {wanted}


def test_an_assignment_arrives_as_it_left():
    for told in assigned(pipeline(5, second_node={4})).values():
        assert msgspec.convert(msgspec.to_builtins(told), Assignment) == told
        assert not told.same_host and replace(told.plan) == PLAN
