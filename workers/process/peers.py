"""Names of the lines over which a worker process talks: `<rank>.<line>`. Loads without torch and sockets."""

from __future__ import annotations

PROCESS, BEAT, GUARD = "process", "beat", "guard"
"""Lines that every rank has besides one for each role: for building and reports; heartbeats; its guard."""


def peer_name(rank: int, line: str) -> str:
    """The name by which the hub knows a line of a rank: `3.verifier`."""
    return f"{rank}.{line}"


def rank_of(peer: str) -> int:
    """The rank of a peer's name. Raises ValueError for a name that has none."""
    return int(peer.partition(".")[0])


def line_of(peer: str) -> str:
    """The line of a peer's name, behind its rank."""
    return peer.partition(".")[2]
