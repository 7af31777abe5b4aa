"""This process's place among those of a run, as the environment tells it: torchrun sets it, or the user by hand.

    WORLD_SIZE, RANK          number of processes; number of this one, from 0
    MASTER_ADDR, MASTER_PORT  where they find each other, if they are several
    LOCAL_WORLD_SIZE, GROUP_RANK   set by torchrun, and not needed: processes of this machine; number of the machine

What a cluster's scheduler says besides (SLURM_PROCID and the like) is not looked at: its tasks start torchrun.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from conf.schema import ConfigError, require

WORLD_SIZE, RANK = "WORLD_SIZE", "RANK"
MASTER_ADDR, MASTER_PORT = "MASTER_ADDR", "MASTER_PORT"
LOCAL_WORLD_SIZE, GROUP_RANK = "LOCAL_WORLD_SIZE", "GROUP_RANK"
NUMBER = re.compile(r"[0-9]{1,6}")
MAX_PORT = 65535
TORCHRUN = "torchrun sets it; started by hand, each process needs WORLD_SIZE, RANK, MASTER_ADDR and MASTER_PORT"


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Rank of this process, and how many there are."""

    rank: int = 0
    world_size: int = 1


def read_place(environment: Mapping[str, str]) -> Place:
    """The place of the process with this environment; without a word of it, that of a run in one process.

    Raises ConfigError where the numbers cannot be right.
    """
    rule = f">= 1, the number of processes ({TORCHRUN}; for a run in one process unset it)"
    world_size = _number(environment, WORLD_SIZE, 1, None, rule) if WORLD_SIZE in environment else 1
    of = f"as WORLD_SIZE is {world_size if WORLD_SIZE in environment else 'not set'} ({TORCHRUN})"
    if RANK not in environment:
        require(world_size == 1, RANK, None, f"between 0 and {world_size - 1}, {of}")
        return Place()
    place = Place(rank=_number(environment, RANK, 0, world_size - 1, of), world_size=world_size)
    if LOCAL_WORLD_SIZE in environment:
        _number(environment, LOCAL_WORLD_SIZE, 1, world_size, of)
    if GROUP_RANK in environment:
        _number(environment, GROUP_RANK, 0, world_size - 1, of)
    return place


def check_meeting_point(environment: Mapping[str, str]) -> None:
    """Raises ConfigError where the processes of a run over several cannot find each other by this environment.

    Whether a name can be resolved is known on rank 0 alone: for others it may come into being later.
    """
    host, port = environment.get(MASTER_ADDR), environment.get(MASTER_PORT)
    require(bool(host and host.strip()), MASTER_ADDR, host, f"the host name or address of rank 0 ({TORCHRUN})")
    rule = f"the port of {host} that the processes meet at ({TORCHRUN})"
    require(port is not None, MASTER_PORT, port, f"between 1 and {MAX_PORT}, {rule}")
    number = _number(environment, MASTER_PORT, 1, MAX_PORT, rule)
    keeps_store = environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if environment.get(RANK) == "0" and keeps_store:
        _check_listening(str(host), number)


def _check_listening(host: str, port: int) -> None:
    """Raises ConfigError where rank 0 cannot listen at this address of its own."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no host can be called so"
        rule = f"a host name or address of this machine, which is rank 0's ({reason})"
        raise ConfigError(f"{MASTER_ADDR} is {host!r}; it must be {rule}") from None
    with socket.socket(family, kind, protocol) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            rule = f"a free port at an address of this machine, which is rank 0's ({error.strerror})"
            raise ConfigError(f"{MASTER_ADDR}:{MASTER_PORT} is {host}:{port}; it must be {rule}") from None


def _number(environment: Mapping[str, str], name: str, least: int, most: int | None, why: str) -> int:
    """A variable's value. Raises ConfigError unless it is a number in its bounds."""
    text = environment[name]
    legal = NUMBER.fullmatch(text) is not None and least <= int(text) and (most is None or int(text) <= most)
    bounds = "an integer " if most is None else f"{least}, " if least == most else f"between {least} and {most}, "
    require(legal, name, text, bounds + why)
    return int(text)
