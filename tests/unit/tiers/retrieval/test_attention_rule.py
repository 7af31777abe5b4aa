"""The mass of attention on each chunk, and the choice by it."""

from __future__ import annotations

from contextlib import closing

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.all_caches import SHAPE, PoisonedDeviceTier, Reference, forward, full_cache, random_kv, read_prompt
from tiers.base import CacheShape, Segment
from tiers.retrieval.attention_rule import DECAY, AttentionRule
from workers.attention.attend import attend
from workers.attention.chunk_mass import ChunkMass
from workers.attention.forward_pass import ForwardPass, Observers, active, cached_attention

REPEATABLE = settings(derandomize=True, deadline=None, max_examples=60)
HEADS, DIM = SHAPE.num_kv_heads, SHAPE.head_dim


def naive_mass(q: torch.Tensor, k: torch.Tensor, first_position: int, chunk_size: int, window: int | None) -> list:
    """By plain loops over queries [H, G, T, D] and keys [H, N, D]: per kv head a list, a number for each chunk."""
    heads, groups, num_new, dim = q.shape
    mass = [[0.0] * -(-k.shape[1] // chunk_size) for _ in range(heads)]
    for head in range(heads):
        for group in range(groups):
            for row in range(num_new):
                position = first_position + row
                oldest = 0 if window is None else max(0, position - window + 1)
                scores = k[head, oldest : position + 1].double() @ q[head, group, row].double() * dim**-0.5
                for key, weight in enumerate(torch.softmax(scores, 0).tolist(), start=oldest):
                    mass[head][key // chunk_size] += weight / (groups * num_new)
    return mass


@REPEATABLE
@given(
    num_old=st.integers(0, 80),
    num_new=st.integers(1, 12),
    num_groups=st.sampled_from([1, 2, 8]),
    chunk_size=st.integers(1, 12),
    cuts=st.lists(st.integers(1, 79), max_size=4),
    window=st.none() | st.integers(1, 60),
    num_pad=st.integers(0, 20),
    seed=st.integers(0, 1000),
)
def test_mass_is_that_of_plain_loops(num_old, num_new, num_groups, chunk_size, cuts, window, num_pad, seed):
    """For segments of any length, whose borders lie within chunks; 96 rows are more than flash is used for."""
    k, v = random_kv(num_old + num_new, seed)
    q = torch.randn(HEADS, num_groups, num_new, DIM, generator=torch.Generator().manual_seed(seed))
    borders = [0, *sorted({cut for cut in cuts if cut < num_old}), num_old + num_new]
    segments = [Segment(k[:, a:b], v[:, a:b], start=a) for a, b in zip(borders, borders[1:], strict=False)]
    last = segments[-1]
    last.num_new, last.num_pad = num_new, num_pad
    last.k, last.v = (torch.nn.functional.pad(rows, (0, 0, 0, num_pad)) for rows in (last.k, last.v))
    mass = ChunkMass(chunk_size)
    out = attend(q, iter(segments), first_position=num_old, scale=DIM**-0.5, window=window, mass=mass)
    plain = attend(q, iter(segments), first_position=num_old, scale=DIM**-0.5, window=window)
    torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-5)
    wanted = torch.tensor(naive_mass(q, k, num_old, chunk_size, window))
    num_chunks = wanted.shape[1]
    got = mass.total()
    torch.testing.assert_close(got[:, :num_chunks], wanted, rtol=0, atol=1e-5)
    assert (got[:, num_chunks:] == 0).all()


def test_a_pass_tells_every_layers_mass_and_adds_up_to_one():
    seen = {}
    with closing(full_cache("hd", capacity=96)) as cache:
        reference = Reference(2)
        read_prompt(cache, reference.append(70, 1), 50)
        new = reference.append(4, 2)
        with active(ForwardPass(cache, 70, Observers(on_mass=seen.__setitem__, chunk_size=8)), 4):
            for layer, (k, v) in enumerate(new):
                module = torch.nn.Module()
                module.layer_idx = layer
                cached_attention(module, torch.randn(1, 2 * HEADS, 4, DIM), k[None], v[None], None)
    assert list(seen) == [0, 1]
    for mass in seen.values():
        torch.testing.assert_close(mass.sum(1), torch.ones(HEADS))


def rule_of(num_tokens: int, chunk_size: int) -> AttentionRule:
    shape = CacheShape(num_layers=1, num_kv_heads=HEADS, head_dim=DIM, dtype=torch.float32)
    return AttentionRule(shape, num_tokens, chunk_size, PoisonedDeviceTier())


def test_heads_choose_what_they_attended_to():
    rule = rule_of(60, 10)
    rule.add(0, torch.tensor([[0.1, 0.0, 0.5, 0.0, 0.4, 0.0], [0.1, 0.6, 0.0, 0.2, 0.1, 0.0]]))
    assert rule.select(0, None, 6, 3, 1).tolist() == [[0, 2, 5], [0, 1, 5]]
    assert rule.select(0, None, 6, 4, 1).tolist() == [[0, 2, 4, 5], [0, 1, 3, 5]]
    assert rule.select(0, None, 5, 3, 1).tolist() == [[0, 2, 4], [0, 1, 4]], "only the first five chunks are complete"


def test_older_rounds_count_for_less():
    rule = rule_of(50, 10)
    rule.add(0, torch.tensor([[0, 0.5, 0.5 * DECAY - 0.01, 0, 0]] * HEADS))
    rule.add(0, torch.tensor([[0, 0.0, 0.5 * DECAY - 0.01, 0.5 * DECAY + 0.01, 0]] * HEADS))
    assert rule.select(0, None, 5, 3, 1)[0].tolist() == [0, 2, 4]
    assert rule.select(0, None, 5, 4, 1)[0].tolist() == [0, 2, 3, 4]


def test_padding_beyond_the_capacity_is_left_out_and_a_new_sequence_starts_from_nothing():
    rule = rule_of(25, 10)
    rule.add(0, torch.tensor([[0.0, 1.0, 0.0, 0.0, 0.0]] * HEADS))
    rule.reset()
    rule.add(0, torch.tensor([[0.5, 0.0, 0.5, 0.0, 0.0]] * HEADS))
    assert rule.select(0, None, 2, 1, 0)[0].tolist() == [0]
    rule.begin_reading()
    assert rule._mass.sum() == HEADS, "tokens that are read again have the mass they had"


def test_a_prompt_leaves_no_trace():
    """Mass comes with verification: that of a prompt would be that of its own tokens."""
    with closing(full_cache("h", capacity=96)) as cache:
        rule, reference = rule_of(96, 8), Reference(1)
        (kv,) = new = reference.append(60, 1)
        forward(cache, new)
        rule.observe(0, 0, kv[0])
        rule.catch_up(cache)
        assert rule._mass.sum() == 0
