"""Attention of some queries to some keys, by torch operations alone: out and log-sum-exp, to be merged with others.

Shapes: H kv heads, G query heads of one kv head, T new tokens, N keys, D head dimension, R = G * T query rows.

Two ways: the device's flash kernel, and matmul - softmax - matmul, which needs memory for scores, and which alone knows
soft caps and tells where attention goes. On a GPU it is for up to 64 rows besides; on CPUs for some rows over many keys
in bf16, and where the flash kernel, which parts work by heads and rows, would leave threads idle. Measured (two x86
cores with AMX, torch 2.13, 2 heads of 128), milliseconds by flash kernel and by matmul:

    rows    keys      bf16            fp32
    1       1,024     0.04   0.17     0.05   0.09
    1       16,384    0.59   0.93     1.15   1.27
    8       4,096     0.22   0.40
    8       16,384    1.30   1.28
    8       32,768    3.16   2.52
    16      32,768    3.30   2.96     5.69   6.65
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from workers.attention.chunk_mass import Chunks
from workers.attention.few_rows import dot_products, weighted_sums

FLASH_CAPABILITY = (8, 0)

Partial = tuple[torch.Tensor, torch.Tensor]
"""Attention to some of the keys: out [H, R, D] and log-sum-exp [H, R, 1], both in fp32 (fp64 for fp64)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelLimits:
    """Up to where which way is the faster one; see the table above."""

    matmul_max_rows: int = 64
    """Rows: more of them go to the flash kernel on any device, and on a GPU no fewer do."""
    cpu_matmul_min_keys: int = 16384
    """Keys from which on several rows in bf16 are products of matrices."""
    cpu_flash_rows: int = 32
    """Rows that a thread of the CPU's flash kernel takes at once..."""
    cpu_idle_max_keys: int = 4096
    """...and with so few keys it does not matter how many threads are idle."""
    masked_max_keys: int = 8192
    """Keys up to which a CPU masks new tokens among them; beyond, their part is computed by itself."""
    scores_max_bytes: int = 64 << 20
    cuda_scores_max_bytes: int = 256 << 20
    """Memory for scores: more slices of rows read all keys more often, which is what takes time on a GPU."""

    def flash_wins(self, q: torch.Tensor, k: torch.Tensor) -> bool:
        """True where the flash kernel is the faster way for queries [H, G, T, D] over keys [H, N, D]."""
        num_rows = q.shape[1] * q.shape[2]
        if q.device.type != "cpu" or num_rows > self.matmul_max_rows:
            return num_rows > self.matmul_max_rows
        num_parts = q.shape[0] * -(-num_rows // self.cpu_flash_rows)
        if k.shape[1] > self.cpu_idle_max_keys and num_parts < torch.get_num_threads():
            return False
        return num_rows == 1 or q.dtype != torch.bfloat16 or k.shape[1] < self.cpu_matmul_min_keys


LIMITS = KernelLimits()


def by_matmul(
    q_HRD: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
    softcap: float | None,
    bias: torch.Tensor | None = None,
    chunks: Chunks | None = None,
    limits: KernelLimits = LIMITS,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """A Partial, and with `chunks` also what share of these keys' attention each of them got, [H, R, chunks].

    `mask` [1 or H, R, n] hides some of the last n keys; `bias` [H, N] is added to each row's scores. Rows are taken in
    slices that bound the scores' memory.
    """
    row_bytes = k.shape[0] * k.shape[1] * 4
    max_bytes = limits.cuda_scores_max_bytes if k.device.type == "cuda" else limits.scores_max_bytes
    rows_at_once = max(1, max_bytes // row_bytes)
    if q_HRD.shape[1] > rows_at_once:
        pieces = [
            by_matmul(
                q_HRD[:, at : at + rows_at_once],
                k,
                v,
                scale,
                None if mask is None else mask[:, at : at + rows_at_once],
                softcap,
                bias,
                chunks,
                limits,
            )
            for at in range(0, q_HRD.shape[1], rows_at_once)
        ]
        outs, lses, shares_of = zip(*pieces, strict=True)
        joined = None if chunks is None else torch.cat(shares_of, dim=1)
        return torch.cat(outs, dim=1), torch.cat(lses, dim=1), joined
    on_cpu = k.device.type == "cpu"
    if on_cpu:  # a batched product would first copy keys, or values, that are part of a larger tensor
        scores = torch.stack([dot_products(rows, keys) for rows, keys in zip(q_HRD, k, strict=True)])
    else:
        scores = torch.bmm(q_HRD, k.transpose(1, 2))
    scores = (scores if scores.dtype == torch.float64 else scores.float()).mul_(scale)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores += bias[:, None]
    if mask is not None:
        scores[..., scores.shape[-1] - mask.shape[-1] :].masked_fill_(mask, -torch.inf)
    # A row that sees nothing here has no finite score: a finite maximum keeps NaN out of it.
    best = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)
    weights = scores.sub_(best).exp_()
    total = weights.sum(-1, keepdim=True)
    share_of = total.clamp_min(torch.finfo(weights.dtype).tiny)
    is_half = v.dtype == torch.float16  # in which the sum over many keys may not fit
    shares = (weights / share_of if is_half else weights).to(v.dtype)
    if on_cpu:
        out = torch.stack([weighted_sums(rows, values) for rows, values in zip(shares, v, strict=True)])
    else:
        out = torch.bmm(shares, v).to(weights.dtype)
    out = out if is_half else out / share_of
    lse = best + total.log()
    return out, lse, None if chunks is None else chunks.sums(weights).div_(share_of)


def by_flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, is_causal: bool) -> Partial:
    """Attention by the fused kernel of the device; where it `is_causal` there are as many keys as new tokens."""
    if is_causal and q.shape[1] > 1:  # the kernel's triangle knows no groups
        outs, lses = zip(*[by_flash(q[:, g : g + 1], k, v, scale, True) for g in range(q.shape[1])], strict=True)
        return torch.cat(outs, dim=1), torch.cat(lses, dim=1)
    q_1HRD, k, v = q.flatten(1, 2)[None], k[None], v[None]
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_1HRD, k, v, is_causal=is_causal, scale=scale
        )
    elif _can_flash(q.device, q.dtype, q.shape[-1]):
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            q_1HRD, k, v, is_causal=is_causal, scale=scale
        )
    else:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q_1HRD, k, v, None, compute_log_sumexp=True, is_causal=is_causal, scale=scale
        )
        lse = lse[..., : q_1HRD.shape[2]]  # padded by the kernel
    dtype = torch.float64 if out.dtype == torch.float64 else torch.float32
    return out[0].to(dtype), lse[0, ..., None].to(dtype)


def by_flash_biased(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, bias: torch.Tensor) -> Partial:
    """Attention by a CPU's fused kernel with a bias added to the scores, -inf where a key is not seen.

    `bias`: [R, N], in which each row sees some keys, or [1 or H, 1 or R, N].
    """
    if q.dtype == torch.float64:  # the kernel would take fp32 for it
        bias = bias.double()
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.flatten(1, 2)[None], k[None], v[None], attn_mask=bias[None] if bias.dim() == 3 else bias, scale=scale
    )
    lse = lse[0, ..., None]
    if bias.dim() == 3:  # of rows that see nothing the kernel says that their sum is 1
        lse = lse.masked_fill(bias.amax(-1, keepdim=True) == -torch.inf, -torch.inf)
    return out[0].to(lse.dtype), lse


@lru_cache(maxsize=4)  # for the layers of a pass
def triangle_bias(groups: int, num_new: int, num_keys: int, max_rows: int, max_keys: int) -> torch.Tensor:
    """The bias [R, N] that hides from each of the last T of `num_keys` tokens those after it.

    It is cut from the largest there may be, of `max_rows` tokens among `max_keys`.
    """
    bias = _largest_triangle(max_rows, max_keys)[-num_new:, max_keys - num_keys :]
    return bias if groups == 1 else bias.repeat(groups, 1)


@lru_cache
def _largest_triangle(max_rows: int, max_keys: int) -> torch.Tensor:
    rows = torch.full((max_rows, max_keys), -torch.inf, dtype=torch.float32, device="cpu")
    return rows.triu_(max_keys - max_rows + 1)


@lru_cache
def _can_flash(device: torch.device, dtype: torch.dtype, dim: int) -> bool:
    """True where CUDA's flash kernel, called past the checks of torch's own attention, takes such tensors."""
    has_kernel = torch.cuda.get_device_capability(device) >= FLASH_CAPABILITY
    return has_kernel and dtype in (torch.float16, torch.bfloat16) and dim <= 256 and dim % 8 == 0
