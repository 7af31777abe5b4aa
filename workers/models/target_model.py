"""Level 3: the target on its full cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from tiers.base import Tier
from tiers.full_cache import FullCache
from tiers.retrieval.selection import RetrievalSelection
from tiers.retrieval_cache import RetrievalUpdate
from workers.attention.forward_pass import NOBODY, Observers
from workers.models.causal_model import CausalModel
from workers.models.layer_major import NOBODY_READS_ALONG, PromptObservers


class TargetModel:
    """The target on its full cache; see workers.target_verifier.TargetCachedModel.

    `selection` chooses what the retrieval cache gets; None where there is no retrieval level.

    Measurements may put others in the place of `observers`, which see each pass of `append`, and of
    `prompt_observers`, which see the prompt as it is read. Without the ones it was made with, the retrieval level
    learns nothing of those passes: it can then follow, and be rebuilt only after a pass that they saw.
    """

    def __init__(
        self,
        model: CausalModel,
        cache: FullCache,
        *,
        piece_tokens: int,
        hidden_tier: Tier,
        selection: RetrievalSelection | None,
    ):
        self._model, self._cache, self.vocab_size = model, cache, model.vocab_size
        self._piece_tokens, self._hidden_tier, self._selection = piece_tokens, hidden_tier, selection
        self.observers, self.prompt_observers = NOBODY, NOBODY_READS_ALONG
        if selection is not None:
            rule = selection.rule
            self.observers = Observers(self._keep_queries, rule.mass_observer, rule.chunk_size)
            self.prompt_observers = PromptObservers(on_kv=selection.observe)
        self.queries: dict[int, torch.Tensor] = {}
        """Queries of the last `append`, per layer [H, G, T, D], from position `queries_start` on."""
        self.queries_start = 0
        self.on_prefill_progress: Callable[[int, int], None] = lambda done, total: None
        """Called with the tokens read so far and in all, both counted once for each layer."""

    @property
    def length(self) -> int:
        return self._cache.length

    def prefill(self, tokens: list[int]) -> None:
        """Empties the cache and reads the prompt but for its last token, which comes with the first verification."""
        self._model.start_sequence(len(tokens) + 1)
        if self._selection is not None:
            self._selection.reset()
        self._read(tokens)

    def reread(self, tokens: list[int]) -> None:
        """Empties the cache and reads the sequence's tokens but for the last one, as the prompt was read.

        Each position keeps the rotation it had, unless the model's family changes it as a text grows.
        """
        self._model.read_again(len(tokens) + 1)
        self._read(tokens)

    def _read(self, tokens: list[int]) -> None:
        """Empties the cache and reads `tokens` layer by layer, in pieces, which bounds the memory of activations."""
        if self._selection is not None:
            self._selection.begin_reading()
        waiting: list[torch.Tensor] = []
        try:
            with self._cache.prefill(len(tokens)) as make_layer_cache:
                self._model.layer_major.prefill(
                    tokens,
                    make_layer_cache,
                    self._piece_tokens,
                    make_hidden=partial(self._allocate_hidden, waiting),
                    observers=self.prompt_observers,
                    on_progress=self.on_prefill_progress,
                )
        finally:
            for tensor in waiting:
                self._hidden_tier.free(tensor)

    def _allocate_hidden(self, waiting: list[torch.Tensor], *size: int) -> torch.Tensor:
        """The tensor where hidden states wait between layers, noted in `waiting` so that it is freed."""
        waiting.append(self._hidden_tier.allocate(*size, dtype=self._model.dtype))
        return waiting[0]

    def append(self, tokens: list[int], num_logits: int) -> torch.Tensor:
        self.queries_start = self._cache.length
        return self._model.forward(tokens, self._cache, num_logits, self.observers)

    def truncate(self, length: int) -> None:
        self._cache.truncate(length)

    def _keep_queries(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        self.queries[layer] = q

    def retrieval_update(self, *, rebuild: bool, budget: int | None = None) -> RetrievalUpdate:
        """Keys and values that the retrieval cache needs to follow, or, for a rebuild, to start anew.

        Call it after a roll back. `budget` is of the chunks to be chosen from now on, in tokens; None leaves it as it
        is.
        """
        selection = self._selection
        assert selection is not None, "there is no retrieval level"
        if budget is not None:
            selection.budget = budget
        num_final = self._cache.length - self.queries_start
        queries = {layer: q[:, :, :num_final] for layer, q in self.queries.items()}
        return selection.rebuild(queries) if rebuild else selection.follow(queries)
