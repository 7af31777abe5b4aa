"""Shares of the target's attention that draft caches have in sight: by layer, by distance from a choice, of a fact.

Attention to the tokens of a context is given per kv head, the mean of its query heads, [H, N], adding up to 1: what a
cache can choose for is a kv head. Recovered is the share that goes to tokens in sight. Each class watches the tokens
that a comparison reads; see DraftComparison.watchers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from launch.analysis.compared_rules import TOP_K
from launch.analysis.draft_comparison import DraftComparison


def top_shares(mass: torch.Tensor, budgets: list[int]) -> list[torch.Tensor]:
    """The shares [H] of `mass` [H, N] that go to the best tokens of each head, for each budget of tokens."""
    sums = mass.topk(min(max(budgets), mass.shape[1])).values.cumsum(1)
    return [sums[:, min(budget, sums.shape[1]) - 1] for budget in budgets]


def share_in_sight(mass: torch.Tensor, positions: torch.Tensor, base: int) -> torch.Tensor:
    """The shares [H] of `mass` [H, N] that go to `positions` [H, n], all before `base`, and to all from `base` on."""
    return mass.gather(1, positions).sum(1) + mass[:, base:].sum(1)


class Recovery:
    """Shares of each token's attention that its best tokens recover, and that each draft cache had in sight."""

    def __init__(self, comparison: DraftComparison, budgets: list[int]):
        self._comparison, self._budgets = comparison, budgets
        self._shares: dict[tuple[str, int], dict[int, list[torch.Tensor]]] = {}

    def see(self, layer: int, mass: torch.Tensor) -> None:
        """Watches a token: see DraftComparison.watchers."""
        for budget, share in zip(self._budgets, top_shares(mass, self._budgets), strict=True):
            self._add((TOP_K, budget), layer, share)
        for draft, positions in self._comparison.held.items():
            share = share_in_sight(mass, positions[layer], self._comparison.base)
            self._add((draft.name, draft.budget), layer, share)

    def _add(self, key: tuple[str, int], layer: int, share: torch.Tensor) -> None:
        """Notes the shares [H] of one token in one layer for the cache (name, budget)."""
        self._shares.setdefault(key, {}).setdefault(layer, []).append(share.cpu())

    def shares(self) -> dict[tuple[str, int], torch.Tensor]:
        """Shares [layers, tokens, H] by (name, budget) of a cache."""
        return {
            key: torch.stack([torch.stack(layers[layer]) for layer in sorted(layers)])
            for key, layers in self._shares.items()
        }


class FactRecovery:
    """Shares of the attention to a fact, the tokens [begin, end) of the context, that draft caches had in sight."""

    def __init__(self, comparison: DraftComparison, begin: int, end: int):
        self._comparison, self._begin, self._end = comparison, begin, end
        self._recovered: dict[tuple[str, int], float] = {}
        self._total = self._num_seen = 0.0

    def see(self, layer: int, mass: torch.Tensor) -> None:
        """Watches a token: see DraftComparison.watchers."""
        self._total += float(mass[:, self._begin : self._end].sum())
        self._num_seen += len(mass)
        for draft, positions in self._comparison.held.items():
            in_fact = (positions[layer] >= self._begin) & (positions[layer] < self._end)
            key = draft.name, draft.budget
            share = float((mass.gather(1, positions[layer]) * in_fact).sum())
            self._recovered[key] = self._recovered.get(key, 0.0) + share

    @property
    def share_of_attention(self) -> float:
        """The share of all attention that goes to the fact."""
        return self._total / max(self._num_seen, 1)

    def recovered(self) -> dict[tuple[str, int], float]:
        """The share that was in sight by (name, budget) of a cache."""
        return {key: share / max(self._total, 1e-12) for key, share in self._recovered.items()}


@dataclass(slots=True)
class Distances:
    """Means over layers and heads by distance from a choice, the first being that of the first token after it."""

    recovery: list[float]
    """Shares of all attention; tokens read since the choice are in sight, too."""
    recovery_of_context: list[float]
    """Shares of the attention to the tokens that were there at the choice."""


class Locality:
    """Shares of later tokens' attention that one choice, made for the prompt's last token, goes on recovering."""

    def __init__(self, comparison: DraftComparison, budget: int):
        self._comparison, self._budget, self._base = comparison, budget, 0
        self._held: dict[str, list[torch.Tensor]] = {TOP_K: []}
        self._rows: dict[str, list[list[tuple[float, float]]]] = {}

    def see_last(self, layer: int, mass: torch.Tensor) -> None:
        """Watches the prompt's last token: its best tokens are a choice of their own."""
        self._held[TOP_K].append(mass.topk(min(self._budget, mass.shape[1])).indices)

    def keep_choice(self) -> None:
        """Keeps what the draft caches hold now as their choice."""
        self._base = self._comparison.base
        kept = {draft.name: held for draft, held in self._comparison.held.items() if draft.budget == self._budget}
        self._held |= kept

    def see(self, layer: int, mass: torch.Tensor) -> None:
        """Watches a token after the choice: see DraftComparison.watchers."""
        of_all = mass[:, : self._base].sum(1)
        for name, positions in self._held.items():
            rows = self._rows.setdefault(name, [])
            if layer == 0:
                rows.append([])
            in_sight = share_in_sight(mass, positions[layer], self._base)
            share = mass.gather(1, positions[layer]).sum(1) / of_all.clamp_min(1e-9)
            rows[-1].append((float(in_sight.mean()), float(share.mean())))

    def result(self) -> dict[str, Distances]:
        """The shares by name of the cache that chose."""
        return {name: Distances(*torch.tensor(rows).mean(1).T.tolist()) for name, rows in self._rows.items()}
