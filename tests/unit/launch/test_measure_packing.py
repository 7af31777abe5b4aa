"""Packed bf16 values come back bit by bit, whatever they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from launch import measure_packing as measure
from launch.exponent_packing import SLICE, pack, unpack

ROOT = Path(__file__).resolve().parents[3]
REPEATABLE = settings(derandomize=True, deadline=None, max_examples=60)


def there_and_back(bits: np.ndarray) -> np.ndarray:
    out = np.full_like(bits, 0xAAAA)
    unpack(pack(bits), out)
    return out


def bits_of(values: torch.Tensor) -> np.ndarray:
    return values.bfloat16().view(torch.uint16).numpy()


def test_all_bf16_values_come_back():
    """Zeros, subnormal values, infinities and every NaN among them."""
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(2, -1)
    assert np.array_equal(there_and_back(bits), bits)


@REPEATABLE
@given(
    groups=st.integers(1, 4),
    pairs=st.sampled_from([1, 3, 64, SLICE - 1, SLICE, SLICE + 5]),
    spread=st.sampled_from([0.0, 0.5, 3.0, 40.0]),
    seed=st.integers(0, 1000),
)
def test_groups_of_any_values_come_back(groups, pairs, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    size = (groups, 2 * pairs)
    values = torch.randn(size, generator=generator) * (torch.randn(size, generator=generator) * spread).exp()
    bits = bits_of(values)
    assert np.array_equal(there_and_back(bits), bits)


@pytest.mark.parametrize("value", [0.0, -0.0, float("inf"), float("nan"), 1e-40, 3e38])
def test_groups_of_one_value_come_back(value):
    bits = bits_of(torch.full((2, 10), value))
    assert np.array_equal(there_and_back(bits), bits)


def test_normal_values_take_little_more_than_twelve_bits():
    bits = bits_of(torch.randn(2, 1 << 16, generator=torch.Generator().manual_seed(0)))
    packed = pack(bits)
    assert 12 < 8 * packed.num_bytes / bits.size < 12.05
    assert packed.num_bytes == bits.size * 3 // 2 + 2 + 6 * len(packed.exceptions)


def test_gain_is_that_of_the_slower_of_link_and_unpacking():
    assert measure.gains(1.0, 100.0, 0.75) == pytest.approx((4 / 3, 1 / 0.76))
    assert measure.gains(10.0, 5.0, 0.75) == pytest.approx((0.5, 0.1 / 0.275))


def test_the_program_runs(tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"The number of box {i} is {i * 7919 % 1000}. " for i in range(100)))
    cfg = OmegaConf.load(ROOT / "conf/measure_packing.yaml")
    changes = {"document": str(text), "context": 200, "block_tokens": 64, "repetitions": 1}
    monkeypatch.chdir(ROOT)
    measure.main.__wrapped__(OmegaConf.merge(cfg, changes))
    lines = capsys.readouterr().out.splitlines()
    for side in measure.SIDES:
        bits = float(next(line for line in lines if line.startswith(f"| {side} ")).split("|")[2])
        assert 12 < bits < 13
