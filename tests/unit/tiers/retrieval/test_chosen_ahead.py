"""Chunks of layers in blocks are chosen one update ahead and copied as the blocks of the next pass go by."""

from __future__ import annotations

from contextlib import closing

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.all_caches import (
    SHAPE,
    PoisonedDeviceTier,
    Reference,
    assert_same_tokens,
    forward,
    full_cache,
    read_prompt,
)
from tiers.base import CacheShape
from tiers.block_layer import BlockLayer
from tiers.retrieval.mean_key_rule import MeanKeyRule
from tiers.retrieval.selection import RetrievalSelection

REPEATABLE = settings(derandomize=True, deadline=None, max_examples=60)
HEADS, DIM = SHAPE.num_kv_heads, SHAPE.head_dim


def queries_of(num_layers: int, seed: int) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {layer: torch.randn(HEADS, 2, 3, DIM, generator=generator) for layer in range(num_layers)}


class Sequence:
    """A full cache with a prompt, its reference, and a selection that chooses ahead."""

    def __init__(self, tiers: str, num_tokens: int, *, budget: int, chunk_size: int, window: int | None = None):
        shape = CacheShape(num_layers=len(tiers), num_kv_heads=HEADS, head_dim=DIM, dtype=torch.float32)
        windows, device_tier = [window] * len(tiers), PoisonedDeviceTier()
        self.cache = full_cache(tiers, capacity=400, windows=windows)
        self.reference = Reference(len(tiers))
        read_prompt(self.cache, self.reference.append(num_tokens, 1), 50)
        rule = MeanKeyRule(shape, 400, chunk_size, device_tier)
        size = (len(self.cache.layers_in_blocks), 2, HEADS * budget, DIM)
        ahead = device_tier.allocate(*size, dtype=torch.float32).zero_()
        self.selection = RetrievalSelection(self.cache, rule, windows, budget, 0.25, None, ahead)
        self.num_layers = len(tiers)

    def verify(self, num_new: int, num_kept: int, seed: int) -> None:
        """A pass over so many new tokens, of which some stay."""
        forward(self.cache, self.reference.append(num_new, seed))
        length = self.reference.length - num_new + num_kept
        self.reference.truncate(length)
        self.cache.truncate(length)

    def rebuild(self, seed: int) -> list[torch.Tensor]:
        """The positions that the update brings of each layer; its keys and values are the true ones."""
        update = self.selection.rebuild(queries_of(self.num_layers, seed))
        assert (update.is_rebuild, update.length) == (True, self.reference.length)
        positions = []
        for layer, new in enumerate(update.layers):
            k, v = self.reference.read(layer, 0, self.reference.length)
            for head, at in enumerate(new.positions):
                assert (at.diff() > 0).all()
                assert_same_tokens((new.k[head], new.v[head]), (k[head, at], v[head, at]))
            positions.append(new.positions)
        return positions

    def follow(self, seed: int) -> None:
        for layer, new in enumerate((update := self.selection.follow(queries_of(self.num_layers, seed))).layers):
            assert_same_tokens((new.k, new.v), self.reference.read(layer, update.start, update.length))


@pytest.fixture
def fetched(monkeypatch):
    """The numbers of chunks fetched from layers in blocks, as they come."""
    numbers, gather = [], BlockLayer.gather
    monkeypatch.setattr(
        BlockLayer, "gather", lambda layer, ids, size: numbers.append(ids.shape[1]) or gather(layer, ids, size)
    )
    return numbers


@REPEATABLE
@given(
    tiers=st.sampled_from(["h", "s", "dh", "shd"]),
    num_tokens=st.integers(1, 150),
    chunk_size=st.integers(1, 20),
    num_budget_chunks=st.integers(1, 20),
    steps=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6), st.booleans()), min_size=1, max_size=12),
)
def test_every_update_brings_true_tokens(tiers, num_tokens, chunk_size, num_budget_chunks, steps):
    """Tokens move from the tail to blocks between choice and pass; others are rolled back."""
    sequence = Sequence(tiers, num_tokens, budget=num_budget_chunks * chunk_size, chunk_size=chunk_size)
    with closing(sequence.cache):
        sequence.rebuild(0)
        for seed, (num_new, num_kept, is_rebuild) in enumerate(steps, start=100):
            length = sequence.reference.length
            sequence.verify(num_new, min(num_new, num_kept), seed)
            if not is_rebuild:
                sequence.follow(seed)
                continue
            positions = sequence.rebuild(seed)
            assert len({layer.shape for layer in positions}) == 1
            behind = set(range(length // chunk_size * chunk_size, sequence.reference.length))
            assert all(behind <= set(at.tolist()) for layer in positions for at in layer), "all newer tokens are in"


def test_only_the_first_rebuild_fetches(fetched):
    sequence = Sequence("shd", 130, budget=32, chunk_size=8)
    with closing(sequence.cache):
        sequence.rebuild(0)
        assert fetched == [4, 4]
        for seed in range(1, 9):
            sequence.verify(5, 3, seed)
            if seed % 3:
                sequence.rebuild(seed)
            else:
                sequence.follow(seed)
        assert fetched == [4, 4]


def test_chunks_are_those_that_the_queries_of_the_update_before_ask_for():
    sequence, at_once = (Sequence("h", 130, budget=32, chunk_size=8) for _ in range(2))
    at_once.selection._ahead_buffers = {}
    with closing(sequence.cache), closing(at_once.cache):
        sequence.rebuild(0)
        sequence.follow(7)  # these queries choose
        wanted = at_once.rebuild(7)
        sequence.verify(4, 2, 5)
        (positions,) = sequence.rebuild(9)
        assert positions[:, :32].tolist() == wanted[0][:, :32].tolist()
        assert positions[:, 32:].tolist() == [[128, 129, 130, 131]] * HEADS


@pytest.mark.parametrize("tiers", ["d", "h"])
def test_without_room_to_collect_chunks_are_chosen_at_once_among_all_there_are(tiers):
    sequence = Sequence(tiers, 130, budget=32, chunk_size=8)
    sequence.selection._ahead_buffers = {}
    with closing(sequence.cache):
        sequence.rebuild(0)
        for seed in range(10):
            sequence.verify(6, 6, seed)
            sequence.follow(seed)
        (positions,) = sequence.rebuild(1)
        assert positions.shape[1] == 32 + 190 % 8, "the budget and the incomplete chunk, no more"
        assert positions[0, -1] == 189


def test_a_pass_that_failed_has_copied_nothing(fetched):
    sequence = Sequence("hs", 130, budget=32, chunk_size=8)
    with closing(sequence.cache):
        sequence.rebuild(0)
        new = sequence.reference.append(4, 3)
        sequence.cache.begin(4)
        sequence.cache.append(0, *new[0])
        for _ in sequence.cache.segments(0):
            pass
        sequence.cache.abort()
        sequence.reference.truncate(130)
        sequence.verify(4, 4, 4)
        sequence.rebuild(5)
        assert fetched == [4, 4, 4, 4], "fetched, as at first"


def test_a_sequence_that_is_read_again_has_nothing_chosen(fetched):
    sequence = Sequence("hd", 130, budget=32, chunk_size=8)
    with closing(sequence.cache):
        sequence.rebuild(0)
        sequence.selection.begin_reading()
        read_prompt(sequence.cache, [sequence.reference.read(layer, 0, 130) for layer in range(2)], 50)
        sequence.verify(4, 4, 4)
        sequence.rebuild(5)
        assert fetched == [4, 4]


def test_what_a_sliding_window_has_left_is_finite():
    sequence = Sequence("h", 150, budget=120, chunk_size=8, window=20)
    with closing(sequence.cache):
        selection = sequence.selection
        for _ in selection.rebuild(queries_of(1, 1)).layers:
            pass
        for seed in range(2, 6):
            sequence.verify(6, 6, seed)
            (new,) = selection.rebuild(queries_of(1, seed)).layers
            assert new.k.isfinite().all() and new.v.isfinite().all()
            k, v = sequence.reference.read(0, 0, sequence.reference.length)
            for head, at in enumerate(new.positions):
                seen = at > sequence.reference.length - 20
                assert_same_tokens((new.k[head, seen], new.v[head, seen]), (k[head, at[seen]], v[head, at[seen]]))
