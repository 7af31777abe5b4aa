"""Level 2: the target's weights on the retrieval cache. One class for each way that updates come to it."""

from __future__ import annotations

from typing import Protocol

import torch

from tiers.retrieval_cache import RetrievalCache, RetrievalUpdate
from workers.messages import UpdateNotice
from workers.models.causal_model import DraftingModel


class _OnRetrievalCache:
    """The common part of the models below: all of workers.retrieval_drafter.RetrievalCachedModel but `load`."""

    def __init__(self, model: DraftingModel, cache: RetrievalCache):
        self._model, self._cache, self.vocab_size = model, cache, model.vocab_size

    @property
    def length(self) -> int:
        return self._cache.length

    @property
    def is_full(self) -> bool:
        return self._cache.is_full

    def append(self, tokens: list[int], num_logits: int) -> torch.Tensor:
        return self._model.forward(tokens, self._cache, num_logits)

    def truncate(self, length: int) -> None:
        self._cache.truncate(length)


class RetrievalModel(_OnRetrievalCache):
    """The retrieval model beside its verifier: it is given the updates themselves."""

    def start_sequence(self, num_prompt_tokens: int) -> None:
        """Nothing: the verifier, which has the same weights, tells them of the prompt."""

    def load(self, update: RetrievalUpdate) -> None:
        """Takes the verifier's keys and values; the cache then holds the verifier's tokens."""
        self._cache.load(update)


class Receiver(Protocol):
    """The retriever's end of an update path; see workers.process.update_path."""

    is_apart: bool
    """Whether the verifier is in another process, and so has other weights."""

    def receive(self, notices: list[UpdateNotice]) -> RetrievalUpdate:
        """The update that the notices of all ranks of the verifier tell of."""


class ReceivingRetrievalModel(_OnRetrievalCache):
    """The retrieval model in a worker process: it is told of updates by notices, and gets them by `receiver`."""

    def __init__(self, model: DraftingModel, cache: RetrievalCache, *, receiver: Receiver):
        super().__init__(model, cache)
        self._receiver = receiver

    def start_sequence(self, num_prompt_tokens: int) -> None:
        """Tells the weights of a prompt of so many tokens, unless a verifier on the same ones does."""
        if self._receiver.is_apart:
            self._model.start_sequence(num_prompt_tokens)

    def load(self, notices: list[UpdateNotice]) -> None:
        """Takes the update that the notices tell of."""
        self._cache.load(self._receiver.receive(notices))


class SharedRetrievalModel(_OnRetrievalCache):
    """The retrieval model whose cache lies in memory that the verifier's processes write to."""

    def start_sequence(self, num_prompt_tokens: int) -> None:
        """Tells the weights of a prompt of so many tokens: it may fix the rotation of each position."""
        self._model.start_sequence(num_prompt_tokens)

    def load(self, notices: list[UpdateNotice]) -> None:
        """Makes what was written the cache's own: every rank wrote its heads, and as many slots as the first."""
        first = notices[0]
        self._cache.adopt(
            is_rebuild=first.is_rebuild,
            length=first.length,
            num_slots=first.num_slots,
            num_summaries=first.num_summaries,
        )
