"""Where the ranks of a run are: node, device and what is free there; and what follows for what they share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from launch.assembly.sizing import FreeBytes
from orchestrator.placement import Placement, Seat
from workers.process.update_path import UpdatePath


@dataclass(kw_only=True, frozen=True)
class RankSites:
    """The site of every rank that plays a role, by rank."""

    placement: Placement
    seats: Mapping[int, Seat]
    devices: Mapping[int, str]
    """`cpu`, or `cuda:N` of the rank's node."""
    free: Mapping[int, FreeBytes]
    """What is free as the rank's process sees it; processes of one node see the same bytes."""
    ranks_with_mps: frozenset[int]
    """Ranks whose process is a client of CUDA's Multi-Process Service."""

    @property
    def is_retriever_apart(self) -> bool:
        """Whether the retriever has a process of its own."""
        return self.placement.retriever_ranks != self.placement.verifier_ranks

    @property
    def is_verifier_on_one_node(self) -> bool:
        """Whether the verifier's ranks share a machine's memory."""
        return len({self.seats[rank].node for rank in self.placement.verifier_ranks}) == 1

    @property
    def update_path(self) -> UpdatePath:
        """The way that true keys and values take from the verifier to the retriever."""
        if not self.is_retriever_apart:
            return UpdatePath.same_process
        ranks = (*self.placement.verifier_ranks, *self.placement.retriever_ranks)
        is_one_memory = len({self.device_of_node(rank) for rank in ranks}) == 1
        return UpdatePath.shared_memory if is_one_memory else UpdatePath.carried

    @property
    def shares_weights(self) -> bool:
        """Whether a retriever in a process of its own computes with the verifier's weights.

        A part of the weights, as each of several ranks has, is of no use to it.
        """
        return self.update_path is UpdatePath.shared_memory and self.placement.tensor_parallel == 1

    @property
    def most_verifier_ranks_on_a_node(self) -> int:
        """Number of the verifier's ranks on the node that has most of them."""
        nodes = [self.seats[rank].node for rank in self.placement.verifier_ranks]
        return max(map(nodes.count, nodes))

    def device_of_node(self, rank: int) -> tuple[int, str]:
        """Node and device of a rank, which together name one device of the whole run."""
        return self.seats[rank].node, self.devices[rank]
