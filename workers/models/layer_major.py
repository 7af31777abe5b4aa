"""Reads a long prompt layer by layer: every piece of it passes through one layer before any passes through the next.

So a layer's keys and values are needed on the device for this layer only, move to their tier once, and are never
streamed back while the prompt is read. Between layers the pieces' hidden states wait in one tensor [N, hidden size].

transformers' decoders call their layers one after another. What a decoder gives each layer beside the hidden states
(rotations by layer type, masks, what else a family has) is learnt by letting it run with layers that only note their
arguments; nothing of a family is known here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tiers.device_layer import LayerPrefill
from workers.attention.forward_pass import ForwardPass, KeysKnown, Observers, Progress, active

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named arguments of a call."""


@dataclass(frozen=True, slots=True)
class PromptObservers:
    """Functions that see a prompt as it is read, piece by piece in each layer; see forward_pass.Observers.

    `on_kv(layer, start, k, v)` sees keys and values [H, T, D] of a piece from position `start` on.
    `on_mass(layer, mass, T)` sees the mean attention [H, N] of the piece's queries to every token so far, which takes
    time and memory: it is for measuring.
    """

    on_kv: Callable[[int, int, torch.Tensor, torch.Tensor], None] | None = None
    on_mass: Callable[[int, torch.Tensor, int], None] | None = None

    def of_piece(self, start: int, num_new: int) -> Observers:
        """Those of the pass over the piece of `num_new` tokens from position `start` on."""
        on_kv, on_mass = self.on_kv, self.on_mass
        return Observers(
            on_qkv=None if on_kv is None else lambda layer, q, k, v: on_kv(layer, start, k, v),
            on_mass=None if on_mass is None else lambda layer, mass: on_mass(layer, mass, num_new),
            chunk_size=1,
        )


NOBODY_READS_ALONG = PromptObservers()


class LayerMajor:
    """The decoder of a transformers model, one layer at a time."""

    def __init__(self, hf_model: PreTrainedModel, device: torch.device, progress: Progress):
        untyped: Any = hf_model  # transformers gives get_decoder no types
        self._decoder: nn.Module = untyped.get_decoder()
        self._device, self._progress = device, progress
        config = hf_model.config.get_text_config()
        self._layers = _decoder_layers(self._decoder, config.num_hidden_layers)
        self._hidden_size: int = config.hidden_size

    @torch.inference_mode()
    def prefill(
        self,
        tokens: list[int],
        make_layer_cache: Callable[[int], LayerPrefill],
        piece_tokens: int,
        *,
        make_hidden: Callable[[int, int], torch.Tensor],
        observers: PromptObservers = NOBODY_READS_ALONG,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Reads `tokens` in pieces; `make_layer_cache(layer)` takes each layer's keys and values.

        `make_hidden(N, hidden size)` gives the tensor where hidden states wait, on the device or the host.
        `on_progress(done, total)` counts tokens through all layers. After the last keys no more is computed, unless
        an observer asks for the mass of attention.
        """
        num_layers, num_tokens = len(self._layers), len(tokens)
        hidden = make_hidden(num_tokens, self._hidden_size) if num_layers > 1 else None
        input_ids = torch.tensor([tokens], device=self._device)  # once: on CUDA the host waits for it
        for layer in range(num_layers):
            cache = make_layer_cache(layer)
            for start in range(0, num_tokens, piece_tokens):
                rows = slice(start, min(start + piece_tokens, num_tokens))
                states, arguments = self._arguments(layer, input_ids[:, rows], start)
                if layer and hidden is not None:
                    states = hidden[rows].to(self._device, non_blocking=True)[None]
                out = self._through(layer, states, arguments, cache, observers)
                if out is not None and hidden is not None:
                    hidden[rows].copy_(out[0], non_blocking=True)
                on_progress(layer * num_tokens + rows.stop, num_layers * num_tokens)
            cache.finish()

    def _through(
        self,
        layer: int,
        states: torch.Tensor,
        arguments: Arguments,
        cache: LayerPrefill,
        observers: PromptObservers,
    ) -> torch.Tensor | None:
        """The hidden states [1, T, hidden size] behind the layer; None behind the last, of which only keys matter."""
        start, num_new = cache.length, states.shape[1]
        now = ForwardPass(
            cache,
            start,
            observers.of_piece(start, num_new),
            keys_only=layer == len(self._layers) - 1 and observers.on_mass is None,
            progress=self._progress,
        )
        with active(now, num_new):
            try:
                out: torch.Tensor | tuple[torch.Tensor, ...] = self._layers[layer](
                    states, *arguments[0], **arguments[1]
                )
            except KeysKnown:
                return None
        return out[0] if isinstance(out, tuple) else out

    def _arguments(self, layer: int, input_ids: torch.Tensor, start: int) -> tuple[torch.Tensor, Arguments]:
        """The embedded piece [1, T, hidden size], and what the decoder would give `layer` beside hidden states."""
        position_ids = torch.arange(start, start + input_ids.shape[1], device=self._device)[None]
        with self._noted() as notes:
            self._decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        (embedded, *_), _ = notes[0]
        (_, *others), named = notes[layer]
        return embedded, (tuple(others), named)

    @contextmanager
    def _noted(self) -> Iterator[list[Arguments]]:
        """Within it, layers do nothing but note their arguments, hidden states first."""
        notes: list[Arguments] = []

        def note(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            notes.append(((hidden_states, *args), kwargs))
            # Always the same, whether the decoder takes an output or its first element: it is not used.
            first: torch.Tensor = notes[0][0][0]
            return first

        own = [layer.__dict__.get("forward") for layer in self._layers]  # set by a library that wraps it, or none
        for layer in self._layers:
            layer.forward = note
        try:
            yield notes
        finally:
            for layer, forward in zip(self._layers, own, strict=True):
                del layer.forward
                if forward is not None:
                    layer.forward = forward


def _decoder_layers(decoder: nn.Module, num_layers: int) -> nn.ModuleList:
    """The list of the decoder's layers, in each of which one module knows its layer's number."""
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            numbers = [{getattr(part, "layer_idx", None) for part in layer.modules()} - {None} for layer in module]
            if numbers == [{number} for number in range(num_layers)]:
                return module
    raise TypeError(f"{type(decoder).__name__} has no list of {num_layers} layers with attention")
