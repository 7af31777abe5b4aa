"""The retrieval cache shows the chunks of the last rebuild, then every newer token, true where verified."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.all_caches import (
    RETRIEVAL_CACHES,
    SHAPE,
    PoisonedDeviceTier,
    assert_same_tokens,
    check_abort,
    check_history,
    check_reset,
    forward,
    joined,
    positions_of,
    random_kv,
    rounded,
)
from tiers.base import padded
from tiers.quantisation import quantised_bytes
from tiers.quantised_retrieval_cache import QuantisedRetrievalCache, make_retrieval_cache
from tiers.retrieval_cache import LayerUpdate, RetrievalCache, RetrievalUpdate

REPEATABLE = settings(derandomize=True, deadline=None, max_examples=100)
EVERY_RETRIEVAL_CACHE = pytest.mark.parametrize("case", RETRIEVAL_CACHES, ids=lambda case: case.name)
LAYERS, HEADS, BUDGET, SLACK = SHAPE.num_layers, SHAPE.num_kv_heads, 24, 6


@EVERY_RETRIEVAL_CACHE
def test_shows_exactly_the_tokens_appended_and_not_rolled_back(case):
    check_history(case)


@EVERY_RETRIEVAL_CACHE
def test_replay_after_reset_equals_a_new_cache(case):
    check_reset(case)


@EVERY_RETRIEVAL_CACHE
def test_failed_pass_leaves_no_trace(case):
    check_abort(case)


def new_cache(tail_tokens: int = 40, bits: int | None = None) -> RetrievalCache:
    return make_retrieval_cache(bits, SHAPE, BUDGET, tail_tokens, SLACK, PoisonedDeviceTier())


def random_layers(num_tokens: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [random_kv(num_tokens, seed * LAYERS + layer) for layer in range(LAYERS)]


def random_positions(num_tokens: int, length: int, seed: int) -> list[torch.Tensor]:
    """Ascending, other ones for each layer and head."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.stack([torch.randperm(length, generator=generator)[:num_tokens].sort().values for _ in range(HEADS)])
        for _ in range(LAYERS)
    ]


class Model:
    """The cache as it should be: per layer all tokens held, in order, and their positions.

    What a rebuild brings within the budget comes back from `bits` a value.
    """

    def __init__(self, bits: int | None):
        self._bits = bits
        self.base = self.length = 0
        self.kv = [(torch.empty(HEADS, 0, SHAPE.head_dim),) * 2 for _ in range(LAYERS)]
        self.positions = [torch.empty(HEADS, 0, dtype=torch.int64) for _ in range(LAYERS)]

    def rebuild(self, update: RetrievalUpdate) -> None:
        self.base = self.length = update.length
        self.kv = [(self._as_stored(new.k), self._as_stored(new.v)) for new in update.layers]
        self.positions = [new.positions for new in update.layers]

    def _as_stored(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([rounded(rows[:, :BUDGET], self._bits), rows[:, BUDGET:]], dim=1)

    def truncate(self, length: int) -> None:
        num_dropped = self.length - length
        for layer, (k, v) in enumerate(self.kv):
            end = k.shape[1] - num_dropped
            self.kv[layer] = (k[:, :end], v[:, :end])
            self.positions[layer] = self.positions[layer][:, :end]
        self.length = length

    def append(self, new: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        num_new = new[0][0].shape[1]
        positions = torch.arange(self.length, self.length + num_new).expand(HEADS, -1)
        for layer, (k, v) in enumerate(self.kv):
            self.kv[layer] = (torch.cat([k, new[layer][0]], 1), torch.cat([v, new[layer][1]], 1))
            self.positions[layer] = torch.cat([self.positions[layer], positions], 1)
        self.length += num_new


def assert_shows(seen, model: Model) -> None:
    for layer, segments in enumerate(seen):
        assert_same_tokens(joined(segments), model.kv[layer])
        assert torch.equal(positions_of(segments), model.positions[layer])


STEPS = st.lists(
    st.tuples(st.sampled_from(["read", "read", "roll back", "follow", "follow", "rebuild"]), st.integers(0, 10**6)),
    max_size=30,
)


@REPEATABLE
@given(steps=STEPS, bits=st.sampled_from([None, 8, 4]))
def test_any_history_shows_the_tokens_held_at_their_positions(steps, bits):
    cache, model, num_true = new_cache(bits=bits), Model(bits), 0
    for seed, (what, number) in enumerate([("rebuild", 7), *steps]):
        if cache.is_full:
            what = "rebuild"
        if what == "read":
            new = random_layers(min(1 + number % SLACK, SLACK), seed)
            if len(model.kv[0][0][0]) + SLACK > BUDGET + 40:
                continue
            seen = forward(cache, new)
            model.append(new)
            assert_shows(seen, model)
        elif what == "roll back":
            length = model.length - number % (model.length - max(model.base, num_true) + 1)
            cache.truncate(length)
            model.truncate(length)
        elif what == "follow":  # the verifier's tokens, of which the cache may have read fewer or more
            num_new = number % SLACK
            if len(model.kv[0][0][0]) + SLACK > BUDGET + 40:
                continue
            true = random_layers(num_new, seed) if num_new else []
            cache.load(update_of(num_true, true, num_new))
            model.truncate(num_true)
            if num_new:
                model.append(true)
            num_true += num_new
        else:
            num_true = max(num_true, model.length, 30) + number % 50
            num_retrieved = number % (BUDGET + 4)  # the tokens behind the last chunk come on top
            update = rebuild_of(num_retrieved, num_true, seed)
            cache.load(update)
            model.rebuild(update)
        assert (cache.length, cache.base) == (model.length, model.base)
    if not cache.is_full:
        new = random_layers(1, 999)
        seen = forward(cache, new)
        model.append(new)
        assert_shows(seen, model)


def rebuild_of(num_retrieved: int, length: int, seed: int = 1) -> RetrievalUpdate:
    new = zip(random_layers(num_retrieved, seed), random_positions(num_retrieved, length, seed), strict=True)
    layers = [LayerUpdate(k, v, positions) for (k, v), positions in new]
    return RetrievalUpdate(is_rebuild=True, start=0, length=length, layers=layers)


def update_of(start: int, true: list[tuple[torch.Tensor, torch.Tensor]], num_new: int) -> RetrievalUpdate:
    layers = (LayerUpdate(k, v) for k, v in true)
    return RetrievalUpdate(is_rebuild=False, start=start, length=start + num_new, layers=layers)


def test_true_keys_and_values_replace_the_drafted_ones():
    cache = new_cache()
    cache.load(rebuild_of(16, 100))
    forward(cache, random_layers(5, 2))
    true = random_layers(3, 3)
    cache.load(update_of(100, true, 3))
    assert cache.length == 103
    seen = forward(cache, new := random_layers(1, 4))
    for layer, segments in enumerate(seen):
        k, _ = joined(segments)
        assert torch.equal(k[:, 16:], torch.cat([true[layer][0], new[layer][0]], dim=1))


def test_tokens_that_only_the_verifier_read_have_their_positions():
    cache = new_cache()
    cache.load(rebuild_of(16, 100))
    forward(cache, random_layers(2, 2))
    cache.load(update_of(100, random_layers(5, 3), 5))
    for segments in forward(cache, random_layers(1, 4)):
        assert positions_of(segments)[:, 16:].tolist() == [list(range(100, 106))] * HEADS


def test_is_full_before_another_round_would_not_fit():
    cache = new_cache()
    cache.load(rebuild_of(BUDGET, 100))
    while not cache.is_full:
        forward(cache, random_layers(SLACK, 1))
        cache.truncate(cache.length - SLACK + 1)
    num_held = BUDGET + cache.length - 100
    assert num_held + SLACK > padded(BUDGET + 40) >= num_held + SLACK - 1
    with pytest.raises(AssertionError, match="exceed the capacity"):
        cache.begin(SLACK)
    cache.load(rebuild_of(BUDGET, cache.length))
    assert not cache.is_full


def test_a_promised_tail_is_not_full_before_its_tokens_are_read():
    cache = new_cache(tail_tokens=40)
    cache.load(rebuild_of(BUDGET, 100))
    for seed in range(40 - SLACK):
        assert not cache.is_full
        forward(cache, random_layers(1, seed))


def test_cannot_be_rolled_back_to_before_its_rebuild():
    cache = new_cache()
    cache.load(rebuild_of(16, 100))
    forward(cache, random_layers(2, 2))
    cache.truncate(100)
    for length in (99, 101):
        with pytest.raises(AssertionError, match=f"truncate to {length}"):
            cache.truncate(length)


def test_memory_is_that_of_budget_tail_and_positions():
    tier = PoisonedDeviceTier()
    RetrievalCache(SHAPE, 100, 29, 3, tier)
    slots = 192
    assert tier.used_bytes == slots * SHAPE.bytes_per_token + slots * LAYERS * HEADS * 8


def test_quantised_chunks_are_counted_with_the_layer_that_is_read():
    tier = PoisonedDeviceTier()
    QuantisedRetrievalCache(4, SHAPE, 100, 29, 3, tier)
    newer = 64 * (SHAPE.bytes_per_token + LAYERS * HEADS * 8)
    chunks = quantised_bytes(SHAPE, 100, 4) + 128 * LAYERS * HEADS * 4
    assert tier.used_bytes == newer + chunks + 128 * SHAPE.bytes_per_token_and_layer
