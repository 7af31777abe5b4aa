"""A summary of the tokens that were not chosen, for the retrieval draft: groups of them, each as one key and value.

n tokens whose keys are close to their mean k and whose values have the mean v add about exp(q·k + log n) v to a
query's attention. Without them a draft gives all of the attention to what was chosen; that costs acceptance wherever
attention is spread widely. (Chosen chunks are exact, the rest is estimated: so does RetroInfer, arXiv 2505.02922.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tiers.base import CacheShape, Tier
from tiers.full_cache import READ_TOKENS, FullCache


@dataclass(slots=True)
class Summary:
    """Mean keys and values [H, S, D] of S groups of tokens, and the logarithm [H, S] of how many each stands for."""

    k: torch.Tensor
    v: torch.Tensor
    log_count: torch.Tensor


def groups_within(capacity: int, group_tokens: int) -> int:
    """Number of complete groups of a sequence of `capacity` tokens; 0 where groups have none: there is no summary."""
    return capacity // group_tokens if group_tokens else 0


class ContextSummary:
    """Means of keys and values over groups of `group_tokens` consecutive tokens, of each layer of a full cache.

    There are `num_groups` of them at most, in each layer.
    """

    def __init__(self, shape: CacheShape, capacity: int, group_tokens: int, tier: Tier):
        self.group_tokens = group_tokens
        self.num_groups = groups_within(capacity, group_tokens)
        heads, dim = shape.num_kv_heads, shape.head_dim
        self._means = tier.allocate(shape.num_layers, 2, heads, self.num_groups, dim, dtype=shape.dtype)
        self._begun = tier.allocate(shape.num_layers, 2, heads, dim, dtype=torch.float32)  # sums of the last group
        self._num_layers = shape.num_layers
        self.reset()

    def reset(self) -> None:
        """Forgets all tokens: the sequence will be read from its first one."""
        self._begun.zero_()
        self._num_tokens = [0] * self._num_layers

    def observe(self, layer: int, start: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Takes final keys and values [H, T, D] from position `start` on, in order; those known are left out."""
        size, known = self.group_tokens, self._num_tokens[layer]
        assert known >= start, f"tokens from {known} on are missing before position {start}"
        end = start + k.shape[1]
        if end <= known:
            return
        first, num_complete = known // size, end // size
        groups = torch.arange(known, end, device=k.device) // size - first
        begun = self._begun[layer]
        sums = torch.zeros(*begun.shape[:2], num_complete - first + 1, begun.shape[2], device=k.device)
        sums[:, :, 0] = begun
        for side, rows in ((0, k), (1, v)):
            sums[side].index_add_(1, groups, rows[:, known - start :].float())
        self._means[layer, :, :, first:num_complete] = sums[:, :, :-1] / size
        self._begun[layer] = sums[:, :, -1]
        self._num_tokens[layer] = end

    def catch_up(self, cache: FullCache) -> None:
        """Takes the tokens of `cache` that are not known yet; all of them must be final."""
        for layer in range(self._num_layers):
            for start in range(self._num_tokens[layer], cache.length, READ_TOKENS):
                self.observe(layer, start, *cache.read(layer, start, min(start + READ_TOKENS, cache.length)))

    def rest(self, layer: int, positions: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Summary:
        """Summary of all complete groups, without the tokens at `positions` [H, n].

        Their keys and values are `k`, `v` [H, n, D].
        """
        num_groups = self._num_tokens[layer] // self.group_tokens
        heads, dim = k.shape[0], k.shape[2]
        sums = torch.zeros(2, heads, num_groups + 1, dim, device=k.device)  # the last one for tokens of no such group
        sums[:, :, :num_groups] = self._means[layer, :, :, :num_groups]
        sums *= self.group_tokens
        counts = torch.full((heads, num_groups + 1), float(self.group_tokens), device=k.device)
        groups = (positions // self.group_tokens).clamp_max(num_groups)
        counts.scatter_add_(1, groups, torch.full_like(groups, -1, dtype=counts.dtype))
        for side, rows in ((0, k), (1, v)):
            sums[side].scatter_add_(1, groups[..., None].expand(-1, -1, dim), -rows.float())
        counts = counts[:, :num_groups]
        means = sums[:, :, :num_groups] / counts.clamp_min(1)[..., None]
        # What is chosen as a whole leaves rounding errors for means, and no weight.
        return Summary(means[0].to(k.dtype), means[1].to(k.dtype), counts.log())
