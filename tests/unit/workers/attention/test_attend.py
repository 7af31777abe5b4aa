"""Attention over segments equals a plain softmax over all visible keys, however the keys are cut and wherever they are.

Shapes as in workers/attention/attend.py: H kv heads, G query heads of one kv head, T new tokens, N keys, D head
dimension.
"""

from __future__ import annotations

import itertools
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import workers.attention.attend
from tests.support.all_caches import ALL_CACHES, full_cache, kept, positions_of
from tiers.base import CacheShape, Segment
from workers.attention.attend import attend
from workers.attention.forward_pass import ForwardPass, Observers, active, cached_attention
from workers.attention.kernels import LIMITS, KernelLimits, by_matmul

REPEATABLE = settings(derandomize=True, deadline=None, max_examples=80)
HEADS, DIM = 2, 16
SCALE = DIM**-0.5
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
NUM_NEW = [1, 3, 17, 70, 130]
MANY_KEYS = [LIMITS.masked_max_keys, LIMITS.masked_max_keys + 1, LIMITS.cpu_matmul_min_keys - 64, 17_000]


def random_qkv(num_groups: int, num_new: int, num_keys: int, dtype=torch.float32, seed: int = 0):
    """q [H, G, T, D], k and v [H, N, D]; scores of a standard deviation of about 2."""
    generator = torch.Generator().manual_seed(seed)
    q = 2 * torch.randn(HEADS, num_groups, num_new, DIM, generator=generator)
    k, v = torch.randn(2, HEADS, num_keys, DIM, generator=generator)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def plain_attention(q, k, v, positions, first_position, *, scale=SCALE, window=None, softcap=None, sink_logits=None):
    """The reference, in float64, one query after another; `positions` [H, N] of the keys."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros_like(q)
    for head, group, token in itertools.product(*map(range, q.shape[:3])):
        at = first_position + token
        sees = (positions[head] <= at) if window is None else (positions[head] <= at) & (positions[head] > at - window)
        scores = k[head, sees] @ q[head, group, token] * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if sink_logits is not None:
            scores = torch.cat([scores, sink_logits[head, group].double()[None]])
        weights = torch.softmax(scores, 0)
        out[head, group, token] = weights[: int(sees.sum())] @ v[head, sees]
    return out


def contiguous(num_keys: int) -> torch.Tensor:
    return torch.arange(num_keys).expand(HEADS, -1)


def cut(k, v, num_new: int, cuts, *, num_pad: int = 0, garbage: float = 7.0) -> list[Segment]:
    """Segments of keys at positions 0, 1, ...; `cuts` lie among the old ones, the last segment is padded."""
    num_keys = k.shape[1]
    edges = [0, *sorted(set(cuts) - {0}), num_keys]
    pad = torch.full((HEADS, num_pad, DIM), garbage, dtype=k.dtype)
    segments = [Segment(k[:, a:b], v[:, a:b], start=a) for a, b in itertools.pairwise(edges)]
    last = segments[-1]
    last.k, last.v = torch.cat([last.k, pad], dim=1), torch.cat([last.v, pad], dim=1)
    last.num_new, last.num_pad = num_new, num_pad
    return segments


def assert_near(got: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype and got.shape == wanted.shape
    torch.testing.assert_close(got.double(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_groups", [1, 2, 4])
@pytest.mark.parametrize("num_new", NUM_NEW)
def test_equals_plain_softmax_whole_and_in_segments(num_new, num_groups, dtype):
    num_keys = num_new + 61
    q, k, v = random_qkv(num_groups, num_new, num_keys, dtype)
    wanted = plain_attention(q, k, v, contiguous(num_keys), 61)
    for cuts, num_pad in (((), 0), ((), 9), ((13, 40), 0), ((1, 60), 5), ((61,), 3)):
        got = attend(q, cut(k, v, num_new, cuts, num_pad=num_pad), first_position=61, scale=SCALE)
        assert_near(got, wanted, dtype)


@REPEATABLE
@given(
    num_new=st.sampled_from(NUM_NEW[:4]),
    num_groups=st.sampled_from([1, 2, 4]),
    num_old=st.integers(0, 80),
    cuts=st.lists(st.integers(0, 80), max_size=6),
    num_pad=st.integers(0, 63),
    window=st.none() | st.integers(1, 100),
    softcap=st.none() | st.sampled_from([0.5, 5.0]),
    with_sinks=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_cut_window_softcap_and_sinks(
    num_new, num_groups, num_old, cuts, num_pad, window, softcap, with_sinks, seed
):
    num_keys = num_old + num_new
    q, k, v = random_qkv(num_groups, num_new, num_keys, torch.float64, seed)
    generator = torch.Generator().manual_seed(seed)
    sinks = torch.randn(HEADS, num_groups, generator=generator) if with_sinks else None
    options = {"scale": 0.3, "window": window, "softcap": softcap, "sink_logits": sinks}
    segments = cut(k, v, num_new, [at for at in cuts if at <= num_old], num_pad=num_pad)
    got = attend(q, segments, first_position=num_old, **options)
    assert_near(got, plain_attention(q, k, v, contiguous(num_keys), num_old, **options), torch.float64)


@pytest.mark.parametrize("window", [None, 1, 5, 40, 1000])
@pytest.mark.parametrize("num_new", [1, 3, 70])
def test_scattered_positions_that_differ_between_heads(num_new, window):
    num_old, first_position = 30, 200
    q, k, v = random_qkv(2, num_new, num_old + num_new, torch.float32)
    generator = torch.Generator().manual_seed(1)
    old = torch.stack([torch.randperm(first_position, generator=generator)[:num_old].sort().values for _ in range(2)])
    new = torch.arange(first_position, first_position + num_new).expand(HEADS, -1)
    positions, pad = torch.cat([old, new], 1), torch.zeros(HEADS, 6, DIM)
    segment = Segment(
        torch.cat([k, pad], 1),
        torch.cat([v, pad + 5], 1),
        positions=torch.cat([positions, torch.zeros(HEADS, 6, dtype=torch.int64)], 1),
        num_new=num_new,
        num_pad=6,
    )
    got = attend(q, [segment], first_position=first_position, scale=SCALE, window=window)
    assert_near(got, plain_attention(q, k, v, positions, first_position, window=window), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_new", [1, 17, 70])
def test_rows_that_see_nothing_in_a_segment_are_not_disturbed_by_it(num_new, dtype):
    # With a window of 4, most rows see no key of the first segments, and late ones none but new keys.
    num_old, window = 64, 4
    q, k, v = random_qkv(2, num_new, num_old + num_new, dtype)
    segments = cut(k, v, num_new, range(8, 65, 8))
    got = attend(q, segments, first_position=num_old, scale=SCALE, window=window)
    assert_near(got, plain_attention(q, k, v, contiguous(num_old + num_new), num_old, window=window), dtype)


@pytest.mark.parametrize("num_new", NUM_NEW)
@pytest.mark.parametrize("window", [None, 20])
def test_padding_of_any_finite_value_changes_no_bit(num_new, window):
    q, k, v = random_qkv(2, num_new, num_new + 40)
    outs = [
        attend(
            q,
            cut(k, v, num_new, (16,), num_pad=24, garbage=garbage),
            first_position=40,
            scale=SCALE,
            window=window,
        )
        for garbage in (0.0, 1e4, -1e4)
    ]
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("num_new", NUM_NEW)
def test_no_token_sees_a_later_one(num_new):
    q, k, v = random_qkv(2, num_new, num_new + 40)
    before = attend(q, cut(k, v, num_new, (16,)), first_position=40, scale=SCALE)
    for token in {0, num_new // 2, num_new - 1}:
        k_other, v_other = k.clone(), v.clone()
        k_other[:, 40 + token :] += 3
        v_other[:, 40 + token :] -= 3
        after = attend(q, cut(k_other, v_other, num_new, (16,)), first_position=40, scale=SCALE)
        assert torch.equal(before[:, :, :token], after[:, :, :token])
        assert not torch.allclose(before[:, :, token], after[:, :, token])


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_bounding_the_memory_of_scores_changes_the_result_by_rounding_alone(softcap):
    q, k, v = random_qkv(4, 70, 130, torch.float64)
    wanted = attend(q, cut(k, v, 70, (20,)), first_position=60, scale=SCALE, window=30, softcap=softcap)
    limits = KernelLimits(scores_max_bytes=7 * HEADS * 110 * 4)
    got = attend(q, cut(k, v, 70, (20,)), first_position=60, scale=SCALE, window=30, softcap=softcap, limits=limits)
    assert_near(got, wanted, torch.float64)


@pytest.mark.parametrize("num_groups", [1, 2, 4])
@pytest.mark.parametrize("num_new", [15, 16, 17, 32, 33, 64, 65])
def test_matmul_and_flash_kernel_agree(num_new, num_groups):
    class Always(KernelLimits):
        def flash_wins(self, q, k):
            return True

    class Never(KernelLimits):
        def flash_wins(self, q, k):
            return False

    q, k, v = random_qkv(num_groups, num_new, num_new + 50)
    outs = []
    for limits in (Always(), Never()):
        segments = cut(k, v, num_new, (30,), num_pad=4)
        outs.append(attend(q, segments, first_position=50, scale=SCALE, limits=limits))
    torch.testing.assert_close(outs[0], outs[1], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_groups", [1, 2])
@pytest.mark.parametrize("num_new", [1, 2, 20])
@pytest.mark.parametrize("num_keys", MANY_KEYS)
def test_every_way_of_many_keys_equals_plain_softmax(num_keys, num_new, num_groups, dtype):
    q, k, v = random_qkv(num_groups, num_new, num_keys, dtype)
    got = attend(q, cut(k, v, num_new, (), num_pad=-num_keys % 64), first_position=num_keys - num_new, scale=SCALE)
    scores = q.double() @ k.double()[:, None].transpose(2, 3) * SCALE
    later = torch.arange(num_keys) > torch.arange(num_keys - num_new, num_keys)[:, None]
    wanted = scores.masked_fill(later, -torch.inf).softmax(-1) @ v.double()[:, None]
    assert_near(got, wanted, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_new", [1, 5])
def test_segment_whose_keys_are_all_hidden_by_its_bias_is_not_there(num_new, dtype):
    q, k, v = random_qkv(2, num_new, 100, dtype)
    [segment] = cut(k, v, num_new, ())
    hidden = Segment(k[:, :30], v[:, :30], start=0, bias=torch.full((HEADS, 30), -torch.inf))
    wanted = attend(q, [segment], first_position=100 - num_new, scale=SCALE)
    for segments in ([hidden, segment], [segment, hidden]):
        torch.testing.assert_close(attend(q, segments, first_position=100 - num_new, scale=SCALE), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_new", [1, 5])
def test_keys_that_a_bias_hides_from_one_head_are_seen_by_the_other(num_new, dtype):
    q, k, v = random_qkv(2, num_new, 100, dtype)
    [segment] = cut(k, v, num_new, ())
    bias = torch.zeros(HEADS, 30)
    bias[0], bias[1, 20:] = -torch.inf, -torch.inf
    biased = Segment(k[:, :30], v[:, :30], start=0, bias=bias)
    first, sinks = 100 - num_new, torch.ones(HEADS, 2)
    got = attend(q, [biased, segment], first_position=first, scale=SCALE, sink_logits=sinks)
    alone = attend(q, [segment], first_position=first, scale=SCALE, sink_logits=sinks)
    assert_near(got[0], alone[0].double(), dtype)
    seen = Segment(k[:, :20], v[:, :20], start=0)
    other = attend(q, [seen, segment], first_position=first, scale=SCALE, sink_logits=sinks)
    assert_near(got[1], other[1].double(), dtype)
    assert not torch.equal(got[1], alone[1])


def test_a_segment_without_keys_is_passed_over():
    q, k, v = random_qkv(1, 3, 40)
    segments = cut(k, v, 3, ())
    none = {"k": k[:, :0], "v": v[:, :0], "start": 0}
    got = attend(
        q, [Segment(**none), Segment(**none, bias=torch.zeros(HEADS, 0)), *segments], first_position=37, scale=1
    )
    assert torch.equal(got, attend(q, segments, first_position=37, scale=1))


@pytest.mark.parametrize("num_new", [1, 5, 70])
def test_queries_may_lie_in_memory_as_they_like(num_new):
    q, k, v = random_qkv(2, num_new, 90)
    spread = torch.stack([q, q + 1], dim=-1).flatten(-2)[..., ::2]
    assert spread.stride(-1) == 2
    segments = cut(k, v, num_new, ())
    wanted = attend(q, segments, first_position=90 - num_new, scale=SCALE)
    assert torch.equal(attend(spread, segments, first_position=90 - num_new, scale=SCALE), wanted)


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("num_new", [1, 9, 70])
def test_many_equal_keys_do_not_overflow_in_half_precision(num_new, softcap):
    q = torch.zeros(HEADS, 1, num_new, DIM, dtype=torch.float16)
    k = torch.ones(HEADS, 70_000, DIM, dtype=torch.float16)
    got = attend(q, cut(k, k, num_new, ()), first_position=70_000 - num_new, scale=SCALE, softcap=softcap)
    assert_near(got, torch.ones(got.shape, dtype=torch.float64), torch.float16)


@pytest.mark.parametrize("num_new", [1, 5])
def test_more_threads_than_heads_change_the_way_not_the_result(monkeypatch, num_new):
    q, k, v = random_qkv(1, num_new, 5000)
    segments = cut(k, v, num_new, ())
    wanted = attend(q, segments, first_position=5000 - num_new, scale=SCALE)
    ways = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    monkeypatch.setattr(
        workers.attention.attend, "by_matmul", lambda *args, **kw: ways.append(1) or by_matmul(*args, **kw)
    )
    got = attend(q, segments, first_position=5000 - num_new, scale=SCALE)
    assert ways
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def forward_over(cache, q, k, v, new_k, new_v, window=None):
    """Fills a one-layer cache with k, v in pieces; attention of a last pass over it, and the segments it saw, kept."""
    for at in range(0, k.shape[1], 90):
        num_new = k[:, at : at + 90].shape[1]
        cache.begin(num_new)
        cache.append(0, k[:, at : at + 90], v[:, at : at + 90])
        for _ in cache.segments(0):
            pass
        cache.end()
    seen = []
    first, num_new = cache.length, new_k.shape[1]
    with active(ForwardPass(cache, first), num_new):
        cache.append(0, new_k, new_v)

        def noted():
            for segment in cache.segments(0):
                seen.append(kept(segment))
                yield segment

        out = attend(q, noted(), first_position=first, scale=SCALE, window=window)
    return out, seen


MERGING_ERROR = {torch.float32: 1e-6, torch.bfloat16: 2**-6}
"""Relative to the largest output; for bf16 two units in its last place: parts are rounded to it, and then the whole."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_new", [1, 3, 17, 70])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("tier", ["h", "s"])
def test_streamed_keys_give_the_same_bits_as_resident_ones_cut_alike_and_nearly_those_of_uncut_ones(
    tier, num_new, dtype, window
):
    num_old = 300
    q, k, v = random_qkv(2, num_new, num_old + num_new, dtype)
    q = q / 2  # scores as in a long context: many keys count
    shape = CacheShape(num_layers=1, num_kv_heads=HEADS, head_dim=DIM, dtype=dtype)
    parts = (k[:, :num_old], v[:, :num_old], k[:, num_old:], v[:, num_old:])
    caches = [full_cache(where, capacity=400, slack=70, windows=[window], shape=shape) for where in (tier, "d")]
    with closing(caches[0]), closing(caches[1]):
        (streamed, seen), (resident, whole) = (forward_over(cache, q, *parts, window) for cache in caches)
    assert len(seen) > 2 and len(whole) == 1
    assert torch.equal(streamed, attend(q, seen, first_position=num_old, scale=SCALE, window=window))
    error = (streamed.double() - resident.double()).abs().max() / resident.double().abs().max()
    assert error < MERGING_ERROR[dtype]


@pytest.mark.parametrize("case", ALL_CACHES, ids=lambda case: case.name)
def test_attention_over_every_cache_equals_plain_softmax_over_its_tokens(case):
    cache, reference = case.new()
    scale = 0.5
    for seed, num_new in enumerate([30, 6, 1, 40, 5]):
        generator = torch.Generator().manual_seed(seed)
        q = 2 * torch.randn(2, 2, num_new, 4, generator=generator)
        first = cache.length
        new = reference.append(num_new, seed)
        with active(ForwardPass(cache, first), num_new):
            for layer, (k, v) in enumerate(new):
                cache.append(layer, k, v)
                got = attend(q, cache.segments(layer), first_position=first, scale=scale)
                k_all, v_all = reference.read(layer, 0, first + num_new)
                positions = torch.arange(first + num_new).expand(2, -1)
                assert_near(got, plain_attention(q, k_all, v_all, positions, first, scale=scale), torch.float32)
        if seed == 3:
            cache.truncate(cache.length - 3)
            reference.truncate(reference.length - 3)
    if hasattr(cache, "close"):
        cache.close()


def call_as_transformers_does(cache, q, k, v, observe=None, **options):
    """`cached_attention` in a pass of its own; q [1, H * G, T, D], k and v [1, H, T, D]."""
    with active(ForwardPass(cache, cache.length, Observers(on_qkv=observe)), k.shape[2]):
        return cached_attention(SimpleNamespace(layer_idx=0), q, k, v, None, **options)


def one_layer_cache():
    shape = CacheShape(num_layers=1, num_kv_heads=HEADS, head_dim=DIM, dtype=torch.float32)
    return full_cache("d", shape=shape)


def test_interface_orders_heads_as_transformers_does_and_scales_by_default():
    q, k, v = random_qkv(4, 5, 5)
    sinks = torch.linspace(-2, 2, HEADS * 4)
    out, weights = call_as_transformers_does(
        one_layer_cache(), q.flatten(0, 1)[None], k[None], v[None], s_aux=sinks, dropout=0.0, is_causal=True
    )
    wanted = plain_attention(q, k, v, contiguous(5), 0, sink_logits=sinks.view(HEADS, 4))
    assert weights is None
    assert_near(out, wanted.flatten(0, 1).transpose(0, 1)[None], torch.float32)


def test_observer_sees_queries_keys_and_values_of_the_new_tokens():
    cache, seen = one_layer_cache(), []
    q, k, v = random_qkv(2, 4, 4)
    call_as_transformers_does(
        cache, q.flatten(0, 1)[None], k[None], v[None], observe=lambda layer, q, k, v: seen.append((layer, q, k, v))
    )
    ((layer, q_seen, k_seen, v_seen),) = seen
    assert layer == 0 and torch.equal(q_seen, q) and torch.equal(k_seen, k) and torch.equal(v_seen, v)


@pytest.mark.parametrize("num_new", [1, 9, 100])
def test_key_with_a_bias_counts_as_so_many_tokens(num_new):
    q, k, v = random_qkv(2, num_new, 12)
    counts = torch.tensor([[1, 3, 0, 2], [5, 1, 1, 0]])
    repeated = [[rows[head, :4].repeat_interleave(counts[head], 0) for head in (0, 1)] for rows in (k, v)]
    new = Segment(k[:, 4:], v[:, 4:], start=7)
    for head in (0, 1):
        summed = Segment(k[:, :4], v[:, :4], start=0, bias=counts.log())
        got = attend(q, [summed, new], first_position=40, scale=0.3)[head]
        one = slice(head, head + 1)
        spelled_out = Segment(repeated[0][head][None], repeated[1][head][None], start=0)
        new_of_head = Segment(k[one, 4:], v[one, 4:], start=7)
        wanted = attend(q[one], [spelled_out, new_of_head], first_position=40, scale=0.3)[0]
        torch.testing.assert_close(got, wanted, rtol=0, atol=2e-6)


def test_failed_pass_leaves_the_cache_as_it_was_and_no_pass_active():
    cache = one_layer_cache()
    q, k, v = random_qkv(1, 4, 4)
    with pytest.raises(ZeroDivisionError), active(ForwardPass(cache, 0), 4):
        cache.append(0, k, v)
        raise ZeroDivisionError
    assert cache.length == 0
    with pytest.raises(LookupError):
        cached_attention(SimpleNamespace(layer_idx=0), q.flatten(0, 1)[None], k[None], v[None], None)
    call_as_transformers_does(cache, q.flatten(0, 1)[None], k[None], v[None])
    assert cache.length == 4


def test_pass_that_cannot_begin_leaves_no_pass_active():
    _, k, v = random_qkv(1, 4, 4)

    class Refusing:
        def begin(self, num_new):
            raise AssertionError("no room")

        def abort(self):
            pass

    with pytest.raises(AssertionError, match="no room"), active(ForwardPass(Refusing(), 0), 4):
        pass
    with pytest.raises(LookupError):
        cached_attention(SimpleNamespace(layer_idx=0), k[None], k[None], v[None], None)


def test_positions_of_a_window_reach_back_as_far_as_the_cache_shows():
    # A device layer shows no more than the window; attention must not hide the oldest key that it needs.
    window, num_old = 20, 70
    q, k, v = random_qkv(1, 3, num_old + 3)
    shape = CacheShape(num_layers=1, num_kv_heads=HEADS, head_dim=DIM, dtype=torch.float32)
    cache = full_cache("d", windows=[window], shape=shape)
    parts = (k[:, :num_old], v[:, :num_old], k[:, num_old:], v[:, num_old:])
    out, seen = forward_over(cache, q, *parts, window)
    assert positions_of(seen)[0].tolist() == list(range(num_old - window + 1, num_old + 3))
    assert_near(out, plain_attention(q, k, v, contiguous(num_old + 3), num_old, window=window), torch.float32)
