"""launch/command_line/cluster.py: an environment that is half a cluster's is refused with one message."""

from __future__ import annotations

import socket

import pytest

from conf.schema import ConfigError
from launch.command_line.cluster import Place, check_meeting_point, read_place

MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
# (environment, what must be named)
CLUSTERS = [
    ({"WORLD_SIZE": "2", "RANK": "0"}, ["MASTER_ADDR is None", "rank 0", "torchrun"]),
    ({"WORLD_SIZE": "2", "RANK": "1"}, ["MASTER_ADDR is None", "rank 0", "torchrun"]),
    ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": ""}, ["MASTER_ADDR is ''"]),
    ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}, ["MASTER_PORT is None", "between 1 and 65535"]),
    ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1"}, ["MASTER_PORT is None", "between 1 and 65535"]),
    ({"WORLD_SIZE": "", "RANK": "0"}, ["WORLD_SIZE is ''", ">= 1"]),
    ({"WORLD_SIZE": "two", "RANK": "0"}, ["WORLD_SIZE is 'two'", ">= 1"]),
    ({"WORLD_SIZE": "0", "RANK": "0"}, ["WORLD_SIZE is '0'", ">= 1"]),
    ({"WORLD_SIZE": "-2", "RANK": "0"}, ["WORLD_SIZE is '-2'", ">= 1"]),
    ({"WORLD_SIZE": "2.0", "RANK": "0"}, ["WORLD_SIZE is '2.0'", ">= 1"]),
    ({"WORLD_SIZE": "9" * 5000, "RANK": "0"}, ["WORLD_SIZE is '999", ">= 1"]),
    ({"WORLD_SIZE": "2"}, ["RANK is None", "between 0 and 1", "WORLD_SIZE is 2"]),
    ({"WORLD_SIZE": "2", "RANK": ""}, ["RANK is ''", "between 0 and 1"]),
    ({"WORLD_SIZE": "2", "RANK": "2"}, ["RANK is '2'", "between 0 and 1"]),
    ({"WORLD_SIZE": "2", "RANK": "-1"}, ["RANK is '-1'", "between 0 and 1"]),
    ({"WORLD_SIZE": "2", "RANK": "first"}, ["RANK is 'first'", "between 0 and 1"]),
    ({"RANK": "1"}, ["RANK is '1'", "WORLD_SIZE is not set"]),
    ({"WORLD_SIZE": "2", "RANK": "0", **MEETING, "MASTER_PORT": "none"}, ["MASTER_PORT is 'none'", "65535"]),
    ({"WORLD_SIZE": "2", "RANK": "1", **MEETING, "MASTER_PORT": "-1"}, ["MASTER_PORT is '-1'", "65535"]),
    ({"WORLD_SIZE": "2", "RANK": "1", **MEETING, "MASTER_PORT": "70000"}, ["MASTER_PORT is '70000'", "65535"]),
    ({"WORLD_SIZE": "2", "RANK": "0", **MEETING, "MASTER_ADDR": "192.0.2.1"}, ["192.0.2.1:29511", "this machine"]),
    ({"WORLD_SIZE": "2", "RANK": "0", **MEETING, "MASTER_ADDR": "a" * 99}, ["MASTER_ADDR", "this machine"]),
    ({"WORLD_SIZE": "2", "RANK": "1", **MEETING, "LOCAL_WORLD_SIZE": "x"}, ["LOCAL_WORLD_SIZE is 'x'", "1 and 2"]),
    ({"WORLD_SIZE": "2", "RANK": "1", **MEETING, "GROUP_RANK": ""}, ["GROUP_RANK is ''", "between 0 and 1"]),
]


def check(environment: dict[str, str]) -> Place:
    """As a run over several processes does."""
    place = read_place(environment)
    if place.world_size > 1:
        check_meeting_point(environment)
    return place


@pytest.mark.parametrize(("environment", "named"), CLUSTERS, ids=[" ".join(named)[:40] for _, named in CLUSTERS])
def test_half_a_cluster_is_refused_by_variable_value_and_legal_value(environment, named):
    with pytest.raises(ConfigError) as refusal:
        check(environment)
    message = str(refusal.value)
    assert "\n" not in message and all(part in message for part in named), message


@pytest.mark.parametrize("kept_by_agent", [False, True])
def test_only_who_listens_needs_a_free_port(kept_by_agent):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        environment |= {"TORCHELASTIC_USE_AGENT_STORE": "True"} if kept_by_agent else {}
        check(environment | {"RANK": "1"})
        if kept_by_agent:
            check(environment | {"RANK": "0"})
        else:
            with pytest.raises(ConfigError, match="it must be a free port at an address of this machine"):
                check(environment | {"RANK": "0"})


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, Place()),
        ({"RANK": "0"}, Place()),
        ({"WORLD_SIZE": "1"}, Place()),
        ({"WORLD_SIZE": "1", "RANK": "0", "MASTER_PORT": ""}, Place()),
        ({"MASTER_ADDR": "nowhere"}, Place()),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_NNODES": "2"}, Place()),
        (
            {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "not.yet.there", "MASTER_PORT": "1"},
            Place(rank=1, world_size=2),
        ),
        (
            {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1", **MEETING},
            Place(rank=3, world_size=4),
        ),
    ],
)
def test_a_whole_environment_or_none_is_a_place(environment, place):
    assert check(environment) == place
