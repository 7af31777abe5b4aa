"""Attention of some queries to some keys, by torch operations alone: out and log-sum-exp, to be merged with others.

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

from functools import lru_cache

import torch

from workers.attention.few_rows import dot_products, weighted_sums

MATMUL_MAX_ROWS = 64
CPU_MATMUL_MIN_KEYS = 16384
CPU_FLASH_ROWS, CPU_IDLE_MAX_KEYS = 32, 4096
"""Rows that a thread takes at once; with so few keys it does not matter who is idle."""
MASKED_MAX_KEYS = 8192
"""On CPUs new tokens among so many keys are masked; beyond, their part is computed by itself."""
SCORES_MAX_BYTES = 64 << 20
CUDA_SCORES_MAX_BYTES = 256 << 20
"""More slices of rows read all keys more often, and that is what attention takes time for on a GPU."""
FLASH_CAPABILITY = (8, 0)


def flash_wins(q: torch.Tensor, k: torch.Tensor) -> bool:
    """For queries [H, G, T, D] over keys [H, N, D]; see above."""
    num_rows = q.shape[1] * q.shape[2]
    if q.device.type != "cpu" or num_rows > MATMUL_MAX_ROWS:
        return num_rows > MATMUL_MAX_ROWS
    num_parts = q.shape[0] * -(-num_rows // CPU_FLASH_ROWS)
    if k.shape[1] > CPU_IDLE_MAX_KEYS and num_parts < torch.get_num_threads():
        return False
    return num_rows == 1 or q.dtype != torch.bfloat16 or k.shape[1] < CPU_MATMUL_MIN_KEYS


def by_matmul(q_HRD, k, v, scale, mask, softcap, bias=None, chunks=None):
    """(out [H, R, D], log-sum-exp [H, R, 1]) in fp32 (fp64 for fp64); rows in slices that bound the scores' memory.

    `mask` [1 or H, R, n] hides some of the last n keys; `bias` [H, N] is added to each row's scores. With `chunks`
    there is a third: what share of these keys' attention each of the chunks got, [H, R, chunks].
    """
    row_bytes = k.shape[0] * k.shape[1] * 4
    max_bytes = CUDA_SCORES_MAX_BYTES if k.device.type == "cuda" else SCORES_MAX_BYTES
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
            )
            for at in range(0, q_HRD.shape[1], rows_at_once)
        ]
        return tuple(torch.cat(parts, dim=1) for parts in zip(*pieces, strict=True))
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
    return (out, lse) if chunks is None else (out, lse, chunks.sums(weights).div_(share_of))


def by_flash(q, k, v, scale, is_causal):
    """(out [H, R, D], log-sum-exp [H, R, 1]) by the fused kernel of the device; `is_causal`: as many keys as tokens."""
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


def by_flash_biased(q, k, v, scale, bias):
    """The same on a CPU with a bias added to the scores, -inf where a key is not seen.

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
def triangle_bias(groups: int, num_new: int, num_keys: int) -> torch.Tensor:
    """What hides from the last T of `num_keys` tokens those after them: [R, N]."""
    bias = _largest_triangle()[-num_new:, MASKED_MAX_KEYS - num_keys :]
    return bias if groups == 1 else bias.repeat(groups, 1)


@lru_cache
def _largest_triangle() -> torch.Tensor:
    rows = torch.full((MATMUL_MAX_ROWS, MASKED_MAX_KEYS), -torch.inf, dtype=torch.float32, device="cpu")
    return rows.triu_(MASKED_MAX_KEYS - MATMUL_MAX_ROWS + 1)


@lru_cache
def _can_flash(device: torch.device, dtype: torch.dtype, dim: int) -> bool:
    """CUDA's flash kernel, called past the checks of torch's own attention, takes these."""
    has_kernel = torch.cuda.get_device_capability(device) >= FLASH_CAPABILITY
    return has_kernel and dtype in (torch.float16, torch.bfloat16) and dim <= 256 and dim % 8 == 0
