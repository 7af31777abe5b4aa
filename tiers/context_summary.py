"""What the retrieval draft sees of the tokens that were not chosen: groups of them, each as one key and one value.

n tokens whose keys are close to their mean k and whose values have the mean v add about exp(q·k + log n) v to a
query's attention. Without them a draft gives all of the attention to what was chosen; that costs acceptance wherever
attention is spread widely. (Chosen chunks are exact, the rest is estimated: so does RetroInfer, arXiv 2505.02922.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tiers.base import CacheShape
from tiers.full_cache import FullCache

READ_TOKENS = 1024  # read from the cache at once, so that what is needed on the device stays small


@dataclass(slots=True)
class Summary:
    """Mean keys and values [H, S, D] of groups of tokens, and the logarithm of how many each stands for [H, S]."""

    k: torch.Tensor
    v: torch.Tensor
    log_count: torch.Tensor


class ContextSummary:
    """Sums of keys and values over groups of `group_tokens` consecutive tokens, of each layer of a full cache."""

    def __init__(self, shape: CacheShape, capacity: int, group_tokens: int, tier):
        self.group_tokens = group_tokens
        num_groups = -(-capacity // group_tokens)
        size = (shape.num_layers, 2, shape.num_kv_heads, num_groups, shape.head_dim)
        self._sums = tier.allocate(*size, dtype=torch.float32)
        self._num_layers = shape.num_layers
        self.reset()

    def reset(self) -> None:
        self._sums.zero_()
        self._num_tokens = [0] * self._num_layers

    def observe(self, layer: int, start: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Takes final keys and values [H, T, D] from position `start` on, in order; those known are left out."""
        known = self._num_tokens[layer] - start
        assert known >= 0, f"tokens from {self._num_tokens[layer]} on are missing before position {start}"
        end = start + k.shape[1]
        if end <= self._num_tokens[layer]:
            return
        groups = torch.arange(start + known, end, device=k.device) // self.group_tokens
        for side, rows in ((0, k), (1, v)):
            self._sums[layer, side].index_add_(1, groups, rows[:, known:].float())
        self._num_tokens[layer] = end

    def catch_up(self, cache: FullCache) -> None:
        """Takes the cache's tokens, which must be final."""
        for layer in range(self._num_layers):
            for start in range(self._num_tokens[layer], cache.length, READ_TOKENS):
                self.observe(layer, start, *cache.read(layer, start, min(start + READ_TOKENS, cache.length)))

    def rest(self, layer: int, positions: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Summary:
        """Of all complete groups, without the tokens at `positions` [H, n], whose keys and values are `k`, `v`."""
        num_groups = self._num_tokens[layer] // self.group_tokens
        heads, dim = k.shape[0], k.shape[2]
        sums = torch.zeros(2, heads, num_groups + 1, dim, device=k.device)  # the last one for tokens of no such group
        sums[:, :, :num_groups] = self._sums[layer, :, :, :num_groups]
        counts = torch.full((heads, num_groups + 1), float(self.group_tokens), device=k.device)
        groups = (positions // self.group_tokens).clamp_max(num_groups)
        counts.scatter_add_(1, groups, torch.full_like(groups, -1, dtype=counts.dtype))
        for side, rows in ((0, k), (1, v)):
            sums[side].scatter_add_(1, groups[..., None].expand(-1, -1, dim), -rows.float())
        counts = counts[:, :num_groups]
        means = sums[:, :, :num_groups] / counts.clamp_min(1)[..., None]
        # What is chosen as a whole leaves rounding errors for means, and no weight.
        return Summary(means[0].to(k.dtype), means[1].to(k.dtype), counts.log())
