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
from typing import Any

import torch

from workers.attention.attend import ForwardPass, KeysKnown, Progress, active


class LayerMajor:
    """The decoder of a transformers model, one layer at a time."""

    def __init__(self, hf_model, device: torch.device, progress: Progress):
        self._decoder, self._device, self._progress = hf_model.get_decoder(), device, progress
        self._layers = _decoder_layers(self._decoder)
        config = hf_model.config.get_text_config()
        self._hidden_size = config.hidden_size

    @torch.inference_mode()
    def prefill(
        self,
        tokens: list[int],
        make_layer_cache: Callable[[int], Any],
        piece_tokens: int,
        *,
        make_hidden: Callable[[int, int], torch.Tensor],
        observe: Callable | None = None,
        observe_mass: Callable | None = None,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Reads `tokens` in pieces; `make_layer_cache(layer)` takes each layer's keys and values.

        `make_hidden(N, hidden size)` gives the tensor where hidden states wait, on the device or the host.
        `observe(layer, start, k, v)` sees keys and values [H, T, D] of each piece; `on_progress(done, total)` counts
        tokens through all layers. After the last keys no more is computed, unless `observe_mass(layer, mass, T)` asks
        for the mean attention [H, N] of each piece's queries to every token, for measuring.
        """
        num_layers, num_tokens = len(self._layers), len(tokens)
        hidden = make_hidden(num_tokens, self._hidden_size) if num_layers > 1 else None
        input_ids = torch.tensor([tokens], device=self._device)  # once: on CUDA the host waits for it
        for layer in range(num_layers):
            cache = make_layer_cache(layer)
            for start in range(0, num_tokens, piece_tokens):
                rows = slice(start, min(start + piece_tokens, num_tokens))
                states, arguments = self._arguments(layer, input_ids[:, rows], start)
                if layer:
                    states = hidden[rows].to(self._device, non_blocking=True)[None]
                out = self._through(layer, states, arguments, cache, observe, observe_mass)
                if out is not None and hidden is not None:
                    hidden[rows].copy_(out[0], non_blocking=True)
                on_progress(layer * num_tokens + rows.stop, num_layers * num_tokens)
            cache.finish()

    def _through(self, layer, states, arguments, cache, observe, observe_mass) -> torch.Tensor | None:
        """The hidden states behind the layer, or None behind the last, whose keys are all that matters."""
        start, num_new = cache.length, states.shape[1]
        watched: dict[str, Any] = {}
        if observe is not None:
            watched["observe"] = lambda layer, q, k, v: observe(layer, start, k, v)
        if observe_mass is not None:
            watched |= {"observe_mass": lambda layer, mass: observe_mass(layer, mass, num_new), "chunk_size": 1}
        keys_only = layer == len(self._layers) - 1 and observe_mass is None
        with active(ForwardPass(cache, start, **watched, keys_only=keys_only, progress=self._progress), num_new):
            try:
                out = self._layers[layer](states, *arguments[0], **arguments[1])
            except KeysKnown:
                return None
        return out[0] if isinstance(out, tuple) else out

    def _arguments(self, layer: int, input_ids: torch.Tensor, start: int) -> tuple[torch.Tensor, tuple[tuple, dict]]:
        """The embedded piece [1, T, hidden size], and what the decoder would give `layer` beside hidden states."""
        position_ids = torch.arange(start, start + input_ids.shape[1], device=self._device)[None]
        with self._noted() as notes:
            self._decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        (embedded, *_), _ = notes[0]
        (_, *others), named = notes[layer]
        return embedded, (tuple(others), named)

    @contextmanager
    def _noted(self) -> Iterator[list[tuple[tuple, dict]]]:
        """Within it, layers do nothing but note their arguments, hidden states first."""
        notes: list[tuple[tuple, dict]] = []

        def note(hidden_states, *args, **kwargs):
            notes.append(((hidden_states, *args), kwargs))
            # Always the same, whether the decoder takes an output or its first element: it is not used.
            return notes[0][0][0]

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


def _decoder_layers(decoder) -> torch.nn.ModuleList:
    """The list of the decoder's layers, in each of which one module knows its layer's number."""
    num_layers = decoder.config.get_text_config().num_hidden_layers
    for module in decoder.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == num_layers:
            numbers = [{getattr(part, "layer_idx", None) for part in layer.modules()} - {None} for layer in module]
            if numbers == [{number} for number in range(num_layers)]:
                return module
    raise TypeError(f"{type(decoder).__name__} has no list of {num_layers} layers with attention")
