"""Keys and values in 8 or 4 bits, for caches whose readers are verified: what is read is near, not equal.

Each channel of GROUP_TOKENS consecutive rows has a least value and a step: keys have channels of outliers (KIVI, arXiv
2402.02750). Values, which KIVI groups by token, come out a little better by channel as well: docs/kv_precision.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tiers.base import QUANTUM, CacheShape, Tier, padded

GROUP_TOKENS = QUANTUM


@dataclass(slots=True)
class Quantised:
    """Rows [..., N, D] as low + code * step; N a multiple of GROUP_TOKENS, of which there are S.

    `codes` [..., S, GROUP_TOKENS, D], or D / 2 where two of 4 bits share a byte; `low`, `step` [..., S, 1, D].
    """

    codes: torch.Tensor
    low: torch.Tensor
    step: torch.Tensor

    def part(self, *index: int) -> Quantised:
        """A view of the part at `index`, one number for each of the first dimensions."""
        return Quantised(self.codes[index], self.low[index], self.step[index])


def allocate_quantised(tier: Tier, shape: CacheShape, num_tokens: int, bits: int) -> Quantised:
    """Zeros of [layers, 2, H, padded(num_tokens), D], which take `quantised_bytes` of `tier`."""
    assert bits in (4, 8) and shape.head_dim % 2 == 0, f"{bits} bits, dimension {shape.head_dim}"
    groups = (shape.num_layers, 2, shape.num_kv_heads, padded(num_tokens) // GROUP_TOKENS)
    codes = tier.allocate(*groups, GROUP_TOKENS, shape.head_dim * bits // 8, dtype=torch.uint8)
    low_and_step = tier.allocate(2, *groups, 1, shape.head_dim, dtype=shape.dtype)
    return Quantised(codes.zero_(), *low_and_step.zero_())


def quantised_bytes(shape: CacheShape, num_tokens: int, bits: int) -> int:
    """Bytes of the codes of all layers, keys and values, with the lows and steps that they are read by."""
    num_values = padded(num_tokens) * shape.num_layers * 2 * shape.num_kv_heads * shape.head_dim
    return num_values * bits // 8 + num_values // GROUP_TOKENS * 2 * shape.dtype.itemsize


def quantise(rows: torch.Tensor, target: Quantised, bits: int) -> None:
    """Writes rows [H, N, D], N >= 1, to the first groups of `target` [H, ...]; the last row fills the last group up."""
    num_pad = -rows.shape[1] % GROUP_TOKENS
    if num_pad:
        rows = torch.cat([rows, rows[:, -1:].expand(-1, num_pad, -1)], dim=1)
    rows = torch.unflatten(rows, 1, (-1, GROUP_TOKENS)).float()
    num_groups, highest = rows.shape[1], 2**bits - 1
    low, high = rows.aminmax(dim=2, keepdim=True)
    target.low[:, :num_groups] = low
    target.step[:, :num_groups] = (high - low) / highest
    # As they were rounded: low is one of the values, and exact.
    step = target.step[:, :num_groups].float().clamp_min(torch.finfo(torch.float32).tiny)
    codes = (rows - low).div_(step).round_().clamp_(0, highest).to(torch.uint8)
    target.codes[:, :num_groups] = codes if bits == 8 else _paired(codes)


def _paired(codes: torch.Tensor) -> torch.Tensor:
    """Packs codes below 16, [..., D], to [..., D / 2]: the first half of the channels goes to the lower four bits."""
    first, second = codes.chunk(2, dim=-1)
    return first | second << 4


def dequantise(source: Quantised, out: torch.Tensor) -> None:
    """Reads from `source` the groups that `out` [H, N, D] has room for, N a multiple of GROUP_TOKENS."""
    out = torch.unflatten(out, 1, (-1, GROUP_TOKENS))
    num_groups, dim = out.shape[1], out.shape[3]
    codes = source.codes[:, :num_groups]
    if codes.shape[-1] == dim:
        out.copy_(codes)
    else:
        out[..., : dim // 2] = codes & 15
        out[..., dim // 2 :] = codes >> 4
    torch.addcmul(source.low[:, :num_groups], out, source.step[:, :num_groups], out=out)
