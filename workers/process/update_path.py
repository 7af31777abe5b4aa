"""How true keys and values get from the verifier to the retrieval cache: three ways, one for each place it may be in.

    where the retriever is                 UpdatePath      the verifier's end   the notice       the retriever's model
    in the verifier's process              same_process    keeps the update     says there is    loads what was kept
                                                                                one
    on its device, in another process      shared_memory   writes to that       says what was    adopts what was
                                                           process's memory     written          written
    elsewhere                              carried         sends the tensors    carries them     loads them

A TargetVerifier publishes by its `publisher`; the retriever's model is a ReceivingRetrievalModel with the receiver of
the same path, or a SharedRetrievalModel where memory is shared.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from enum import StrEnum

import torch

from tiers.retrieval.context_summary import Summary
from tiers.retrieval_cache import LayerUpdate, RetrievalCache, RetrievalUpdate
from workers.messages import UpdateNotice


class UpdatePath(StrEnum):
    """One of the three ways that updates go."""

    same_process = "same_process"
    shared_memory = "shared_memory"
    carried = "carried"


class SameProcess:
    """Both ends in one process: the publisher keeps an update until the receiver takes it."""

    is_apart = False

    def __init__(self) -> None:
        self._update: RetrievalUpdate | None = None

    def publish(self, update: RetrievalUpdate) -> UpdateNotice:
        self._update = update
        return UpdateNotice(is_rebuild=update.is_rebuild, start=update.start, length=update.length)

    def receive(self, notices: list[UpdateNotice]) -> RetrievalUpdate:
        """Hands out the kept update; the notices only said that there is one."""
        update, self._update = self._update, None
        assert update is not None, "a notice without an update"
        return update


class IntoItsMemory:
    """The verifier's end where it maps the retriever's memory: `cache` lies in there and has the rank's own heads.

    Of ranks that share a kv head, one `writes` it. All is written when the call that publishes has ended: the other
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


class Carrying:
    """The verifier's end where the tensors must travel. Of ranks that share a kv head, one `sends` it."""

    def __init__(self, *, sends: bool):
        self._sends = sends

    def publish(self, update: RetrievalUpdate) -> UpdateNotice:
        layers = [_tensors_of(layer) for layer in update.layers]
        carried = layers if self._sends else None
        return UpdateNotice(is_rebuild=update.is_rebuild, start=update.start, length=update.length, carried=carried)


class Carried:
    """The retriever's end where the tensors travelled: joins the heads of all ranks, layer by layer."""

    is_apart = True

    def receive(self, notices: list[UpdateNotice]) -> RetrievalUpdate:
        first = notices[0]
        parts = [notice.carried for notice in notices if notice.carried is not None]
        layers = (_joined(parts_of_layer) for parts_of_layer in zip(*parts, strict=True))
        return RetrievalUpdate(is_rebuild=first.is_rebuild, start=first.start, length=first.length, layers=layers)


def _tensors_of(layer: LayerUpdate) -> list[torch.Tensor | None]:
    """The tensors of a layer in the order that UpdateNotice.carried has them in."""
    summary = layer.summary
    rest = [None] * 3 if summary is None else [summary.k, summary.v, summary.log_count]
    return [layer.k, layer.v, layer.positions, *rest]


def _joined(parts: Iterable[list[torch.Tensor | None]]) -> LayerUpdate:
    """A layer's update from its parts, one list of tensors for each sending rank, joined along the heads."""
    k, v, positions, *rest = (_concatenated(pieces) for pieces in zip(*parts, strict=True))
    assert k is not None and v is not None, "an update without keys or values"
    summary = [tensor for tensor in rest if tensor is not None]
    return LayerUpdate(k, v, positions, Summary(*summary) if summary else None)


def _concatenated(pieces: tuple[torch.Tensor | None, ...]) -> torch.Tensor | None:
    """The pieces [H of a rank, ...] as one tensor, or None where the ranks have none."""
    present = [piece for piece in pieces if piece is not None]
    assert len(present) in (0, len(pieces)), f"a tensor of {len(present)} ranks, of {len(pieces)}"
    return torch.cat(present) if present else None
