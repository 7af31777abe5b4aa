"""Our attention function: every level's model calls it, and the active cache says which keys it sees.

Shapes: H kv heads, G query heads of one kv head, T new tokens, N keys, D head dimension, R = G * T query rows.
Attention runs over the cache's segments one after another and is merged by log-sum-exp, so that keys may stream
through the device. K and V are never repeated: the query heads of a group are rows of one matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from transformers import AttentionInterface

from tiers.base import KVCache, Segment
from workers.attention.chunk_mass import ChunkMass
from workers.attention.kernels import (
    MASKED_MAX_KEYS,
    MATMUL_MAX_ROWS,
    by_flash,
    by_flash_biased,
    by_matmul,
    flash_wins,
    triangle_bias,
)

ATTENTION_NAME = "tierforce"


@dataclass(slots=True)
class Progress:
    """Grows while a model computes: a process that stands still is known by it."""

    num_layers: int = 0


@dataclass(slots=True)
class ForwardPass:
    """What one forward pass works on; `observe(layer, q, k, v)` sees each layer's queries, keys and values.

    Queries [H, G, T, D]; keys and values [H, T, D]. `observe_mass(layer, mass)` sees how much of the queries' attention
    each chunk of `chunk_size` tokens got: [H, chunks], adding up to 1 for each kv head.

    With `keys_only` attention is not computed: KeysKnown ends the pass when the cache has the keys and values.
    """

    cache: KVCache
    first_position: int
    observe: Callable | None = None
    observe_mass: Callable | None = None
    chunk_size: int = 0
    keys_only: bool = False
    progress: Progress = field(default_factory=Progress)


class KeysKnown(Exception):  # noqa: N818
    """Not an error: the keys and values that the pass was for are in the cache."""


# Not an argument of the model's forward: some families drop keyword arguments they do not know.
_ACTIVE: ContextVar[ForwardPass] = ContextVar("tierforce_forward_pass")


@contextmanager
def active(forward_pass: ForwardPass, num_new: int):
    """Within it, models read and write the pass's cache, which grows by `num_new` tokens unless there is an error."""
    cache = forward_pass.cache
    cache.begin(num_new)
    token = _ACTIVE.set(forward_pass)
    try:
        yield
        cache.end()
    except BaseException:
        cache.abort()
        raise
    finally:
        _ACTIVE.reset(token)


def cached_attention(
    module, query, key, value, attention_mask, scaling=None, sliding_window=None, softcap=None, s_aux=None, **_
):
    """transformers' AttentionInterface: query [1, H * G, T, D], key and value [1, H, T, D] -> ([1, T, H * G, D], None).

    The keys and values go to the active cache. `s_aux` [H * G] are logits of attention sinks without a value. Where the
    module is told to have but some heads of its own (workers.parallel.tensor_parallel), the cache gets theirs, and the
    output of the others is zero.
    """
    own = getattr(module, "own_heads", None)
    if own is None:
        return _attention_of_heads(module, query, key, value, scaling, sliding_window, softcap, s_aux), None
    query_of_own, s_aux = query[:, own.query], None if s_aux is None else s_aux[own.query]
    out = _attention_of_heads(
        module, query_of_own, key[:, own.kv], value[:, own.kv], scaling, sliding_window, softcap, s_aux
    )
    all_heads = out.new_zeros(1, out.shape[1], query.shape[1], out.shape[3])
    all_heads[:, :, own.query] = out
    return all_heads, None


def _attention_of_heads(module, query, key, value, scaling, sliding_window, softcap, s_aux):
    """See `cached_attention`."""
    forward_pass = _ACTIVE.get()
    k, v = key[0], value[0]
    q = query[0].unflatten(0, (k.shape[0], -1))
    forward_pass.progress.num_layers += 1
    forward_pass.cache.append(module.layer_idx, k, v)
    if forward_pass.observe is not None:
        forward_pass.observe(module.layer_idx, q, k, v)
    if forward_pass.keys_only:
        raise KeysKnown
    mass = None if forward_pass.observe_mass is None else ChunkMass(forward_pass.chunk_size)
    out = attend(
        q,
        forward_pass.cache.segments(module.layer_idx),
        first_position=forward_pass.first_position,
        scale=q.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
        sink_logits=None if s_aux is None else s_aux.view(k.shape[0], -1),
        mass=mass,
    )
    if mass is not None:
        forward_pass.observe_mass(module.layer_idx, mass.total())
    return out.permute(2, 0, 1, 3).flatten(1, 2)[None]


AttentionInterface.register(ATTENTION_NAME, cached_attention)


def attend(q, segments, *, first_position, scale, window=None, softcap=None, sink_logits=None, mass=None):
    """Attention of queries q [H, G, T, D], at positions from `first_position` on, over all segments: [H, G, T, D].

    Exact: equal to softmax over all visible keys up to rounding. Position i sees keys at positions <= i and, with a
    sliding `window`, > i - window. `mass`, a ChunkMass, learns where the attention went.
    """
    heads, groups, num_new, dim = q.shape
    if q.stride(-1) != 1:  # which the flash kernels take for granted
        q = q.contiguous()
    merged = _Merged()
    has_flash, on_cpu = softcap is None and mass is None, q.device.type == "cpu"
    for segment in segments:
        if not segment.k.shape[1]:
            continue
        if segment.bias is not None and segment.hidden is None and has_flash and on_cpu:
            merged.add(*by_flash_biased(q, segment.k, segment.v, scale, segment.bias[:, None]))
            continue
        if segment.bias is not None or segment.hidden is not None:
            rows = None if segment.hidden is None else segment.hidden.repeat(1, groups, 1)
            merged.add(*by_matmul(q.flatten(1, 2), segment.k, segment.v, scale, rows, softcap, segment.bias))
            continue
        use_flash = has_flash and flash_wins(q, segment.k)
        is_windowed = window is not None and _visibility(segment, num_new, first_position, window) is WINDOW
        if use_flash and on_cpu and is_windowed and groups * num_new <= MATMUL_MAX_ROWS:
            hidden = _hidden(segment, num_new, groups, first_position, window, WINDOW)
            bias = torch.zeros(hidden.shape, dtype=torch.float32).masked_fill_(hidden, -torch.inf)
            merged.add(*by_flash_biased(q, segment.k, segment.v, scale, bias))
            continue
        for part in _parts_for_flash(segment, groups * num_new) if use_flash else [segment]:
            sees = _visibility(part, num_new, first_position, window)
            if use_flash and sees is ALL:
                merged.add(*by_flash(q, part.k, part.v, scale, is_causal=False))
            elif use_flash and sees is TRIANGLE and part.k.shape[1] == num_new:
                merged.add(*by_flash(q, part.k, part.v, scale, is_causal=True))
            elif use_flash and sees is TRIANGLE:
                merged.add(*by_flash_biased(q, part.k, part.v, scale, triangle_bias(groups, num_new, part.k.shape[1])))
            else:
                rows = _hidden(part, num_new, groups, first_position, window, sees)
                chunks = None if mass is None else mass.chunks_of(part)
                out, lse, *shares = by_matmul(q.flatten(1, 2), part.k, part.v, scale, rows, softcap, chunks=chunks)
                merged.add(out, lse)
                if mass is not None:
                    mass.add(chunks, *shares, lse)
    if mass is not None:
        mass.finish(merged.lse)
    return merged.result(sink_logits, groups, num_new).to(q.dtype).view(heads, groups, num_new, dim)


def _parts_for_flash(segment: Segment, num_rows: int) -> list[Segment]:
    """Without padding: old keys, which need no mask, and new ones; for few rows and keys on a CPU they stay one."""
    end = segment.k.shape[1] - segment.num_pad
    middle = end - segment.num_new
    is_small = num_rows <= MATMUL_MAX_ROWS and end <= MASKED_MAX_KEYS
    if segment.k.device.type == "cpu" and (is_small or segment.num_new == 1):
        return [_part(segment, slice(0, end), segment.num_new)]
    parts = [(slice(0, middle), 0), (slice(middle, end), segment.num_new)]
    return [_part(segment, keys, num_new) for keys, num_new in parts if keys.stop > keys.start]


def _part(segment: Segment, keys: slice, num_new: int) -> Segment:
    start = None if segment.start is None else segment.start + keys.start
    positions = None if segment.positions is None else segment.positions[:, keys]
    return Segment(segment.k[:, keys], segment.v[:, keys], start=start, positions=positions, num_new=num_new)


ALL, TRIANGLE, WINDOW = "all keys", "all old keys, new ones causally", "keys within the sliding window"


def _visibility(part: Segment, num_new: int, first_position: int, window: int | None) -> str:
    """What the new tokens see of a segment."""
    last_position = first_position + num_new - 1
    if window is not None and (part.positions is not None or part.start <= last_position - window):
        return WINDOW
    return TRIANGLE if part.num_new and num_new > 1 else ALL


def _hidden(
    part: Segment, num_new: int, groups: int, first_position: int, window: int | None, sees: str
) -> torch.Tensor | None:
    """A mask [1 or H, R, n], true where one of the last n slots must not be seen; None: all are seen."""
    num_keys, device = part.k.shape[1] - part.num_pad, part.k.device
    if sees is not WINDOW:
        width = (part.num_new if sees is TRIANGLE else 0) + part.num_pad
        if not width:
            return None
        mask = _tail_mask(num_new, width, part.num_pad, device, _stream_of(device))
        return mask if groups == 1 else mask.repeat(1, groups, 1)
    q_positions = torch.arange(first_position, first_position + num_new, device=device)[:, None]
    if part.positions is None:
        k_positions = torch.arange(part.start, part.start + num_keys, device=device)[None, None]
    else:
        k_positions = part.positions[:, None, :num_keys]
    hidden = (k_positions > q_positions) | (k_positions <= q_positions - window)
    return torch.nn.functional.pad(hidden, (0, part.num_pad), value=True).repeat(1, groups, 1)


def _stream_of(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


@lru_cache(maxsize=1024)
def _tail_mask(num_new: int, width: int, num_pad: int, device: torch.device, stream: int) -> torch.Tensor:
    """Hides padding, and new tokens from those before them, in the last `width` slots: [1, T, width].

    Each `stream` has masks of its own: another would not wait until they are written.
    """
    slots = torch.arange(width, device=device)
    last_seen = torch.arange(num_new, device=device) if width > num_pad else torch.full((num_new,), -1, device=device)
    return (slots > last_seen[:, None])[None]


class _Merged:
    """Partial attentions so far: out [H, R, D] and log-sum-exp [H, R, 1]."""

    def __init__(self):
        self._out = self.lse = None

    def add(self, out, lse):
        if self._out is None:
            self._out, self.lse = out, lse
            return
        both = torch.logaddexp(self.lse, lse)
        shift = both.clamp_min(torch.finfo(both.dtype).min)  # rows that saw nothing yet
        self._out = self._out * (self.lse - shift).exp() + out * (lse - shift).exp()
        self.lse = both

    def result(self, sink_logits, groups, num_new):
        if sink_logits is None:
            return self._out
        sinks = sink_logits.to(self.lse.dtype).repeat_interleave(num_new, dim=1)[..., None]
        return self._out * (self.lse - torch.logaddexp(self.lse, sinks)).exp()
