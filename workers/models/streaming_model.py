"""Level 1: the drafter on its StreamingLLM cache."""

from __future__ import annotations

import torch

from tiers.streaming_llm_cache import StreamingLLMCache
from workers.models.causal_model import DraftingModel


class StreamingModel:
    """The drafter on its StreamingLLM cache; see workers.level.ReadingModel."""

    def __init__(self, model: DraftingModel, cache: StreamingLLMCache):
        self._model, self._cache, self.vocab_size = model, cache, model.vocab_size
        self._tokens: list[int] = []

    @property
    def length(self) -> int:
        """Number of tokens of the sequence, of which the cache holds sinks and window."""
        return len(self._tokens)

    def prefill(self, tokens: list[int]) -> None:
        self._cache.reset()
        self._tokens = []
        # Positions are slots, so whatever the sequence's length, these are all there will be.
        self._model.start_sequence(self._cache.capacity)
        if tokens:
            self.append(tokens, 1)

    def append(self, tokens: list[int], num_logits: int) -> torch.Tensor:
        num_before = len(self._tokens)
        self._tokens += tokens  # in place: of a long sequence a copy takes as long as a token
        try:
            return self._read(tokens, num_before, num_logits)
        except BaseException:
            del self._tokens[num_before:]
            raise

    def _read(self, tokens: list[int], num_before: int, num_logits: int) -> torch.Tensor:
        """Reads the newest `tokens`, which follow `num_before` others, or all that the window then holds."""
        cache = self._cache
        start = cache.window_start_for(len(self._tokens))
        if start != cache.window_start or cache.length != cache.slot(num_before):
            cache.reset()
            cache.window_start = start
            tokens = self._tokens[: cache.sinks] + self._tokens[max(start, cache.sinks) :]
        # The target's vocabulary may be padded to more ids: any other token will do for these, in a draft.
        known = [min(token, self._model.vocab_size - 1) for token in tokens]
        return self._model.forward(known, cache, num_logits)

    def truncate(self, length: int) -> None:
        """Forgets all but the first `length` tokens.

        A roll back to before the window's start empties the cache: the next `append` reads again what it needs.
        """
        del self._tokens[length:]
        slot = self._cache.slot(length)
        if length >= self._cache.window_start and slot <= self._cache.length:
            self._cache.truncate(slot)
        elif length < self._cache.window_start:
            self._cache.reset()
