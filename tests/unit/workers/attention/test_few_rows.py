"""Products with few rows: equal to those of torch, whatever the number of rows and of what they meet."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from workers.attention import few_rows
from workers.checkpoint.facts import describe
from workers.models.loading import load_model

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def assert_near(got, wanted, dtype):
    error = (got.double() - wanted).abs() / wanted.abs().max() if wanted.numel() else wanted
    assert bool((error <= TOLERANCE[dtype]).all()), error


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("num_rows", [1, 2, few_rows.MAX_SUMMED_ROWS, few_rows.MAX_SUMMED_ROWS + 1, 40])
@pytest.mark.parametrize("num_others", [1, few_rows.MIN_VALUES - 1, few_rows.MIN_VALUES, few_rows.MIN_VALUES + 100])
def test_dot_products_and_weighted_sums_are_matrix_products(num_rows, num_others, dtype):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(num_rows, 16, generator=generator).to(dtype)
    weights = torch.rand(num_rows, num_others, generator=generator).to(dtype)
    # Rows of a larger tensor, as those of a cache are.
    others = torch.randn(2, num_others + 7, 16, generator=generator).to(dtype)[1, :num_others]
    assert_near(few_rows.dot_products(rows, others), rows.double() @ others.double().T, dtype)
    sums = few_rows.weighted_sums(weights, others)
    assert_near(sums, weights.double() @ others.double(), dtype)
    assert sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 1), (2, 64), (0,), (1, few_rows.MAX_LINEAR_ROWS + 1)])
def test_linear_layers_of_a_model_in_bf16_compute_as_before(shape):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 96, bias=False), nn.SiLU(), nn.Linear(96, 48, bias=False)).bfloat16()
    rows = torch.randn(*shape, 48, dtype=torch.bfloat16)
    wanted = model.double()(rows.double())
    few_rows.use_in(model.bfloat16())
    assert all(type(module) is few_rows.FewRowsLinear for module in (model[0], model[2]))
    got = model(rows)
    assert got.shape == wanted.shape and got.is_contiguous()
    assert_near(got, wanted, torch.bfloat16)


@pytest.mark.parametrize(("bias", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_other_linear_layers_stay_as_they_are(bias, dtype):
    model = nn.Sequential(nn.Linear(8, 8, bias=bias, dtype=dtype))
    few_rows.use_in(model)
    assert type(model[0]) is nn.Linear


def test_a_model_that_is_loaded_in_bf16_on_a_cpu_has_them(checkpoints):
    facts = describe("model.target", str(checkpoints("llama")), torch.bfloat16)
    model = load_model(facts, torch.device("cpu"), self_check=True).hf_model
    assert type(model.get_decoder().layers[0].mlp.up_proj) is few_rows.FewRowsLinear
