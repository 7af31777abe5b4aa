"""The chosen chunks are those that a plain loop over keys and queries chooses, whatever way the index was filled."""

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
    random_kv,
    read_prompt,
)
from tiers.base import CacheShape
from tiers.retrieval.mean_key_rule import MeanKeyRule
from tiers.retrieval.selection import RetrievalSelection

REPEATABLE = settings(derandomize=True, deadline=None, max_examples=60)
HEADS, DIM = SHAPE.num_kv_heads, SHAPE.head_dim
FORCED, LAST_RESORT = 2.0, -1.0


def random_queries(num_groups: int, num_tokens: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(HEADS, num_groups, num_tokens, DIM, generator=generator)


def naive_scores(k: torch.Tensor, q: torch.Tensor, chunk_size: int) -> list[list[float]]:
    """Per kv head and complete chunk of keys [H, N, D]: the mean over all queries of the group of softmax(q . mean)."""
    scores = []
    for head in range(HEADS):
        num_chunks = k.shape[1] // chunk_size
        if not num_chunks:
            return [[]] * HEADS
        means = [k[head, at * chunk_size : (at + 1) * chunk_size].double().mean(0) for at in range(num_chunks)]
        total = [0.0] * num_chunks
        for query in q[head].flatten(0, 1).double():
            logits = torch.stack([query @ mean / DIM**0.5 for mean in means])
            for chunk_id, weight in enumerate(torch.softmax(logits, 0).tolist()):
                total[chunk_id] += weight
        scores.append([value / (q.shape[1] * q.shape[2]) for value in total])
    return scores


def naive_choice(
    scores: list[float], num_wanted: int, num_newest: int, oldest: int, chunk_size: int
) -> tuple[list[int], float]:
    """The chunks chosen for a head, ascending, and by how much the last one chosen beat the first one not chosen."""

    def rank(chunk_id: int) -> float:
        if chunk_id >= len(scores) - num_newest or (chunk_id == 0 and num_wanted > num_newest):
            return FORCED
        return LAST_RESORT if (chunk_id + 1) * chunk_size <= oldest else scores[chunk_id]

    order = sorted(range(len(scores)), key=rank, reverse=True)
    chosen, rest = order[:num_wanted], order[num_wanted:]
    margin = rank(chosen[-1]) - rank(rest[0]) if chosen and rest else 1.0
    return sorted(chosen), margin


def index_of(k: torch.Tensor, chunk_size: int) -> MeanKeyRule:
    """With the keys of one layer, as prefill in one piece fills it."""
    shape = CacheShape(num_layers=1, num_kv_heads=HEADS, head_dim=DIM, dtype=k.dtype)
    index = MeanKeyRule(shape, k.shape[1], chunk_size, PoisonedDeviceTier())
    index.observe(0, 0, k)
    return index


@REPEATABLE
@given(
    num_tokens=st.integers(1, 120),
    chunk_size=st.integers(1, 12),
    num_groups=st.sampled_from([1, 2, 4]),
    num_queries=st.integers(1, 5),
    shares=st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)),
    seed=st.integers(0, 1000),
)
def test_choice_is_that_of_plain_loops(num_tokens, chunk_size, num_groups, num_queries, shares, seed):
    num_chunks = num_tokens // chunk_size
    num_wanted = round(shares[0] * num_chunks)
    num_newest = round(shares[1] * num_wanted)
    oldest = round(shares[2] * num_tokens)
    k, _ = random_kv(num_tokens, seed)
    q = random_queries(num_groups, num_queries, seed)
    ids = index_of(k, chunk_size).select(0, q, num_chunks, num_wanted, num_newest, oldest)
    assert ids.shape == (HEADS, num_wanted)
    for head, scores in enumerate(naive_scores(k, q, chunk_size)):
        wanted, margin = naive_choice(scores, num_wanted, num_newest, oldest, chunk_size)
        if margin > 1e-5:  # else a tie, where either is right
            assert ids[head].tolist() == wanted


@REPEATABLE
@given(
    num_chunks=st.integers(1, 30),
    shares=st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)),
    seed=st.integers(0, 1000),
)
def test_first_chunk_and_newest_are_always_in_and_no_chunk_twice(num_chunks, shares, seed):
    num_wanted = 1 + round(shares[0] * (num_chunks - 1))
    num_newest = 1 + round(shares[1] * (num_wanted - 1))
    k, _ = random_kv(num_chunks * 3, seed)
    ids = index_of(k, 3).select(
        0, random_queries(2, 1, seed), num_chunks, num_wanted, num_newest, round(shares[2] * k.shape[1])
    )
    for chosen in ids.tolist():
        assert chosen == sorted(set(chosen))
        assert set(range(num_chunks - num_newest, num_chunks)) <= set(chosen)
        assert 0 in chosen or num_wanted == num_newest


def test_each_head_of_a_group_has_a_say():
    k = torch.zeros(HEADS, 50, DIM)
    k[:, 10:20, 0] = 9.0  # chunk 1, wanted by the first query head
    k[:, 30:40, 1] = 9.0  # chunk 3, by the second
    q = torch.zeros(HEADS, 2, 1, DIM)
    q[:, 0, 0, 0] = q[:, 1, 0, 1] = 9.0
    assert index_of(k, 10).select(0, q, 5, 4, 1).tolist() == [[0, 1, 3, 4]] * HEADS


def test_heads_choose_for_themselves():
    k = torch.zeros(HEADS, 50, DIM)
    k[0, 10:20, 0] = k[1, 20:30, 0] = 9.0
    q = torch.zeros(HEADS, 1, 1, DIM)
    q[..., 0] = 9.0
    assert index_of(k, 10).select(0, q, 5, 3, 1).tolist() == [[0, 1, 4], [0, 2, 4]]


def test_chunks_before_the_sliding_window_come_last():
    k = torch.zeros(HEADS, 60, DIM)
    k[:, 10:20, 0] = 9.0
    q = torch.zeros(HEADS, 1, 1, DIM)
    q[..., 0] = 9.0
    index = index_of(k, 10)
    assert index.select(0, q, 6, 3, 1)[0].tolist()[1] == 1
    assert 1 not in index.select(0, q, 6, 3, 1, oldest=20)[0].tolist()
    assert 1 in index.select(0, q, 6, 3, 1, oldest=19)[0].tolist(), "its last token is still within the window"
    assert index.select(0, q, 6, 6, 1, oldest=60)[0].tolist() == [0, 1, 2, 3, 4, 5]


def test_more_chunks_than_there_are_are_refused():
    k, _ = random_kv(30, 1)
    with pytest.raises(AssertionError, match="<= 4 <= 3 chunks"):
        index_of(k, 10).select(0, random_queries(1, 1, 1), 3, 4, 1)


def mean_keys(index: MeanKeyRule, layer: int) -> torch.Tensor:
    return index._means[layer, :, : index._num_indexed[layer]]


@REPEATABLE
@given(
    tiers=st.sampled_from(["d", "h", "hd"]),
    chunk_size=st.integers(1, 12),
    pieces=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    steps=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 5), st.booleans()), max_size=12),
)
def test_means_kept_up_to_date_equal_means_of_the_whole_cache(tiers, chunk_size, pieces, steps):
    shape = CacheShape(num_layers=len(tiers), num_kv_heads=HEADS, head_dim=DIM, dtype=torch.float32)
    index = MeanKeyRule(shape, 260, chunk_size, PoisonedDeviceTier())
    reference = Reference(len(tiers))
    with closing(full_cache(tiers, capacity=260)) as cache:
        for seed, num_new in enumerate(pieces):
            new = reference.append(num_new, seed)
            for layer, (k, _) in enumerate(new):
                index.observe(layer, cache.length, k)
            forward(cache, new)
        for seed, (num_new, num_rejected, is_rebuild) in enumerate(steps, start=100):
            forward(cache, reference.append(num_new, seed))
            reference.truncate(reference.length - min(num_rejected, num_new - 1))
            cache.truncate(reference.length)
            if is_rebuild:
                index.catch_up(cache)
        index.catch_up(cache)
        for layer in range(len(tiers)):
            end = reference.length // chunk_size * chunk_size
            k, _ = reference.read(layer, 0, end)
            wanted = k.double().unflatten(1, (-1, chunk_size)).mean(2)
            torch.testing.assert_close(mean_keys(index, layer).double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("chunk_size", [1, 3, 8, 24])
def test_prompt_pieces_are_indexed_as_they_come(chunk_size):
    shape = CacheShape(num_layers=1, num_kv_heads=HEADS, head_dim=DIM, dtype=torch.float32)
    index = MeanKeyRule(shape, 200, chunk_size, PoisonedDeviceTier())
    k, _ = random_kv(192, 1)
    for start in range(0, 192, 48):
        index.observe(0, start, k[:, start : start + 48])
    assert torch.equal(mean_keys(index, 0), mean_keys(index_of(k, chunk_size), 0))


def test_means_of_a_16_bit_cache_are_summed_in_32_bits():
    k = torch.full((HEADS, 600, DIM), 1.0, dtype=torch.bfloat16)
    k[:, ::2] = 1.0078125  # one step above 1; a sum in 16 bits stops growing at 256
    assert torch.equal(mean_keys(index_of(k, 600), 0), torch.full((HEADS, 1, DIM), 1.00390625).bfloat16())


def test_reset_index_equals_a_new_one():
    k, _ = random_kv(90, 1)
    other, _ = random_kv(60, 2)
    index = index_of(k, 10)
    index.reset()
    index.observe(0, 0, other)
    assert torch.equal(mean_keys(index, 0), mean_keys(index_of(other, 10), 0))


def selection_over(tiers: str, num_tokens: int, *, budget: int, chunk_size: int, newest_share=0.25, windows=None):
    """A selection over a full cache with that many tokens, and the reference; close the cache."""
    shape = CacheShape(num_layers=len(tiers), num_kv_heads=HEADS, head_dim=DIM, dtype=torch.float32)
    windows = windows or [None] * len(tiers)
    cache, reference = full_cache(tiers, capacity=400, windows=windows), Reference(len(tiers))
    read_prompt(cache, reference.append(num_tokens, 1), 50)
    index = MeanKeyRule(shape, 400, chunk_size, PoisonedDeviceTier())
    return cache, reference, RetrievalSelection(cache, index, windows, budget, newest_share)


@REPEATABLE
@given(
    tiers=st.sampled_from(["d", "h", "dh", "s"]),
    num_tokens=st.integers(1, 200),
    chunk_size=st.integers(1, 9),
    num_budget_chunks=st.integers(1, 30),
    newest_share=st.floats(0, 1),
    window=st.none() | st.integers(1, 100),
)
def test_rebuild_brings_the_true_tokens_of_the_chosen_chunks_and_of_the_incomplete_one(
    tiers, num_tokens, chunk_size, num_budget_chunks, newest_share, window
):
    budget = num_budget_chunks * chunk_size
    cache, reference, selection = selection_over(
        tiers,
        num_tokens,
        budget=budget,
        chunk_size=chunk_size,
        newest_share=newest_share,
        windows=[window] * len(tiers),
    )
    with closing(cache):
        update = selection.rebuild({layer: random_queries(2, 3, layer) for layer in range(len(tiers))})
        assert (update.is_rebuild, update.length) == (True, num_tokens)
        num_chunks = min(budget, num_tokens) // chunk_size
        num_rest = num_tokens % chunk_size
        for layer, ((k, v), positions) in enumerate(((new.k, new.v), new.positions) for new in update.layers):
            assert positions.shape == (HEADS, num_chunks * chunk_size + num_rest)
            k_all, v_all = reference.read(layer, 0, num_tokens)
            for head in range(HEADS):
                at = positions[head]
                assert (at.diff() > 0).all()
                assert_same_tokens((k[head], v[head]), (k_all[head, at], v_all[head, at]))
                num_newest = min(num_chunks, max(1, min(num_chunks - 1, round(num_chunks * newest_share))))
                newest = range(num_tokens - num_rest - num_newest * chunk_size, num_tokens)
                assert set(newest) <= set(at.tolist())
                assert num_chunks == num_newest or at[0] == 0


def test_budget_of_the_whole_context_brings_all_of_it():
    cache, reference, selection = selection_over("dh", 50, budget=48, chunk_size=8)
    with closing(cache):
        update = selection.rebuild({layer: random_queries(1, 1, layer) for layer in range(2)})
        for layer, new in enumerate(update.layers):
            assert_same_tokens((new.k, new.v), reference.read(layer, 0, 50))
            assert new.positions.tolist() == [list(range(50))] * HEADS
        assert layer == 1


def test_follow_brings_every_token_once_and_none_that_was_rolled_back():
    cache, reference, selection = selection_over("hd", 50, budget=16, chunk_size=8)
    with closing(cache):
        selection.rebuild({layer: random_queries(1, 1, layer) for layer in range(2)})
        start = 50
        for seed, num_kept in enumerate([3, 0, 6, 1], start=2):
            forward(cache, reference.append(6, seed))
            reference.truncate(start + num_kept)
            cache.truncate(start + num_kept)
            update = selection.follow({})
            assert (update.is_rebuild, update.start, update.length) == (False, start, start + num_kept)
            for layer, new in enumerate(update.layers):
                assert_same_tokens((new.k, new.v), reference.read(layer, start, start + num_kept))
            start += num_kept


def test_reset_selection_follows_a_new_sequence_from_its_first_token():
    cache, _, selection = selection_over("hd", 50, budget=16, chunk_size=8)
    with closing(cache):
        queries = {layer: random_queries(1, 1, layer) for layer in range(2)}
        selection.rebuild(queries)
        cache.reset()
        selection.reset()
        reference = Reference(2)
        forward(cache, reference.append(30, 9))
        assert selection.follow({}).start == 0
        cache_of_new, _, new = selection_over("hd", 30, budget=16, chunk_size=8)
        cache_of_new.reset()
        again = Reference(2)
        forward(cache_of_new, again.append(30, 9))
        with closing(cache_of_new):
            for got, wanted in zip(selection.rebuild(queries).layers, new.rebuild(queries).layers, strict=True):
                assert_same_tokens((got.k, got.v), (wanted.k, wanted.v))
