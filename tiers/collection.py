"""Chunks for the retrieval cache, copied as the blocks of a layer pass on their way to attention."""

from __future__ import annotations

import torch

from tiers.base import tokens_of_chunks


class Collection:
    """Copies chunks `chunk_ids` [H, m] of a layer in blocks to `out` [2, >= H * m * chunk_size, D] as the blocks pass.

    Both are on the device. Tokens that do not pass, because no query sees them any more through the layer's sliding
    window, are left as they are in `out`: finite, but without meaning.
    """

    def __init__(self, chunk_ids: torch.Tensor, chunk_size: int, block_tokens: int, out: torch.Tensor):
        tokens = tokens_of_chunks(chunk_ids, chunk_size)
        heads = torch.arange(tokens.shape[0], device=tokens.device)[:, None].expand_as(tokens).flatten()
        self._kv = out[:, : tokens.numel()]
        self._size = (2, *tokens.shape, out.shape[-1])
        self._slots = tokens.flatten().argsort()
        self._heads, self._tokens = heads[self._slots], tokens.flatten()[self._slots]
        # Of the sorted tokens, how many lie in blocks up to each.
        self._ends = torch.bincount(self._tokens // block_tokens).cumsum(0).tolist()
        self._block_tokens = block_tokens
        self.is_complete = False

    def take_block(self, index: int, block: torch.Tensor) -> None:
        """Copies what is wanted of `block` [2, H, B, D], the one of number `index`."""
        if index < len(self._ends):
            self._take(self._ends[index - 1] if index else 0, self._ends[index], index * self._block_tokens, block)

    def take_tail(self, num_blocks: int, tail: torch.Tensor) -> None:
        """Copies what is wanted of `tail`, the tokens behind `num_blocks` blocks: the last to pass."""
        if self._ends:
            first = self._ends[min(num_blocks, len(self._ends)) - 1] if num_blocks else 0
            self._take(first, self._ends[-1], num_blocks * self._block_tokens, tail)
        self.is_complete = True

    def _take(self, first: int, end: int, start: int, rows: torch.Tensor) -> None:
        """Copies the sorted tokens `first` to `end` from `rows` [2, H, N, D], which begin at position `start`."""
        if first < end:
            tokens = self._tokens[first:end] - start
            self._kv[:, self._slots[first:end]] = rows[:, self._heads[first:end], tokens]

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [H, m * chunk_size, D] of the chunks, as `gather` gives them."""
        k, v = self._kv.view(self._size)
        return k, v
