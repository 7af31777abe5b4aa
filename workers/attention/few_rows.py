"""Matrix products with few rows on a CPU, where reading the large matrix is what takes time.

Measured (two x86 cores with AMX, torch 2.13): in bf16 a product that names the large matrix first reads it as it lies
and takes 0.6 to 0.8 times as long as the same product with the rows first, up to 128 rows, from matrices of 2,048 x 256
on; smaller ones gain little. A sum of many rows is fastest in parts: 0.6 times as long for one row over 16K values.
"""

from __future__ import annotations

import torch
from torch import nn

MAX_LINEAR_ROWS = 128
MAX_SUMMED_ROWS = 8
MIN_VALUES, VALUES_AT_ONCE = 4096, 1024
"""Sums over at least so many values are computed in parts of so many."""


def dot_products(rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Products [R, N] of each of the rows [R, D] with each of many others [N, D]; a view with contiguous columns."""
    if rows.shape[0] == 1:
        return torch.mv(others, rows[0])[None]
    return torch.mm(others, rows.t()).t()


def weighted_sums(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Product [R, D] of weights [R, N] and values [N, D] of the same dtype, in fp32 (fp64 for fp64)."""
    num_rows, num_values = weights.shape
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    if num_rows > MAX_SUMMED_ROWS or num_values < MIN_VALUES:
        return torch.mm(weights, values).to(dtype)
    num_parts = num_values // VALUES_AT_ONCE
    end = num_parts * VALUES_AT_ONCE
    weights_of_parts = weights[:, :end].view(num_rows, num_parts, VALUES_AT_ONCE).transpose(0, 1)
    sums = torch.bmm(weights_of_parts, values[:end].view(num_parts, VALUES_AT_ONCE, -1))
    total = sums.sum(0, dtype=dtype)
    return total if end == num_values else total + torch.mm(weights[:, end:], values[end:])


class FewRowsLinear(nn.Linear):
    """A linear layer, without a bias, that names its weights first where there are few rows."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        flat = rows.reshape(-1, rows.shape[-1])
        if flat.shape[0] > MAX_LINEAR_ROWS:
            return super().forward(rows)
        return dot_products(flat, self.weight).contiguous().view(*rows.shape[:-1], self.weight.shape[0])


def use_in(model: nn.Module) -> None:
    """Makes the linear layers of a model in bf16 on the CPU ones for few rows; in fp32 nothing is gained."""
    for module in model.modules():
        if type(module) is nn.Linear and module.bias is None and module.weight.dtype == torch.bfloat16:
            module.__class__ = FewRowsLinear
