"""workers/process/update_path.py: by whichever way true keys and values come, the retrieval cache holds the same."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tiers.base import CacheShape
from tiers.device_tier import DeviceTier
from tiers.quantised_retrieval_cache import make_retrieval_cache
from tiers.retrieval.context_summary import Summary
from tiers.retrieval_cache import LayerUpdate, RetrievalUpdate
from tiers.shared_memory import AttachedPart, SharedArena
from workers.messages import Call, MakeUpdate, Reply, TakeUpdate, UpdateNotice
from workers.models.retrieval_model import ReceivingRetrievalModel, SharedRetrievalModel
from workers.process.channel import from_frames, to_frames
from workers.process.tensor_frames import from_raw, to_raw
from workers.process.update_path import (
    Carried,
    Carrying,
    IntoItsMemory,
    SameProcess,
)
from workers.retrieval_drafter import RetrievalDrafter
from workers.target_verifier import TargetVerifier

CPU = torch.device("cpu")
NUM_LAYERS, NUM_HEADS, DIM = 2, 3, 4
BUDGET, TAIL, SLACK, NUM_SUMMARIES = 8, 40, 4, 6
ARENA_BYTES = 1 << 20
WAYS = ("same process", "its memory", "carried")


class Weights:
    """A model that is asked for its vocabulary, and told of prompts."""

    vocab_size = 5

    def __init__(self):
        self.prompts: list[int] = []

    def start_sequence(self, num_prompt_tokens: int) -> None:
        self.prompts.append(num_prompt_tokens)


def shape_of(num_heads: int) -> CacheShape:
    return CacheShape(num_layers=NUM_LAYERS, num_kv_heads=num_heads, head_dim=DIM, dtype=torch.float32)


def cache_in(tier, num_heads: int = NUM_HEADS, bits: int | None = None):
    return make_retrieval_cache(bits, shape_of(num_heads), BUDGET, TAIL, SLACK, tier, NUM_SUMMARIES)


def updates() -> list[RetrievalUpdate]:
    """A rebuild, two that follow, one of them without a token, and another rebuild."""
    torch.manual_seed(0)

    def rebuild(length: int, num_tokens: int, num_groups: int):
        def layers() -> Iterator[LayerUpdate]:
            for _ in range(NUM_LAYERS):
                positions = torch.arange(num_tokens).expand(NUM_HEADS, -1) * 2
                summary = Summary(
                    torch.randn(NUM_HEADS, num_groups, DIM),
                    torch.randn(NUM_HEADS, num_groups, DIM),
                    torch.randn(NUM_HEADS, num_groups),
                )
                k, v = torch.randn(2, NUM_HEADS, num_tokens, DIM)
                yield LayerUpdate(k, v, positions, summary if num_groups is not None else None)

        return RetrievalUpdate(is_rebuild=True, start=0, length=length, layers=list(layers()))

    def follow(start: int, length: int):
        layers = [LayerUpdate(*torch.randn(2, NUM_HEADS, length - start, DIM)) for _ in range(NUM_LAYERS)]
        return RetrievalUpdate(
            is_rebuild=False, start=start, length=length, layers=layers if layers[0].k.numel() else []
        )

    return [rebuild(20, 8, 3), follow(20, 23), follow(23, 23), rebuild(30, 7, 0), follow(30, 31)]


def part_of(update: RetrievalUpdate, heads: slice) -> RetrievalUpdate:
    layers = [
        LayerUpdate(
            layer.k[heads],
            layer.v[heads],
            None if layer.positions is None else layer.positions[heads],
            None if layer.summary is None else Summary(*(part[heads] for part in summary_parts(layer.summary))),
        )
        for layer in update.layers
    ]
    return RetrievalUpdate(is_rebuild=update.is_rebuild, start=update.start, length=update.length, layers=layers)


def summary_parts(summary: Summary) -> tuple[torch.Tensor, ...]:
    return summary.k, summary.v, summary.log_count


def contents(cache) -> list[torch.Tensor]:
    """What attention would see, layer by layer."""
    seen = []
    for layer in range(NUM_LAYERS):
        for segment in cache.segments(layer):
            end = segment.k.shape[1] - segment.num_pad
            seen += [segment.k[:, :end], segment.v[:, :end]]
            seen += [] if segment.positions is None else [segment.positions[:, :end]]
            seen += [] if segment.bias is None else [segment.bias]
    return [tensor.clone() for tensor in seen]


def crossed(message):
    return from_frames([bytes(frame) for frame in to_frames(message, to_raw)], from_raw)


class FakeTargetModel:
    """The target's model of one rank: hands out parts of the updates."""

    def __init__(self, heads: slice):
        self._updates = iter(part_of(update, heads) for update in updates())

    def retrieval_update(self, *, rebuild: bool, budget: int | None = None) -> RetrievalUpdate:
        return next(self._updates)


def verifier_of(heads: slice, publisher) -> TargetVerifier:
    return TargetVerifier(FakeTargetModel(heads), coupling=None, publisher=publisher)


HEADS = {1: [slice(0, 3)], 2: [slice(0, 2), slice(2, 3)], 4: [slice(0, 1), slice(1, 2), slice(1, 2), slice(2, 3)]}
"""By the number of ranks; of four, two share a head."""


def ends_of(way: str, num_ranks: int, bits: int | None):
    """A publisher for each rank, and the retriever's model and cache."""
    heads = HEADS[num_ranks]
    writers = [index == 0 or heads[index] != heads[index - 1] for index in range(num_ranks)]
    if way == "same process":
        both = SameProcess()
        cache = cache_in(DeviceTier(CPU), bits=bits)
        return [both], ReceivingRetrievalModel(Weights(), cache, receiver=both), cache
    if way == "carried":
        cache = cache_in(DeviceTier(CPU), bits=bits)
        publishers = [Carrying(sends=writes) for writes in writers]
        return publishers, ReceivingRetrievalModel(Weights(), cache, receiver=Carried()), cache
    arena = SharedArena(ARENA_BYTES, CPU)
    cache = cache_in(arena, bits=bits)
    parts = [AttachedPart(arena.description(), part.start) for part in heads]
    publishers = [
        IntoItsMemory(cache_in(part, own.stop - own.start, bits), writes=writes)
        for part, own, writes in zip(parts, heads, writers, strict=True)
    ]
    return publishers, SharedRetrievalModel(Weights(), cache), cache


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize(
    ("way", "num_ranks"), [("same process", 1)] + [(way, ranks) for way in WAYS[1:] for ranks in HEADS]
)
def test_the_cache_holds_what_a_cache_of_one_process_does(way, num_ranks, bits):
    publishers, model, cache = ends_of(way, num_ranks, bits)
    verifiers = [verifier_of(heads, publisher) for heads, publisher in zip(HEADS[num_ranks], publishers, strict=True)]
    retriever = RetrievalDrafter(model, coupling=None)
    retriever.prefill(list(range(40)))
    plain = cache_in(DeviceTier(CPU), bits=bits)
    for update in updates():
        notices = [crossed(Reply(1, each.retrieval_update(rebuild=True))).result for each in verifiers]
        retriever.refresh(crossed(Call(1, TakeUpdate(notices))).request.notices)
        plain.load(update)
        assert cache.length == plain.length
        for one, other in zip(contents(cache), contents(plain), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(("way", "told"), [("same process", []), ("its memory", [40]), ("carried", [40])])
def test_weights_apart_from_the_verifiers_are_told_how_long_the_prompt_is(way, told):
    """The rotation of a position may depend on it; on the verifier's own weights it is the verifier who says so."""
    _, model, _ = ends_of(way, 1, None)
    RetrievalDrafter(model, coupling=None).prefill(list(range(40)))
    assert model._model.prompts == told


def test_where_memory_is_shared_no_tensor_travels():
    publishers, _, _ = ends_of("its memory", 1, None)
    notice = verifier_of(slice(0, 3), publishers[0]).retrieval_update(rebuild=True)
    assert len(to_frames(Reply(1, notice), to_raw)) == 1 and notice.carried is None
    assert (notice.num_slots, notice.num_summaries) == (8, [3, 3])


def test_a_rank_that_shares_a_head_makes_its_update_but_neither_writes_nor_sends_it():
    made = []

    def layers():
        for layer in updates()[0].layers:
            made.append(layer)
            yield layer

    lazy = RetrievalUpdate(is_rebuild=True, start=0, length=20, layers=layers())
    assert Carrying(sends=False).publish(lazy).carried is None and len(made) == NUM_LAYERS
    cache = cache_in(DeviceTier(CPU))
    lazy.layers = layers()
    notice = IntoItsMemory(cache, writes=False).publish(lazy)
    assert notice == UpdateNotice(is_rebuild=True, length=20) and len(made) == 2 * NUM_LAYERS and cache.length == 0


def test_without_a_publisher_updates_are_handed_over_as_they_are():
    update = verifier_of(slice(0, 3), None).retrieval_update(rebuild=True)
    assert isinstance(update, RetrievalUpdate) and update.is_rebuild and update.length == 20


def test_requests_of_an_update_cross():
    assert crossed(Call(1, MakeUpdate(True))) == Call(1, MakeUpdate(True))
