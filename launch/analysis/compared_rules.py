"""Rules of choosing chunks or tokens that draft caches are compared by: the product's, and some for measuring alone.

name              unit     chooses by
mean_key, ...     chunk    what the product's rule of that name does: conf.schema.RetrievalRuleName
page_bound        chunk    Quest's bounds of keys
heavy_hitter      token    the attention of all queries so far (H2O)
oracle            chunk    the attention of the round to come
top_k             token    the attention of the round to come
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from conf.schema import RetrievalRuleName
from tiers.base import CacheShape, Tier
from tiers.full_cache import FullCache
from tiers.retrieval.attention_rule import DECAY, AttentionRule
from tiers.retrieval.mean_key_rule import MeanKeyRule
from tiers.retrieval.rule import MassObserver, RetrievalRule, rule_class

PAGE_BOUND, ORACLE, TOP_K, HEAVY_HITTER = "page_bound", "oracle", "top_k", "heavy_hitter"
FORESEEING = (ORACLE, TOP_K)
"""Rules that know what the tokens of a round will attend to."""


class PageBound(MeanKeyRule):
    """Quest's rule (arXiv 2406.10774, section 3.3): a chunk's score is the highest that a key within its bounds could
    have, the bounds being the least and the most of its keys in each dimension."""

    def catch_up(self, cache: FullCache) -> None:
        """Takes the bounds of all complete chunks."""
        super().catch_up(cache)
        num_tokens = cache.length // self.chunk_size * self.chunk_size
        size = (-1, self.chunk_size)
        keys = (cache.read(layer, 0, num_tokens)[0] for layer in range(self._num_layers))
        chunks = (k.view(k.shape[0], *size, k.shape[2]) for k in keys)
        self._bounds = [(k.amin(2).float(), k.amax(2).float()) for k in chunks]

    def scores(self, layer: int, q: torch.Tensor, num_chunks: int) -> torch.Tensor:
        """Mean over queries of the softmax of the bounds' scores: [H, num_chunks]."""
        low, high = (bound[:, :num_chunks].transpose(1, 2) for bound in self._bounds[layer])
        q = q.flatten(1, 2).float()
        scores = (q.clamp_min(0) @ high + q.clamp_max(0) @ low) * q.shape[-1] ** -0.5
        return torch.softmax(scores, -1).mean(1)


class TotalMass(AttentionRule):
    """The attention of all queries since the last reset, none forgotten.

    Over a whole sequence these are the heavy hitters of H2O (arXiv 2306.14048), here from the full attention of every
    query, where H2O knows only what it has not yet dropped.
    """

    def __init__(self, shape: CacheShape, capacity: int, chunk_size: int, tier: Tier):
        super().__init__(shape, capacity, chunk_size, tier, decay=1.0)
        self._remembered = self._mass.clone()

    def scores(self, layer: int, q: torch.Tensor, num_chunks: int) -> torch.Tensor:
        """Shares [H, num_chunks] of the mass on the first chunks."""
        mass = self._mass[layer, :, :num_chunks]
        return mass / mass.sum(1, keepdim=True).clamp_min(1e-9)

    def remember(self) -> None:
        """Keeps the mass as it is now for `recall`."""
        self._remembered.copy_(self._mass)

    def recall(self) -> None:
        """Makes the mass what it was at the last `remember`."""
        self._mass.copy_(self._remembered)


class AttentionListener(RetrievalRule):
    """An ear in a rule's place, which chooses nothing: it hands each token's attention on to `listen`."""

    def __init__(self, shape: CacheShape, capacity: int, tier: Tier, listen: MassObserver):
        super().__init__(shape, capacity, 1, tier)
        self._listen = listen

    @property
    def mass_observer(self) -> MassObserver:
        """Takes a layer and the mass [H, tokens] of each query."""
        return self._listen

    def scores(self, layer: int, q: torch.Tensor, num_chunks: int) -> torch.Tensor:
        """Never asked for."""
        raise AssertionError("a listener has no part in any choice")


def make_rule(
    name: str, shape: CacheShape, capacity: int, chunk_size: int, tier: Tier, tokens_per_round: int
) -> RetrievalRule:
    """A rule by its name, for a full cache of `capacity` tokens. Raises KeyError for a name that is none."""
    of_chunks, of_tokens = (shape, capacity, chunk_size, tier), (shape, capacity, 1, tier)
    makers: dict[str, Callable[[], RetrievalRule]] = {
        **{str(rule): partial(rule_class(rule), *of_chunks) for rule in RetrievalRuleName},
        # Here tokens come one by one: an older token counts for as much less as it does in whole rounds.
        RetrievalRuleName.attention: partial(AttentionRule, *of_chunks, decay=DECAY ** (1 / tokens_per_round)),
        PAGE_BOUND: partial(PageBound, *of_chunks),
        ORACLE: partial(TotalMass, *of_chunks),
        TOP_K: partial(TotalMass, *of_tokens),
        HEAVY_HITTER: partial(TotalMass, *of_tokens),
    }
    return makers[name]()


def sums_of_chunks(mass: torch.Tensor, size: int) -> torch.Tensor:
    """Sums over each `size` consecutive tokens of `mass` [H, N]: [H, chunks], the last of them perhaps of fewer."""
    if size == 1:
        return mass
    padded = torch.nn.functional.pad(mass, (0, -mass.shape[1] % size))
    return padded.view(mass.shape[0], -1, size).sum(2)
