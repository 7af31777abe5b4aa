"""A forward pass: what it works on, and the attention function by which transformers' models come to it.

Every model's attention is `cached_attention`. It finds the active ForwardPass, appends the layer's keys and values to
the pass's cache, and attends to what that cache shows; the maths is in workers.attention.attend.

Shapes: H kv heads, G query heads of one kv head, T new tokens, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from tiers.base import PassCache
from workers.attention.attend import attend
from workers.attention.chunk_mass import ChunkMass
from workers.parallel.shard import Heads

ATTENTION_NAME = "tierforce"


@dataclass(slots=True)
class Progress:
    """Grows while a model computes: a process that stands still is known by it."""

    num_layers: int = 0


@dataclass(frozen=True, slots=True)
class Observers:
    """Functions that see each layer's attention as a pass computes it; they must not change what they are given.

    `on_qkv(layer, q, k, v)` sees queries [H, G, T, D], keys and values [H, T, D] of the new tokens, before attention.
    `on_mass(layer, mass)` sees, after it, how much of the queries' attention each chunk of `chunk_size` tokens got:
    [H, chunks], adding up to 1 for each kv head. To compute that takes time: only products of matrices tell.
    """

    on_qkv: Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None] | None = None
    on_mass: Callable[[int, torch.Tensor], None] | None = None
    chunk_size: int = 0


NOBODY = Observers()


@dataclass(slots=True)
class ForwardPass:
    """One forward pass over tokens from `first_position` on, with the `cache` that it reads and writes.

    With `keys_only` attention is not computed: KeysKnown ends the pass when the cache has the keys and values.
    """

    cache: PassCache
    first_position: int
    observers: Observers = NOBODY
    keys_only: bool = False
    progress: Progress = field(default_factory=Progress)


class KeysKnown(Exception):  # noqa: N818
    """Not an error: the keys and values that the pass was for are in the cache."""


# Not an argument of the model's forward: some families drop keyword arguments they do not know.
_ACTIVE: ContextVar[ForwardPass] = ContextVar("tierforce_forward_pass")


@contextmanager
def active(forward_pass: ForwardPass, num_new: int) -> Iterator[None]:
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
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' AttentionInterface: query [1, H * G, T, D], key and value [1, H, T, D] -> ([1, T, H * G, D], None).

    `s_aux` [H * G] are logits of attention sinks without a value. Where the module is told to have but some heads of
    its own (workers.parallel.tensor_parallel), the cache gets theirs, and the output of the others is zero.
    """
    own: Heads | None = getattr(module, "own_heads", None)
    if own is None:
        return _attention_of_heads(module, query, key, value, scaling, sliding_window, softcap, s_aux), None
    query_of_own, s_aux = query[:, own.query], None if s_aux is None else s_aux[own.query]
    out = _attention_of_heads(
        module, query_of_own, key[:, own.kv], value[:, own.kv], scaling, sliding_window, softcap, s_aux
    )
    all_heads = out.new_zeros(1, out.shape[1], query.shape[1], out.shape[3])
    all_heads[:, :, own.query] = out
    return all_heads, None


def _attention_of_heads(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
    s_aux: torch.Tensor | None,
) -> torch.Tensor:
    """Attention [1, T, H * G, D] of heads that all belong to the cache; arguments as in `cached_attention`."""
    forward_pass, layer = _ACTIVE.get(), _layer_of(module)
    observers = forward_pass.observers
    k, v = key[0], value[0]
    q: torch.Tensor = query[0].view(k.shape[0], -1, *query.shape[2:])
    forward_pass.progress.num_layers += 1
    forward_pass.cache.append(layer, k, v)
    if observers.on_qkv is not None:
        observers.on_qkv(layer, q, k, v)
    if forward_pass.keys_only:
        raise KeysKnown
    mass = None if observers.on_mass is None else ChunkMass(observers.chunk_size)
    out = attend(
        q,
        forward_pass.cache.segments(layer),
        first_position=forward_pass.first_position,
        scale=q.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
        sink_logits=None if s_aux is None else s_aux.view(k.shape[0], -1),
        mass=mass,
    )
    if mass is not None and observers.on_mass is not None:
        observers.on_mass(layer, mass.total())
    return out.permute(2, 0, 1, 3).flatten(1, 2)[None]


def _layer_of(module: nn.Module) -> int:
    """The number of an attention module's layer, which transformers gives it."""
    layer = module.layer_idx
    assert isinstance(layer, int), f"{type(module).__name__} is in layer {layer!r}"
    return layer


AttentionInterface.register(ATTENTION_NAME, cached_attention)
