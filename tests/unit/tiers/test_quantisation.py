"""Quantised rows come back within half a step, for whatever values a model's dtype has."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.all_caches import PoisonedDeviceTier
from tiers.base import CacheShape, padded
from tiers.quantisation import GROUP_TOKENS, allocate_quantised, dequantise, quantise, quantised_bytes

REPEATABLE = settings(derandomize=True, deadline=None, max_examples=100)
SHAPE = CacheShape(num_layers=2, num_kv_heads=3, head_dim=6, dtype=torch.float32)
BITS = pytest.mark.parametrize("bits", [8, 4])


def random_rows(num_tokens: int, dtype: torch.dtype, seed: int, scale: float = 1.0, offset: float = 0.0):
    """[H, N, D], with a channel of outliers."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(SHAPE.num_kv_heads, num_tokens, SHAPE.head_dim, generator=generator)
    rows[..., 1] *= 30
    return (rows * scale + offset).to(dtype)


def there_and_back(rows: torch.Tensor, bits: int) -> torch.Tensor:
    """All slots, those of padding too."""
    num_tokens = rows.shape[1]
    shape = replace(SHAPE, dtype=rows.dtype)
    stored = allocate_quantised(PoisonedDeviceTier(), shape, num_tokens, bits).part(1, 0)
    out = torch.full((rows.shape[0], padded(num_tokens), rows.shape[2]), torch.nan, dtype=rows.dtype)
    quantise(rows, stored, bits)
    dequantise(stored, out)
    return out


def group_ranges(rows: torch.Tensor) -> torch.Tensor:
    """Greatest less least value of each group and channel, for each row: [H, N, D] in fp64."""
    parts = rows.double().split(GROUP_TOKENS, dim=1)
    return torch.cat([(part.amax(1, True) - part.amin(1, True)).expand_as(part) for part in parts], dim=1)


@REPEATABLE
@given(
    num_tokens=st.integers(1, 3 * GROUP_TOKENS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    bits=st.sampled_from([8, 4]),
    scale=st.sampled_from([1e-3, 1.0, 100.0]),
    offset=st.sampled_from([0.0, -7.0, 300.0]),
    seed=st.integers(0, 1000),
)
def test_error_is_at_most_half_a_step_and_rounding(num_tokens, dtype, bits, scale, offset, seed):
    rows = random_rows(num_tokens, dtype, seed, scale, offset)
    out = there_and_back(rows, bits)
    assert out.isfinite().all(), "padding too"
    error = (out[:, :num_tokens].double() - rows.double()).abs()
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    # The step is rounded, and so is what is read; a step of few bits (subnormal) by as much as 2**bits of the least.
    step_error = group_ranges(rows) * eps + 2**bits * tiny * eps
    assert (error <= group_ranges(rows) / (2**bits - 1) / 2 + step_error + rows.double().abs() * eps).all()


@BITS
@pytest.mark.parametrize("value", [0.0, -3.25, 1e-30, 3e38])
def test_groups_of_one_value_are_exact(bits, value):
    rows = torch.full((SHAPE.num_kv_heads, 70, SHAPE.head_dim), value, dtype=torch.bfloat16)
    assert torch.equal(there_and_back(rows, bits)[:, :70], rows)


@BITS
def test_values_on_the_grid_are_exact(bits):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(2**bits, (SHAPE.num_kv_heads, 2 * GROUP_TOKENS, SHAPE.head_dim), generator=generator)
    codes[:, ::GROUP_TOKENS], codes[:, 1::GROUP_TOKENS] = 0, 2**bits - 1
    rows = codes * 0.5 - 2
    assert torch.equal(there_and_back(rows, bits), rows)


def test_quantising_leaves_what_it_is_given():
    rows = random_rows(GROUP_TOKENS, torch.float32, seed=1)
    before = rows.clone()
    there_and_back(rows, 4)
    assert torch.equal(rows, before)


def test_rows_of_one_layer_leave_the_others():
    stored = allocate_quantised(PoisonedDeviceTier(), SHAPE, GROUP_TOKENS, 8)
    quantise(random_rows(GROUP_TOKENS, torch.float32, seed=1), stored.part(1, 0), 8)
    for other in (stored.part(0, 0), stored.part(0, 1), stored.part(1, 1)):
        assert not other.codes.any() and not other.low.any() and not other.step.any()


@BITS
@pytest.mark.parametrize("num_tokens", [0, 1, 64, 200])
def test_bytes_are_those_of_the_plan(bits, num_tokens):
    tier = PoisonedDeviceTier()
    shape = replace(SHAPE, dtype=torch.bfloat16)
    allocate_quantised(tier, shape, num_tokens, bits)
    assert tier.used_bytes == quantised_bytes(shape, num_tokens, bits)
    exact = padded(num_tokens) * shape.bytes_per_token
    assert tier.used_bytes == exact * (bits + 0.5) / 16, "half a bit a value for least values and steps"
