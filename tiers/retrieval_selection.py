"""What the retrieval cache gets from the full cache: chosen chunks at a rebuild, true keys and values in between."""

from __future__ import annotations

import torch

from tiers.chunk_index import ChunkIndex
from tiers.context_summary import ContextSummary, Summary
from tiers.full_cache import FullCache
from tiers.retrieval_cache import LayerUpdate, RetrievalUpdate


class RetrievalSelection:
    """Fills a budget of tokens, per layer and kv head: the first chunk, the newest tokens, the best-scored chunks.

    `newest_share` of the budget goes to the newest tokens; with 1, the cache is a recent window with a sink, the
    usual alternative to retrieval. `windows[layer]` is the layer's sliding window in tokens, or None. `summary` tells
    of the tokens that are not chosen, in layers without a window; None leaves them out.
    """

    def __init__(
        self,
        cache: FullCache,
        index: ChunkIndex,
        windows: list[int | None],
        budget: int,
        newest_share: float,
        summary: ContextSummary | None = None,
    ):
        self.index, self._summary = index, summary
        self._cache, self._windows, self._budget, self._newest_share = cache, windows, budget, newest_share
        self._num_sent = 0

    def reset(self) -> None:
        self.index.reset()
        if self._summary is not None:
            self._summary.reset()
        self._num_sent = 0

    def observe(self, layer: int, start: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Takes keys and values [H, T, D] that are final, as prefill appends them from position `start` on."""
        self.index.observe(layer, start, k)
        if self._summary is not None:
            self._summary.observe(layer, start, k, v)

    def follow(self) -> RetrievalUpdate:
        """Keys and values of the tokens since the last update."""
        start, num_tokens = min(self._num_sent, self._cache.length), self._cache.length
        self._num_sent = num_tokens
        layers = range(len(self._windows)) if start < num_tokens else ()
        new = (LayerUpdate(*self._cache.read(layer, start, num_tokens)) for layer in layers)
        return RetrievalUpdate(is_rebuild=False, start=start, length=num_tokens, layers=new)

    def rebuild(self, queries: dict[int, torch.Tensor]) -> RetrievalUpdate:
        """The chunks that matter to `queries` (per layer [H, G, T, D], T >= 1); all of the cache's tokens are final."""
        self.index.catch_up(self._cache)
        if self._summary is not None:
            self._summary.catch_up(self._cache)
        self._num_sent = self._cache.length
        layers = (self._retrieve(layer, queries[layer]) for layer in range(len(self._windows)))
        return RetrievalUpdate(is_rebuild=True, start=0, length=self._cache.length, layers=layers)

    def _summary_of_rest(self, layer: int, k, v, positions) -> Summary | None:
        """A sliding window moves on past what is summed up: its layers do without."""
        if self._summary is None or self._windows[layer] is not None:
            return None
        return self._summary.rest(layer, positions, k, v)

    def _retrieve(self, layer: int, q: torch.Tensor) -> LayerUpdate:
        """The chosen chunks, then the last, incomplete chunk."""
        size, num_tokens, window = self.index.chunk_size, self._cache.length, self._windows[layer]
        num_chunks = min(self._budget, num_tokens) // size
        num_newest = min(num_chunks, max(1, round(num_chunks * self._newest_share)))
        oldest = 0 if window is None else max(0, num_tokens - window + 1)
        ids = self.index.select(layer, q, num_chunks, num_newest, oldest)
        k, v = self._cache.gather(layer, ids, size)
        positions = (ids[..., None] * size + torch.arange(size, device=ids.device)).flatten(1)
        start_of_rest = num_tokens // size * size
        if start_of_rest < num_tokens:
            k_rest, v_rest = self._cache.read(layer, start_of_rest, num_tokens)
            k, v = torch.cat([k, k_rest], dim=1), torch.cat([v, v_rest], dim=1)
            rest = torch.arange(start_of_rest, num_tokens, device=ids.device)
            positions = torch.cat([positions, rest.expand(ids.shape[0], -1)], dim=1)
        return LayerUpdate(k, v, positions, self._summary_of_rest(layer, k, v, positions))
