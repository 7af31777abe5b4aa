"""The attention of a forward pass: over the cache's segments one after another, merged by log-sum-exp.

So keys may stream through the device. K and V are never repeated: the query heads of a group are rows of one matrix.

Shapes: H kv heads, G query heads of one kv head, T new tokens, N keys, D head dimension, R = G * T query rows.

Which kernel computes a segment, the first case that fits (`by_flash`: the device's fused kernel; `biased`: the CPU's,
which takes a bias; `by_matmul`: matmul, softmax, matmul). "Few" rows or keys are those within KernelLimits.

    case  segment                                  kernel            why
    1     no keys                                  none
    2     a bias of its own, on a CPU              biased            the fused kernel of CPUs alone takes a bias
    3     a bias or a mask of its own, else        by_matmul         no other takes them there
    4     where flash_wins says no, a soft cap,    by_matmul,        it is faster there, or the only one that caps
          or a mass that is to be known            masked            scores and tells where attention goes
    5     reaches behind a sliding window,         biased, by the    fewer calls than one for each kind of key; a
          few rows, on a CPU                       window            GPU's kernel takes no mask
    6     what is left is cut in two, unless rows and keys are few on a CPU (or there is one new token): a call for
          each part costs more there than keys that are masked
    6a    keys that all tokens see                 by_flash          needs no mask, and padding is cut off
    6b    new tokens' keys alone                   by_flash, causal  the kernel's own triangle
    6c    old and new keys, not cut                biased, by the    see 6
                                                   triangle
    6d    reaches behind a sliding window, else    by_matmul,        a fused kernel knows no window
                                                   masked
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from functools import lru_cache

import torch

from tiers.base import Segment
from workers.attention.chunk_mass import ChunkMass
from workers.attention.kernels import (
    LIMITS,
    KernelLimits,
    Partial,
    by_flash,
    by_flash_biased,
    by_matmul,
    triangle_bias,
)


def attend(
    q: torch.Tensor,
    segments: Iterable[Segment],
    *,
    first_position: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
    mass: ChunkMass | None = None,
    limits: KernelLimits = LIMITS,
) -> torch.Tensor:
    """Attention of queries q [H, G, T, D], at positions from `first_position` on, over all segments: [H, G, T, D].

    Exact: equal to softmax over all visible keys up to rounding. Position i sees keys at positions <= i and, with a
    sliding `window`, > i - window. `sink_logits` [H, G] are of attention sinks without a value. `mass` learns where the
    attention went.
    """
    heads, groups, num_new, dim = q.shape
    if q.stride(-1) != 1:  # which the flash kernels take for granted
        q = q.contiguous()
    merged = _Merged()
    num_rows = groups * num_new
    has_flash, on_cpu = softcap is None and mass is None, q.device.type == "cpu"
    for segment in segments:
        if not segment.k.shape[1]:  # 1
            continue
        if segment.bias is not None and segment.hidden is None and has_flash and on_cpu:  # 2
            merged.add(*by_flash_biased(q, segment.k, segment.v, scale, segment.bias[:, None]))
            continue
        if segment.bias is not None or segment.hidden is not None:  # 3
            rows = None if segment.hidden is None else segment.hidden.repeat(1, groups, 1)
            out, lse, _ = by_matmul(
                q.flatten(1, 2), segment.k, segment.v, scale, rows, softcap, segment.bias, limits=limits
            )
            merged.add(out, lse)
            continue
        use_flash = has_flash and limits.flash_wins(q, segment.k)
        if (
            window is not None
            and use_flash
            and on_cpu
            and num_rows <= limits.matmul_max_rows
            and _seen(segment, num_new, first_position, window) is Seen.window
        ):  # 5
            hidden = _hidden_by_window(segment, num_new, groups, first_position, window)
            bias = torch.zeros(hidden.shape, dtype=torch.float32).masked_fill_(hidden, -torch.inf)
            merged.add(*by_flash_biased(q, segment.k, segment.v, scale, bias))
            continue
        for part in _parts_for_flash(segment, num_rows, limits) if use_flash else [segment]:  # 6
            seen = _seen(part, num_new, first_position, window)
            if use_flash and seen is Seen.all:  # 6a
                merged.add(*by_flash(q, part.k, part.v, scale, is_causal=False))
            elif use_flash and seen is Seen.triangle and part.k.shape[1] == num_new:  # 6b
                merged.add(*by_flash(q, part.k, part.v, scale, is_causal=True))
            elif use_flash and seen is Seen.triangle:  # 6c
                sizes = (groups, num_new, part.k.shape[1], limits.matmul_max_rows, limits.masked_max_keys)
                merged.add(*by_flash_biased(q, part.k, part.v, scale, triangle_bias(*sizes)))
            else:  # 4, 6d
                rows = _hidden(part, num_new, groups, first_position, window, seen)
                chunks = None if mass is None else mass.chunks_of(part)
                out, lse, shares = by_matmul(
                    q.flatten(1, 2), part.k, part.v, scale, rows, softcap, chunks=chunks, limits=limits
                )
                merged.add(out, lse)
                if mass is not None and chunks is not None and shares is not None:
                    mass.add(chunks, shares, lse)
    if mass is not None:
        mass.finish(merged.lse)
    return merged.result(sink_logits, num_new).to(q.dtype).view(heads, groups, num_new, dim)


def _parts_for_flash(segment: Segment, num_rows: int, limits: KernelLimits) -> list[Segment]:
    """The segment without its padding: old keys, which need no mask, and new ones; few of them on a CPU stay one."""
    end = segment.k.shape[1] - segment.num_pad
    middle = end - segment.num_new
    is_small = num_rows <= limits.matmul_max_rows and end <= limits.masked_max_keys
    if segment.k.device.type == "cpu" and (is_small or segment.num_new == 1):
        return [_part(segment, slice(0, end), segment.num_new)]
    parts = [(slice(0, middle), 0), (slice(middle, end), segment.num_new)]
    return [_part(segment, keys, num_new) for keys, num_new in parts if keys.stop > keys.start]


def _part(segment: Segment, keys: slice, num_new: int) -> Segment:
    """The segment's `keys`, the last `num_new` of which belong to new tokens."""
    start = None if segment.start is None else segment.start + keys.start
    positions = None if segment.positions is None else segment.positions[:, keys]
    return Segment(segment.k[:, keys], segment.v[:, keys], start=start, positions=positions, num_new=num_new)


class Seen(Enum):
    """What the new tokens see of some keys."""

    all = "all keys"
    triangle = "all old keys, new ones causally"
    window = "keys within the sliding window"


def _seen(part: Segment, num_new: int, first_position: int, window: int | None) -> Seen:
    """What `num_new` tokens from `first_position` on see of a segment; a window counts where it hides some key."""
    last_position = first_position + num_new - 1
    if window is not None and (part.start is None or part.start <= last_position - window):
        return Seen.window
    return Seen.triangle if part.num_new and num_new > 1 else Seen.all


def _hidden(
    part: Segment, num_new: int, groups: int, first_position: int, window: int | None, seen: Seen
) -> torch.Tensor | None:
    """A mask [1 or H, R, n], true where one of the last n slots must not be seen; None: all are seen."""
    if window is not None and seen is Seen.window:
        return _hidden_by_window(part, num_new, groups, first_position, window)
    width = (part.num_new if seen is Seen.triangle else 0) + part.num_pad
    if not width:
        return None
    device = part.k.device
    mask = _tail_mask(num_new, width, part.num_pad, device, _stream_of(device))
    return mask if groups == 1 else mask.repeat(1, groups, 1)


def _hidden_by_window(part: Segment, num_new: int, groups: int, first_position: int, window: int) -> torch.Tensor:
    """A mask [1 or H, R, N], true where a key is outside the window of a row, after it, or padding."""
    num_keys, device = part.k.shape[1] - part.num_pad, part.k.device
    q_positions = torch.arange(first_position, first_position + num_new, device=device)[:, None]
    if part.positions is None:
        assert part.start is not None, "a segment has neither a start nor positions"
        k_positions = torch.arange(part.start, part.start + num_keys, device=device)[None, None]
    else:
        k_positions = part.positions[:, None, :num_keys]
    hidden = (k_positions > q_positions) | (k_positions <= q_positions - window)
    return torch.nn.functional.pad(hidden, (0, part.num_pad), value=True).repeat(1, groups, 1)


def _stream_of(device: torch.device) -> int:
    """The handle of the device's current stream; 0 on a CPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


@lru_cache(maxsize=1024)
def _tail_mask(num_new: int, width: int, num_pad: int, device: torch.device, stream: int) -> torch.Tensor:
    """A mask [1, T, width] that hides padding, and new tokens from those before them, in the last `width` slots.

    Each `stream` has masks of its own: another would not wait until they are written.
    """
    slots = torch.arange(width, device=device)
    last_seen = torch.arange(num_new, device=device) if width > num_pad else torch.full((num_new,), -1, device=device)
    return (slots > last_seen[:, None])[None]


class _Merged:
    """Partial attentions so far: out [H, R, D] and log-sum-exp [H, R, 1]."""

    def __init__(self) -> None:
        self._partial: Partial | None = None

    def add(self, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Merges in the attention of the same rows to other keys."""
        if self._partial is None:
            self._partial = out, lse
            return
        out_before, lse_before = self._partial
        both = torch.logaddexp(lse_before, lse)
        shift = both.clamp_min(torch.finfo(both.dtype).min)  # rows that saw nothing yet
        self._partial = out_before * (lse_before - shift).exp() + out * (lse - shift).exp(), both

    @property
    def lse(self) -> torch.Tensor:
        return self._added()[1]

    def _added(self) -> Partial:
        assert self._partial is not None, "no segment has a key"
        return self._partial

    def result(self, sink_logits: torch.Tensor | None, num_new: int) -> torch.Tensor:
        """Attention [H, R, D] over all keys, and over sinks with these logits [H, G], whose values are zero."""
        out, lse = self._added()
        if sink_logits is None:
            return out
        sinks = sink_logits.to(lse.dtype).repeat_interleave(num_new, dim=1)[..., None]
        return out * (lse - torch.logaddexp(lse, sinks)).exp()
