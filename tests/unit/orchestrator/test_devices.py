"""Which GPU each rank gets, and what is refused before NCCL would."""

from __future__ import annotations

import pytest

from conf.schema import ConfigError, PlacementConfig, PlacementKind
from orchestrator.placement import Placement, Seat, devices_for, place


def placed(kind: PlacementKind, world_size: int) -> Placement:
    return place(PlacementConfig(kind=kind), world_size)


def on_one_node(placement: Placement, num_devices: int) -> dict[int, Seat]:
    return {rank: Seat(node=0, num_devices=num_devices) for rank in placement.worker_ranks}


FIVE, TWO = placed(PlacementKind.pipeline, 5), placed(PlacementKind.colocated, 2)
GOOD = [
    # drafter 1, retriever 2, verifiers 3 and 4
    (FIVE, 0, {1: "cpu", 2: "cpu", 3: "cpu", 4: "cpu"}),
    (FIVE, 2, {1: "cuda:1", 2: "cuda:0", 3: "cuda:0", 4: "cuda:1"}),
    (FIVE, 3, {1: "cuda:2", 2: "cuda:2", 3: "cuda:0", 4: "cuda:1"}),
    (FIVE, 4, {1: "cuda:3", 2: "cuda:2", 3: "cuda:0", 4: "cuda:1"}),
    (TWO, 2, {0: "cuda:0", 1: "cuda:1"}),
    (TWO, 8, {0: "cuda:0", 1: "cuda:1"}),
]


@pytest.mark.parametrize(("placement", "num_devices", "wanted"), GOOD)
def test_each_rank_of_a_verifier_has_a_gpu_of_its_own(placement, num_devices, wanted):
    assert devices_for(placement, on_one_node(placement, num_devices), "auto") == wanted


@pytest.mark.parametrize(("placement", "ranks"), [(FIVE, "ranks 3 and 4"), (TWO, "ranks 0 and 1")])
def test_two_ranks_on_one_gpu_are_refused_by_name(placement, ranks):
    with pytest.raises(
        ConfigError, match=rf"{ranks} would verify on one GPU, cuda:0: .* 1 CUDA .*placement.device=cpu"
    ):
        devices_for(placement, on_one_node(placement, 1), "auto")


def test_gpus_that_are_wanted_and_not_there_are_refused():
    with pytest.raises(ConfigError, match="placement.device is 'cuda'; node 0 has no CUDA device: use cpu or auto"):
        devices_for(FIVE, on_one_node(FIVE, 0), "cuda")


def test_gpus_that_are_there_and_not_wanted_are_left_alone():
    assert set(devices_for(FIVE, on_one_node(FIVE, 8), "cpu").values()) == {"cpu"}


def test_each_node_counts_its_own_gpus():
    seats = {1: Seat(node=0, num_devices=1), 2: Seat(node=0, num_devices=1)}
    seats |= {3: Seat(node=0, num_devices=1), 4: Seat(node=1, num_devices=1)}
    assert devices_for(FIVE, seats, "auto") == dict.fromkeys((1, 2, 3, 4), "cuda:0")
