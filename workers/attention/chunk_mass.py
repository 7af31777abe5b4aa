"""Where the attention of a layer goes, chunk by chunk: what chunks are chosen by."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tiers.base import Segment


@dataclass(slots=True)
class Chunks:
    """The chunks of `size` tokens that some consecutive keys belong to, from chunk `first` on.

    The first `skipped` tokens of the first chunk are not among the keys.
    """

    first: int
    skipped: int
    size: int

    def sums(self, weights: torch.Tensor) -> torch.Tensor:
        """Sums [H, R, chunks] of the weights [H, R, N] of each chunk's keys."""
        behind = -(self.skipped + weights.shape[-1]) % self.size
        if self.skipped or behind:
            weights = torch.nn.functional.pad(weights, (self.skipped, behind))
        by_chunk = weights.view(*weights.shape[:-1], -1, self.size)
        sums: torch.Tensor = by_chunk @ weights.new_ones(self.size)  # twice as fast as a sum
        return sums


class ChunkMass:
    """Where a layer's attention goes: to each chunk of `size` consecutive tokens, from the partial softmaxes."""

    def __init__(self, size: int):
        self._size = size
        self._parts: list[tuple[Chunks, torch.Tensor, torch.Tensor]] = []

    def chunks_of(self, part: Segment) -> Chunks:
        """The chunks of a segment, whose keys must be consecutive tokens."""
        assert part.start is not None, "mass is counted by chunks of consecutive tokens"
        return Chunks(part.start // self._size, part.start % self._size, self._size)

    def add(self, chunks: Chunks, shares: torch.Tensor, lse: torch.Tensor) -> None:
        """Takes the shares [H, R, chunks] of the attention to some keys, with their log-sum-exp [H, R, 1]."""
        self._parts.append((chunks, shares, lse))

    def finish(self, lse: torch.Tensor) -> None:
        """Adds up what each chunk got, with the log-sum-exp [H, R, 1] over all keys."""
        end = max(chunks.first + shares.shape[-1] for chunks, shares, _ in self._parts)
        self._total = torch.zeros(lse.shape[0], end, dtype=lse.dtype, device=lse.device)
        for chunks, shares, part_lse in self._parts:
            of_all = (part_lse - lse).exp_().transpose(1, 2) / lse.shape[1]
            self._total[:, chunks.first : chunks.first + shares.shape[-1]] += torch.bmm(of_all, shares)[:, 0]
        self._parts.clear()

    def total(self) -> torch.Tensor:
        """What each chunk got of all queries' attention: [H, chunks], adding up to 1 for each kv head."""
        return self._total
