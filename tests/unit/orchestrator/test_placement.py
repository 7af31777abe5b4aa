"""orchestrator/placement.py: which rank plays what, and where."""

from __future__ import annotations

import pytest

from conf.schema import ConfigError, PlacementConfig, PlacementKind
from orchestrator.placement import DRAFTER_ROLE, RETRIEVER_ROLE, VERIFIER_ROLE, Seat, devices_for, place, sharing_notes

AUTO, COLOCATED, PIPELINE = PlacementKind.auto, PlacementKind.colocated, PlacementKind.pipeline


def seats(count: int, num_devices: int = 0, node: int = 0, first: int = 0) -> dict[int, Seat]:
    return {rank: Seat(node=node, num_devices=num_devices) for rank in range(first, first + count)}


@pytest.mark.parametrize(
    ("world_size", "kind"),
    [(1, PlacementKind.inline), (2, COLOCATED), (3, COLOCATED), (4, PIPELINE), (9, PIPELINE)],
)
def test_auto_takes_what_suits_the_number_of_processes(world_size, kind):
    assert place(PlacementConfig(kind=AUTO), world_size).kind is kind


def test_pipeline_has_an_orchestrator_a_drafter_a_retriever_and_verifiers():
    placement = place(PlacementConfig(kind=PIPELINE), 5)
    assert [placement.roles_of(rank) for rank in range(5)] == [
        [],
        [DRAFTER_ROLE],
        [RETRIEVER_ROLE],
        [VERIFIER_ROLE],
        [VERIFIER_ROLE],
    ]
    assert placement.worker_ranks == [1, 2, 3, 4] and placement.tensor_parallel == 2


def test_roles_of_a_pipeline_may_change_places():
    placement = place(PlacementConfig(kind=PIPELINE, drafter_rank=4, retriever_rank=1), 5)
    assert (placement.drafter_rank, placement.retriever_ranks, placement.verifier_ranks) == (4, (1,), (2, 3))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_colocated_ranks_all_verify_and_retrieve_and_the_first_drafts(world_size):
    placement = place(PlacementConfig(kind=COLOCATED), world_size)
    assert placement.roles_of(0) == [VERIFIER_ROLE, RETRIEVER_ROLE, DRAFTER_ROLE]
    assert all(placement.roles_of(rank) == [VERIFIER_ROLE, RETRIEVER_ROLE] for rank in range(1, world_size))
    assert placement.worker_ranks == list(range(world_size))


@pytest.mark.parametrize(
    ("world_size", "config", "named"),
    [
        (2, {"kind": PlacementKind.inline}, "WORLD_SIZE is 2"),
        (3, {"kind": PIPELINE}, "4 or more"),
        (5, {"kind": PIPELINE, "drafter_rank": 0}, "placement.drafter_rank is 0; it must be between 1 and 4"),
        (5, {"kind": PIPELINE, "retriever_rank": 5}, "placement.retriever_rank is 5"),
        (5, {"kind": PIPELINE, "retriever_rank": 1}, "must differ from placement.retriever_rank"),
        (5, {"kind": PIPELINE, "device": "cuda:0"}, "placement.device is 'cuda:0'"),
        (1, {"kind": COLOCATED, "device": "cuda:3"}, "auto, cpu or cuda"),
    ],
)
def test_what_does_not_fit_is_refused(world_size, config, named):
    with pytest.raises(ConfigError, match=named.replace("(", r"\(")):
        place(PlacementConfig(**config), world_size)


def test_without_devices_all_compute_on_the_cpu():
    placement = place(PlacementConfig(kind=PIPELINE), 5)
    assert devices_for(placement, seats(5), "auto") == dict.fromkeys(range(1, 5), "cpu")
    assert devices_for(placement, seats(5, num_devices=8), "cpu") == dict.fromkeys(range(1, 5), "cpu")


@pytest.mark.parametrize(
    ("num_devices", "drafter", "retriever", "verifiers"),
    [
        (2, "cuda:1", "cuda:0", ("cuda:0", "cuda:1")),
        (3, "cuda:2", "cuda:2", ("cuda:0", "cuda:1")),
        (4, "cuda:3", "cuda:2", ("cuda:0", "cuda:1")),
    ],
)
def test_verifiers_have_a_gpu_each_and_the_others_what_is_left(num_devices, drafter, retriever, verifiers):
    devices = devices_for(place(PlacementConfig(kind=PIPELINE), 5), seats(5, num_devices), "auto")
    assert (devices[1], devices[2], (devices[3], devices[4])) == (drafter, retriever, verifiers)


def test_a_pipeline_of_four_fits_on_one_gpu():
    devices = devices_for(place(PlacementConfig(kind=PIPELINE), 4), seats(4, num_devices=1), "cuda")
    assert devices == dict.fromkeys((1, 2, 3), "cuda:0")


def test_two_nodes_count_their_devices_apart():
    placement = place(PlacementConfig(kind=COLOCATED), 4)
    both = seats(2, num_devices=2) | seats(2, num_devices=2, node=1, first=2)
    assert devices_for(placement, both, "auto") == {0: "cuda:0", 1: "cuda:1", 2: "cuda:0", 3: "cuda:1"}


def test_a_drafter_may_be_on_a_node_of_its_own():
    placement = place(PlacementConfig(kind=PIPELINE, drafter_rank=4), 5)
    apart = seats(4, num_devices=2) | seats(1, num_devices=0, node=1, first=4)
    assert devices_for(placement, apart, "auto")[4] == "cpu"


@pytest.mark.parametrize(
    ("found", "wanted", "named"),
    [
        (seats(5), "cuda", "node 0 has no CUDA device: use cpu or auto"),
        (seats(5, num_devices=1), "auto", "ranks 3 and 4 would verify on one GPU, cuda:0: this node has 1 CUDA"),
        (seats(4, num_devices=1) | seats(1, node=1, first=4), "auto", "node 1 has no CUDA device and another has"),
    ],
)
def test_verifiers_need_devices_of_one_kind_and_their_own(found, wanted, named):
    with pytest.raises(ConfigError, match=named):
        devices_for(place(PlacementConfig(kind=PIPELINE), 5), found, wanted)


def test_processes_that_share_a_gpu_are_told_how():
    placement = place(PlacementConfig(kind=PIPELINE), 5)
    found = seats(5, num_devices=3)
    devices = devices_for(placement, found, "auto")
    (by_turns,) = sharing_notes(placement, found, devices, with_mps=[1])
    assert by_turns.startswith("ranks 1, 2 share cuda:2 of node 0 without MPS: they take turns")
    assert sharing_notes(placement, found, devices, with_mps=[1, 2, 3]) == [
        "ranks 1, 2 share cuda:2 of node 0 by MPS: they compute side by side"
    ]


def test_processes_with_a_gpu_each_or_none_need_no_note():
    placement = place(PlacementConfig(kind=PIPELINE), 5)
    for num_devices in (0, 4):
        found = seats(5, num_devices)
        assert sharing_notes(placement, found, devices_for(placement, found, "auto"), with_mps=[]) == []
