"""Every branch of the real loop: each random decision is taken in all ways, and probabilities are multiplied.

No noise, so a law that is off by 1e-12 is wrong. Rounds that end in the same state are merged: what follows depends
on the state alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod

import torch

from orchestrator.hierarchy import Hierarchy
from tests.support.toy_models import Setup
from workers.acceptance import RandomSource
from workers.messages import Draft


class BranchingRandom:
    """Follows a path of decisions, then takes the first possible way at each; see workers.acceptance.RandomSource."""

    def __init__(self, path: list[int]):
        self.taken: list[int] = []
        self._path, self._ways, self._weights = path, [], []

    def start_round(self, index: int) -> None:
        pass

    def choose(self, probs: torch.Tensor, position: int, purpose: int) -> int:
        return self._branch(probs.tolist())

    def accept(self, probability: float, position: int, purpose: int) -> bool:
        return bool(self._branch([1 - probability, probability]))

    def race(self, probs: torch.Tensor, position: int) -> int:
        raise NotImplementedError("races share their noise between levels: no tree of decisions")

    def _branch(self, weights: list[float]) -> int:
        """Weights are multiplied as they are: what is not normalised makes the sum of all branches differ from 1."""
        ways = [way for way, weight in enumerate(weights) if weight > 0]
        depth = len(self.taken)
        way = self._path[depth] if depth < len(self._path) else ways[0]
        self.taken.append(way)
        self._ways.append(ways)
        self._weights.append(weights[way])
        return way

    def weight_since(self, depth: int) -> float:
        return prod(self._weights[depth:])

    def next_path(self, depth: int) -> list[int] | None:
        """The next path that shares the first `depth` decisions; None after the last one."""
        for at in range(len(self.taken) - 1, depth - 1, -1):
            later = [way for way in self._ways[at] if way > self.taken[at]]
            if later:
                return [*self.taken[:at], later[0]]
        return None


def outcomes(
    build: Callable[[RandomSource], Hierarchy], path: list[int], num_rounds: int
) -> Iterator[tuple[float, list[int], Hierarchy]]:
    """All ways to go on after `path`: probability, whole path and the hierarchy after `num_rounds` rounds."""
    next_path: list[int] | None = path
    while next_path is not None:
        random = BranchingRandom(next_path)
        hierarchy = build(random)
        hierarchy.start()
        for _ in range(num_rounds):
            hierarchy.round()
        yield random.weight_since(len(path)), random.taken, hierarchy
        next_path = random.next_path(len(path))


def joint_law(setup: Setup, num_tokens: int) -> dict[tuple[int, ...], float]:
    """The exact law of the first `num_tokens` tokens that the loop generates."""
    law: dict[tuple[int, ...], float] = {}
    unfinished: list[tuple[float, list[int]]] = [(1.0, [])]
    num_rounds = 0
    while unfinished:
        merged: dict[str, tuple[float, list[int]]] = {}
        for weight, path in unfinished:
            for branch_weight, taken, hierarchy in outcomes(setup.build, path, num_rounds):
                generated = hierarchy.session.generated
                if len(generated) >= num_tokens:
                    tokens = tuple(generated[:num_tokens])
                    law[tokens] = law.get(tokens, 0.0) + weight * branch_weight
                else:
                    state = _state(hierarchy)
                    merged[state] = (merged.get(state, (0.0,))[0] + weight * branch_weight, taken)
        unfinished = list(merged.values())
        num_rounds += 1
    return law


def _state(hierarchy: Hierarchy) -> str:
    """All that the rest of the run depends on: plain attributes of the roles, their models and the policy."""
    holders: list[object] = [hierarchy.rebuild_policy]
    for role in (hierarchy.verifier, hierarchy.retriever, hierarchy.drafter):
        if role is not None:
            holders += [role, *([role.model] if hasattr(role, "model") else [])]
    holders += [part for part in (hierarchy._ahead, hierarchy.pace) if part is not None]
    kinds = (int, float, list, dict, Draft)
    plain = [{k: v for k, v in vars(holder).items() if isinstance(v, kinds)} for holder in holders]
    return repr((hierarchy.session.generated, plain))
