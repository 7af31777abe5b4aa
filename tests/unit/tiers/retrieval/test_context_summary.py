"""The summary of what was not chosen: mean keys and values of groups, weighted by how many tokens they stand for."""

from __future__ import annotations

from contextlib import closing

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.all_caches import SHAPE, PoisonedDeviceTier, Reference, forward, full_cache, random_kv
from tiers.retrieval.context_summary import ContextSummary
from tiers.retrieval_cache import LayerUpdate, RetrievalCache, RetrievalUpdate
from workers.attention.attend import attend

REPEATABLE = settings(derandomize=True, deadline=None, max_examples=60)
HEADS, DIM = SHAPE.num_kv_heads, SHAPE.head_dim


def summary_of(k: torch.Tensor, v: torch.Tensor, group_tokens: int) -> ContextSummary:
    """Of layer 0, which took these tokens at once."""
    summary = ContextSummary(SHAPE, k.shape[1] + 7, group_tokens, PoisonedDeviceTier())
    summary.observe(0, 0, k, v)
    return summary


def positions_chosen(num_chosen: int, num_tokens: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack(
        [torch.randperm(num_tokens, generator=generator)[:num_chosen].sort().values for _ in range(HEADS)]
    )


def gathered(rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return rows.gather(1, positions[..., None].expand(-1, -1, DIM))


@REPEATABLE
@given(
    num_tokens=st.integers(0, 90),
    group_tokens=st.integers(1, 20),
    share=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_rest_is_the_mean_of_the_tokens_not_chosen_and_their_number(num_tokens, group_tokens, share, seed):
    k, v = random_kv(num_tokens, seed)
    positions = positions_chosen(int(share * num_tokens), num_tokens, seed)
    rest = summary_of(k, v, group_tokens).rest(0, positions, gathered(k, positions), gathered(v, positions))
    num_groups = num_tokens // group_tokens
    assert rest.k.shape == rest.v.shape == (HEADS, num_groups, DIM)
    for head in range(HEADS):
        left = sorted(set(range(num_groups * group_tokens)) - set(positions[head].tolist()))
        for group in range(num_groups):
            members = [token for token in left if token // group_tokens == group]
            if not members:
                assert rest.log_count[head, group] == -torch.inf
                continue
            assert rest.log_count[head, group].exp().round() == len(members)
            torch.testing.assert_close(rest.k[head, group], k[head, members].mean(0), rtol=0, atol=1e-5)
            torch.testing.assert_close(rest.v[head, group], v[head, members].mean(0), rtol=0, atol=1e-5)


@REPEATABLE
@given(pieces=st.lists(st.integers(1, 40), min_size=1, max_size=6), group_tokens=st.integers(1, 20))
def test_sums_kept_as_tokens_come_equal_sums_of_all_at_once(pieces, group_tokens):
    num_tokens = sum(pieces)
    k, v = random_kv(num_tokens, seed=1)
    in_pieces = ContextSummary(SHAPE, num_tokens, group_tokens, PoisonedDeviceTier())
    at = 0
    for count in pieces:
        overlap = min(at, 3)  # tokens that are known already
        in_pieces.observe(0, at - overlap, k[:, at - overlap : at + count], v[:, at - overlap : at + count])
        at += count
    nothing = torch.empty(HEADS, 0, dtype=torch.int64), torch.empty(HEADS, 0, DIM), torch.empty(HEADS, 0, DIM)
    one, other = in_pieces.rest(0, *nothing), summary_of(k, v, group_tokens).rest(0, *nothing)
    torch.testing.assert_close(one.k, other.k, rtol=0, atol=1e-5)
    torch.testing.assert_close(one.v, other.v, rtol=0, atol=1e-5)
    assert torch.equal(one.log_count, other.log_count)


def test_catches_up_with_a_cache_and_forgets_it_at_reset():
    with closing(full_cache("dd", capacity=96)) as cache:
        reference = Reference(2)
        forward(cache, reference.append(90, seed=1))
        summary = ContextSummary(SHAPE, 96, 16, PoisonedDeviceTier())
        for _ in range(2):
            summary.catch_up(cache)
            k, v = reference.read(1, 0, 90)
            chosen = torch.tensor([[0, 17], [3, 4]])
            rest = summary.rest(1, chosen, gathered(k, chosen), gathered(v, chosen))
            assert rest.log_count.exp().round().tolist() == [[15, 15, 16, 16, 16], [14, 16, 16, 16, 16]]
            summary.reset()
            assert summary.rest(1, chosen, gathered(k, chosen), gathered(v, chosen)).k.shape[1] == 0


def test_tokens_out_of_order_are_refused():
    summary = ContextSummary(SHAPE, 64, 16, PoisonedDeviceTier())
    with pytest.raises(AssertionError, match="tokens from 0 on are missing before position 5"):
        summary.observe(0, 5, *random_kv(4, seed=1))


def test_where_the_keys_of_a_group_are_alike_the_draft_sees_the_whole_context_exactly():
    """The estimate is exact there, so that attention over chosen tokens and summary is that over all."""
    num_tokens, group_tokens = 48, 8
    k, v = random_kv(num_tokens, seed=3)
    k = k[:, ::group_tokens].repeat_interleave(group_tokens, 1)
    positions = positions_chosen(16, num_tokens, seed=4)
    kept = gathered(k, positions), gathered(v, positions)
    cache = RetrievalCache(SHAPE, 16, 40, 6, PoisonedDeviceTier(), num_summaries=num_tokens // group_tokens)
    rest = summary_of(k, v, group_tokens).rest(0, positions, *kept)
    update = RetrievalUpdate(
        is_rebuild=True,
        start=0,
        length=num_tokens,
        layers=[LayerUpdate(*kept, positions, rest), LayerUpdate(*kept, positions)],
    )
    cache.load(update)
    q = torch.randn(HEADS, 3, 1, DIM, generator=torch.Generator().manual_seed(5))
    k_new, v_new = random_kv(1, seed=6)
    cache.begin(1)
    outs = []
    for layer in (0, 1):
        cache.append(layer, k_new, v_new)
        outs.append(attend(q, cache.segments(layer), first_position=num_tokens, scale=0.5))
    cache.end()
    k_all, v_all = torch.cat([k, k_new], 1), torch.cat([v, v_new], 1)
    weights = torch.softmax(q @ k_all.transpose(1, 2)[:, None] * 0.5, -1)
    wanted = weights @ v_all[:, None]
    torch.testing.assert_close(outs[0], wanted, rtol=0, atol=1e-5)
    assert (outs[1] - wanted).abs().max() > 1e-2, "the layer without a summary should not see all"
    layers = [LayerUpdate(*kept, positions)] * 2
    cache.load(RetrievalUpdate(is_rebuild=True, start=0, length=num_tokens, layers=layers))
    cache.begin(1)
    cache.append(0, k_new, v_new)
    assert len(list(cache.segments(0))) == 1, "a rebuild without summary still shows the last one"
