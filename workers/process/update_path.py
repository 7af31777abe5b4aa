"""How true keys and values get from the verifier to the retrieval cache: three ways, one for each place it may be in.

    where the retriever is                 the verifier            the notice              the retriever
    in the verifier's process              keeps the update        says that there is one  loads it
    on its device, in another process      writes to its memory    says what was written   adopts it
    elsewhere                              sends the tensors       carries them            loads them

A verifier wraps its role in a `Publishing`, a retriever in the `Taking` of the same kind.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from enum import StrEnum
from typing import Any, Protocol

import torch

from tiers.retrieval.context_summary import Summary
from tiers.retrieval_cache import LayerUpdate, RetrievalCache, RetrievalUpdate
from workers.messages import Draft, InnerStep, UpdateNotice, Verdict


class UpdatePath(StrEnum):
    """Which of the three ways updates go."""

    same_process = "same_process"
    shared_memory = "shared_memory"
    carried = "carried"


class Publisher(Protocol):
    """The verifier's end."""

    def publish(self, update: RetrievalUpdate) -> UpdateNotice: ...


class Receiver(Protocol):
    """The retriever's end."""

    def receive(self, notices: list[UpdateNotice]) -> Any:
        """What the retrieval model loads."""


class SameProcess:
    """Both ends."""

    def __init__(self):
        self._update: RetrievalUpdate | None = None

    def publish(self, update: RetrievalUpdate) -> UpdateNotice:
        self._update = update
        return UpdateNotice(is_rebuild=update.is_rebuild, start=update.start, length=update.length)

    def receive(self, notices: list[UpdateNotice]) -> RetrievalUpdate:
        update, self._update = self._update, None
        return update


class IntoItsMemory:
    """The verifier's end where it maps the retriever's memory: `cache` is a retrieval cache in there, of own heads.

    Of ranks that share a kv head one `writes` it. All is written when the call that publishes has ended: the other
    process does not wait for a stream of ours (see workers.process.background.OwnStream).
    """

    def __init__(self, cache: RetrievalCache, *, writes: bool):
        self._cache, self._writes = cache, writes

    def publish(self, update: RetrievalUpdate) -> UpdateNotice:
        if not self._writes:
            deque(update.layers, maxlen=0)  # made as they are taken, and what they do on the way must be done
            return UpdateNotice(is_rebuild=update.is_rebuild, start=update.start, length=update.length)
        self._cache.load(update)
        num_slots, num_summaries = self._cache.written
        return UpdateNotice(
            is_rebuild=update.is_rebuild,
            start=update.start,
            length=update.length,
            num_slots=num_slots,
            num_summaries=num_summaries,
        )


class FromItsMemory:
    """The retriever's end: every rank wrote its heads, and all of them as many slots as the first."""

    def receive(self, notices: list[UpdateNotice]) -> UpdateNotice:
        return notices[0]


class Carrying:
    """The verifier's end where the tensors must travel. Of ranks that share a kv head one sends it."""

    def __init__(self, *, sends: bool):
        self._sends = sends

    def publish(self, update: RetrievalUpdate) -> UpdateNotice:
        layers = [_tensors_of(layer) for layer in update.layers]
        carried = layers if self._sends else None
        return UpdateNotice(is_rebuild=update.is_rebuild, start=update.start, length=update.length, carried=carried)


class Carried:
    """The retriever's end: puts the heads of all ranks together, layer by layer."""

    def receive(self, notices: list[UpdateNotice]) -> RetrievalUpdate:
        first = notices[0]
        parts = [notice.carried for notice in notices if notice.carried is not None]
        layers = (_joined(parts_of_layer) for parts_of_layer in zip(*parts, strict=True))
        return RetrievalUpdate(is_rebuild=first.is_rebuild, start=first.start, length=first.length, layers=layers)


def _tensors_of(layer: LayerUpdate) -> list[torch.Tensor | None]:
    summary = layer.summary
    rest = [None] * 3 if summary is None else [summary.k, summary.v, summary.log_count]
    return [layer.k, layer.v, layer.positions, *rest]


def _joined(parts: Iterator[list[torch.Tensor | None]]) -> LayerUpdate:
    k, v, positions, *rest = (None if pieces[0] is None else torch.cat(pieces) for pieces in zip(*parts, strict=True))
    return LayerUpdate(k, v, positions, None if rest[0] is None else Summary(*rest))


class PublishingVerifier:
    """A verifier's role for other processes: its updates leave by `publisher`."""

    def __init__(self, verifier, publisher: Publisher):
        self._verifier, self.publisher = verifier, publisher

    def prefill(self, prompt: list[int], num_commits: int) -> None:
        self._verifier.prefill(prompt, num_commits)

    def verify(self, draft: Draft) -> Verdict:
        return self._verifier.verify(draft)

    def commit(self, tokens: list[int]) -> None:
        self._verifier.commit(tokens)

    def reread(self) -> None:
        self._verifier.reread()

    def retrieval_update(self, *, rebuild: bool, budget: int | None = None) -> UpdateNotice:
        return self.publisher.publish(self._verifier.retrieval_update(rebuild=rebuild, budget=budget))

    def state(self) -> str:
        return self._verifier.state()


class ReceivingRetriever:
    """A retriever's role for other processes: its updates come by `receiver`."""

    def __init__(self, retriever, receiver: Receiver):
        self._retriever, self._receiver = retriever, receiver

    @property
    def num_failures(self) -> int:
        return self._retriever.num_failures

    def prefill(self, prompt: list[int], num_commits: int) -> None:
        self._retriever.prefill(prompt, num_commits)

    def extend(self, after: list[int], draft: Draft, branch: int = 0) -> InnerStep:
        return self._retriever.extend(after, draft, branch)

    def commit(self, tokens: list[int]) -> None:
        self._retriever.commit(tokens)

    def refresh(self, notices: list[UpdateNotice]) -> None:
        self._retriever.refresh(self._receiver.receive(notices))

    def needs_rebuild(self) -> bool:
        return self._retriever.needs_rebuild()

    def state(self) -> str:
        return self._retriever.state()
