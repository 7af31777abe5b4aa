"""The distribution that a model samples from: temperature, top-k and top-p, against transformers and by themselves."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import workers.acceptance
from conf.schema import SamplingConfig
from tests.support.toy_models import EXACT, random_table
from workers.acceptance import NotFiniteError, distribution

REPEATABLE = settings(derandomize=True, deadline=None)
VOCAB_SIZES = [100, 8193, 32000, 128256, 151936]


@pytest.mark.parametrize("temperature", [0.01, 0.6, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 1, 5, 99, 10**9])
@pytest.mark.parametrize("top_p", [0.5, 0.9, 0.99, 1.0])
def test_distribution_equals_that_of_transformers(temperature, top_k, top_p):
    logits = random_table(20, 300, 1, spread=3.0)
    logits[::3, 40:] = -torch.inf
    warped = TemperatureLogitsWarper(temperature)(None, logits)
    warped = TopKLogitsWarper(top_k)(None, warped) if top_k else warped
    warped = TopPLogitsWarper(top_p)(None, warped) if top_p < 1 else warped
    ours = distribution(logits, SamplingConfig(temperature=temperature, top_p=top_p, top_k=top_k))
    torch.testing.assert_close(ours, torch.softmax(warped, -1), rtol=0, atol=1e-12)
    assert torch.equal(ours > 0, torch.softmax(warped, -1) > 0)


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_distribution_of_every_vocabulary_size_sums_to_one(vocab_size):
    logits = random_table(2, vocab_size, 2, spread=4.0).float()
    for sampling in (EXACT, SamplingConfig(temperature=0.6, top_p=0.9), SamplingConfig(top_k=5), SamplingConfig()):
        probs = distribution(logits, sampling)
        assert probs.shape == logits.shape and probs.dtype == torch.float32
        torch.testing.assert_close(probs.double().sum(-1), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-4)


@pytest.mark.parametrize("temperature", [0, 1e-6])
def test_at_temperature_zero_the_distribution_is_one_hot_and_at_1e_6_too(temperature):
    logits = random_table(5, 50, 3)
    probs = distribution(logits, SamplingConfig(temperature=temperature, top_p=0.9))
    assert torch.equal(probs, torch.nn.functional.one_hot(logits.argmax(-1), 50).double())


@REPEATABLE
@given(
    logits=st.lists(st.integers(-240, 240), min_size=2, max_size=12, unique=True),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.integers(0, 14),
    top_p=st.floats(0.05, 1.0),
)
def test_top_k_keeps_the_k_best_and_top_p_the_fewest_that_reach_it(logits, temperature, top_k, top_p):
    values = torch.tensor([logits], dtype=torch.float64) / 8
    probs = distribution(values, SamplingConfig(temperature=temperature, top_p=top_p, top_k=top_k))[0]
    assert float(probs.sum()) == pytest.approx(1, abs=1e-12)
    full = torch.softmax(values[0] / temperature, -1)
    order = full.argsort(descending=True)
    num_ranked = min(top_k, len(logits)) or len(logits)
    ranked = full[order[:num_ranked]] / full[order[:num_ranked]].sum()
    num_kept = int((probs > 0).sum())
    assert set(probs.nonzero()[:, 0].tolist()) == set(order[:num_kept].tolist())
    assert num_kept <= num_ranked
    assert float(ranked[: num_kept - 1].sum()) < top_p + 1e-12
    assert float(ranked[:num_kept].sum()) >= top_p - 1e-12


@pytest.fixture
def by_few_and_all(monkeypatch):
    """A function: a distribution by sorting all tokens, and by a look at 12 first; how often that did is counted."""
    sort, sizes, counts = torch.Tensor.sort, set(), {"few": 0, "all": 0}

    def noting_sort(tensor, *args, **kwargs):
        sizes.add(tensor.shape[-1])
        return sort(tensor, *args, **kwargs)

    def both(logits, sampling):
        outs = []
        for num_candidates in (logits.shape[-1], 12):
            sizes.clear()
            monkeypatch.setattr(workers.acceptance, "NUM_CANDIDATES", num_candidates)
            outs.append(distribution(logits, sampling))
        counts["all" if logits.shape[-1] in sizes else "few"] += 1
        return outs

    monkeypatch.setattr(torch.Tensor, "sort", noting_sort)
    return both, counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_look_at_the_best_tokens_alone_changes_no_bit(by_few_and_all, dtype):
    both, counts = by_few_and_all
    logits = torch.randn(40, 200, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[:, ::7] = -torch.inf
    for scale, top_k, is_whole in itertools.product([0.0, 0.3, 3.0, 12.0], [0, 1, 5, 12, 30, 1000], [True, False]):
        sampling = SamplingConfig(temperature=1.0, top_p=0.6, top_k=top_k)
        scaled = logits * scale if scale else torch.zeros_like(logits)
        for row in scaled.round() if is_whole else scaled:  # whole numbers: many are equal
            assert torch.equal(*both(row[None], sampling))
    assert min(counts.values()) > 100


def test_a_row_has_the_same_bits_whatever_rows_are_beside_it(by_few_and_all):
    both, counts = by_few_and_all
    logits = 4 * torch.randn(30, 4000, generator=torch.Generator().manual_seed(1))
    logits[-1] = 0.0  # needs to be sorted, and all with it
    sampling = SamplingConfig(temperature=1.0, top_p=0.9)
    together = both(logits, sampling)
    for index, row in enumerate(logits):
        for alone in both(row[None], sampling):
            assert all(torch.equal(alone[0], rows[index]) for rows in together)
    assert min(counts.values()) > 0


def test_a_bound_that_falls_on_a_token_cuts_alike(by_few_and_all):
    both, counts = by_few_and_all
    logits = 4 * torch.randn(60, 4000, generator=torch.Generator().manual_seed(0))
    for row in logits:
        ordered = torch.softmax(row, -1).sort(descending=True).values.cumsum(-1)
        for place in range(3):
            sampling = SamplingConfig(temperature=1.0, top_p=min(0.999, float(ordered[place])))
            assert torch.equal(*both(row[None], sampling))
    assert counts["few"] > 100


def test_of_equal_logits_the_lower_ids_are_kept():
    logits = torch.zeros(1, 6)
    assert distribution(logits, SamplingConfig(temperature=1, top_p=1, top_k=2))[0].nonzero()[:, 0].tolist() == [0, 1]
    assert distribution(logits, SamplingConfig(temperature=1, top_p=0.45))[0].nonzero()[:, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("sampling", [EXACT, SamplingConfig(), SamplingConfig(top_k=5), SamplingConfig(temperature=0)])
def test_a_row_with_one_finite_logit_is_one_hot(sampling):
    logits = torch.full((1, 40), -torch.inf)
    logits[0, 7] = -1e4
    assert distribution(logits, sampling)[0].nonzero()[:, 0].tolist() == [7]
    assert float(distribution(logits, sampling)[0, 7]) == 1


@pytest.mark.parametrize("sampling", [EXACT, SamplingConfig(), SamplingConfig(top_k=5), SamplingConfig(temperature=0)])
def test_masked_tokens_have_probability_zero(sampling):
    logits = random_table(3, 40, 4)
    logits[:, ::2] = -torch.inf
    probs = distribution(logits, sampling)
    assert not probs[:, ::2].any()
    assert torch.isfinite(probs).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_give_single_precision_distributions(dtype):
    logits = random_table(2, 1000, 5).to(dtype)
    assert torch.equal(distribution(logits, EXACT), torch.softmax(logits.float(), -1))


@pytest.mark.parametrize("temperature", [1e-4, 0.01, 100])
def test_extreme_temperatures_and_logits_stay_finite(temperature):
    probs = distribution(torch.tensor([[3e38, -3e38, 0.0, 3e38]]), SamplingConfig(temperature=temperature, top_p=1))
    assert torch.isfinite(probs).all()
    torch.testing.assert_close(probs.sum(-1), torch.ones(1))


@pytest.mark.parametrize("sampling", [EXACT, SamplingConfig(), SamplingConfig(temperature=0)])
@pytest.mark.parametrize("row", [[0.0, math.nan], [0.0, math.inf], [-math.inf, -math.inf], [math.nan, math.nan]])
def test_rows_that_are_not_finite_are_refused(row, sampling):
    with pytest.raises(NotFiniteError):
        distribution(torch.tensor([[0.0, 1.0], row]), sampling)
