"""Updates of the retrieval cache from the full cache: chosen chunks at a rebuild, true keys and values in between."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tiers.base import oldest_seen, tokens_of_chunks
from tiers.full_cache import FullCache
from tiers.retrieval.context_summary import ContextSummary, Summary
from tiers.retrieval.rule import RetrievalRule
from tiers.retrieval_cache import LayerUpdate, RetrievalUpdate


@dataclass(slots=True)
class _Choice:
    """Chunk ids [H, m] of some layers, made within `budget` when the sequence had `num_tokens` tokens."""

    num_tokens: int
    budget: int
    chunk_ids: dict[int, torch.Tensor]


class RetrievalSelection:
    """Fills a budget of tokens, per layer and kv head: the first chunk, the newest tokens, the best-scored chunks.

    `budget` may be set to another, no larger than the first: it holds from the next choice on.

    `newest_share` of the budget goes to the newest tokens; with 1, the cache is a recent window with a sink, the
    usual alternative to retrieval. `windows[layer]` is the layer's sliding window in tokens, or None. `summary` tells
    of the tokens that are not chosen, in layers without a window; None leaves them out.

    With `ahead` [layers in blocks, 2, H * budget, D] the chunks of layers in blocks are chosen one update ahead and
    copied there as the blocks pass in the verification between; without, a rebuild fetches them.
    """

    def __init__(
        self,
        cache: FullCache,
        rule: RetrievalRule,
        windows: list[int | None],
        budget: int,
        newest_share: float,
        summary: ContextSummary | None = None,
        ahead: torch.Tensor | None = None,
    ):
        self.rule, self._summary = rule, summary
        self._cache, self._windows, self.budget, self._newest_share = cache, windows, budget, newest_share
        self._ahead_buffers = {} if ahead is None else dict(zip(cache.layers_in_blocks, ahead, strict=True))
        self._ahead: _Choice | None = None
        self._num_sent = 0

    def reset(self) -> None:
        """Forgets the sequence: a new one begins."""
        self.rule.reset()
        self.begin_reading()

    def begin_reading(self) -> None:
        """Tells that the sequence will be read, or read again, from its first token."""
        self.rule.begin_reading()
        if self._summary is not None:
            self._summary.reset()
        self._ahead = None
        self._num_sent = 0

    def observe(self, layer: int, start: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Takes keys and values [H, T, D] that are final, as prefill appends them from position `start` on."""
        self.rule.observe(layer, start, k)
        if self._summary is not None:
            self._summary.observe(layer, start, k, v)

    def follow(self, queries: dict[int, torch.Tensor]) -> RetrievalUpdate:
        """Brings keys and values of the tokens since the last update; `queries` as for `rebuild`."""
        start, num_tokens = min(self._num_sent, self._cache.length), self._cache.length
        self._num_sent = num_tokens
        layers = range(len(self._windows)) if start < num_tokens else ()
        new = (LayerUpdate(*self._cache.read(layer, start, num_tokens)) for layer in layers)
        if self._ahead_buffers:
            self.rule.catch_up(self._cache)
            self._ahead = self._new_choice()
            for layer in self._ahead_buffers:
                self._choose_ahead(layer, queries[layer], self._ahead)
        return RetrievalUpdate(is_rebuild=False, start=start, length=num_tokens, layers=new)

    def rebuild(self, queries: dict[int, torch.Tensor]) -> RetrievalUpdate:
        """Brings the chunks that matter to `queries` (per layer [H, G, T, D], T >= 1); all tokens must be final."""
        self.rule.catch_up(self._cache)
        if self._summary is not None:
            self._summary.catch_up(self._cache)
        self._num_sent = self._cache.length
        choice = self._ahead if self._ahead is not None and self._cache.has_collected else None
        made_now = self._new_choice()
        self._ahead = made_now if self._ahead_buffers else None
        layers = (self._retrieve(layer, queries[layer], choice or made_now) for layer in range(len(self._windows)))
        return RetrievalUpdate(is_rebuild=True, start=0, length=self._cache.length, layers=layers)

    def _new_choice(self) -> _Choice:
        """A choice of no layer yet, among the tokens that there are now."""
        return _Choice(self._cache.length, self.budget, {})

    def _choose_ahead(self, layer: int, q: torch.Tensor, choice: _Choice) -> None:
        """Adds a layer to `choice`, and asks for its chunks to be copied in the next pass."""
        ids = choice.chunk_ids[layer] = self._choose(layer, q, choice)
        self._cache.collect(layer, ids, self.rule.chunk_size, self._ahead_buffers[layer])

    def _choose(self, layer: int, q: torch.Tensor, choice: _Choice) -> torch.Tensor:
        """Ids [H, m] of the chunks chosen for `q` among the tokens of `choice`, within its budget."""
        size, num_tokens = self.rule.chunk_size, choice.num_tokens
        num_chunks = min(choice.budget, num_tokens) // size
        # The first chunk has its place, whatever the share.
        num_newest = min(num_chunks, max(1, min(num_chunks - 1, round(num_chunks * self._newest_share))))
        oldest = oldest_seen(num_tokens, self._windows[layer])
        return self.rule.select(layer, q, num_tokens // size, num_chunks, num_newest, oldest)

    def _summary_of_rest(self, layer: int, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor) -> Summary | None:
        """Summary of all but these tokens; None for a sliding window, which moves on past what is summed up."""
        if self._summary is None or self._windows[layer] is not None:
            return None
        return self._summary.rest(layer, positions, k, v)

    def _retrieve(self, layer: int, q: torch.Tensor, choice: _Choice) -> LayerUpdate:
        """Keys and values of the chosen chunks, then of the tokens behind the last chunk that could be chosen.

        A `choice` made ahead holds for the layers in it; the others choose now, as many, among the same chunks.
        """
        size, num_tokens = self.rule.chunk_size, self._cache.length
        if layer in choice.chunk_ids:
            ids = choice.chunk_ids[layer]
            k, v = self._cache.collected(layer)
        else:
            ids = self._choose(layer, q, choice)
            k, v = self._cache.gather(layer, ids, size)
        positions = tokens_of_chunks(ids, size)
        start_of_rest = choice.num_tokens // size * size
        if start_of_rest < num_tokens:
            k_rest, v_rest = self._cache.read(layer, start_of_rest, num_tokens)
            k, v = torch.cat([k, k_rest], dim=1), torch.cat([v, v_rest], dim=1)
            rest = torch.arange(start_of_rest, num_tokens, device=ids.device)
            positions = torch.cat([positions, rest.expand(ids.shape[0], -1)], dim=1)
        if self._ahead is not None and layer in self._ahead_buffers:
            self._choose_ahead(layer, q, self._ahead)
        return LayerUpdate(k, v, positions, self._summary_of_rest(layer, k, v, positions))
