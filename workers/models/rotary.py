"""Rotary embeddings whose frequencies depend on the sequence's length (dynamic NTK, longrope), made repeatable.

transformers recomputes such frequencies when a forward pass meets a longer sequence. In speculative decoding the same
position is computed in passes of different lengths, so each position gets one fixed rotation here: the one that plain
decoding uses, which reads the prompt in one pass and then one token a pass.

Some families with longrope (workers.checkpoint.families) read all tokens again when the text passes the original
length: from then on each position has another rotation, and who reads the tokens again begins the table anew.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from transformers import PreTrainedModel

from conf.schema import ConfigError
from workers.checkpoint.families import OWN_INPUTS, OwnInputs

LENGTH_DEPENDENT_TYPES = ("dynamic", "longrope")
POSITIONS_AHEAD = 64
"""Positions computed at once where a table grows, so that it is not copied for each token."""

Rotations = tuple[torch.Tensor, torch.Tensor]
"""cos and sin [1, T, D] of some positions."""


class RotaryTable(torch.nn.Module):
    """Stands for a model's rotary embedding: cos and sin [1, T, D] by position, from tables that grow on demand.

    Some models rotate differently by the type of the layer: there is a table for each type, and one for none.
    """

    def __init__(self, rotary: torch.nn.Module, *, rereads: bool = False):
        super().__init__()
        self.rotary, self._rereads = rotary, rereads
        self._rows: dict[str | None, Rotations] = {}
        self._num_prompt_tokens = 1
        self._lock = threading.Lock()

    def read_prompt(self, num_tokens: int) -> None:
        """Begins a sequence whose first `num_tokens` positions are computed in one pass."""
        self._rows, self._num_prompt_tokens = {}, num_tokens

    def read_again(self, num_tokens: int) -> None:
        """The first `num_tokens` tokens are read again: with their rotations as they were, unless the family's change.

        For a family that rereads, these are the rotations of a text of so many tokens.
        """
        if self._rereads:
            self.read_prompt(num_tokens)

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None) -> Rotations:
        cos, sin = self._known_to(int(position_ids.max()), x, layer_type)
        return cos[:, position_ids[0]], sin[:, position_ids[0]]

    def _known_to(self, last: int, x: torch.Tensor, layer_type: str | None) -> Rotations:
        """Rotations of the positions up to `last`. Roles that share the model may ask at the same time."""
        with self._lock:
            known = self._rows.get(layer_type)
            if known is None or known[0].shape[1] <= last:
                known = self._rows[layer_type] = self._grown(known, last, x, layer_type)
                if x.is_cuda:
                    torch.cuda.current_stream(x.device).synchronize()
        return known

    def _grown(self, known: Rotations | None, last: int, x: torch.Tensor, layer_type: str | None) -> Rotations:
        """The table `known`, or a new one, with the positions up to `last` and some ahead."""
        if known is None:
            # Dynamic NTK remembers the longest sequence until it meets a short one.
            self._rotate(x, 0, 1, layer_type)
            known = self._rotate(x, 0, self._num_prompt_tokens, layer_type)
        num_known = known[0].shape[1]
        if num_known <= last:
            end = last + 1 + POSITIONS_AHEAD
            new = [self._rotate(x, position, 1, layer_type) for position in range(num_known, end)]
            cos, sin = (torch.cat(parts, dim=1) for parts in zip(known, *new, strict=True))
            known = cos, sin
        return known

    def _rotate(self, x: torch.Tensor, first: int, count: int, layer_type: str | None) -> Rotations:
        """Rotations as the model computes them in a pass over these positions."""
        positions = torch.arange(first, first + count, device=x.device)[None]
        rotations: Rotations = (
            self.rotary(x, positions) if layer_type is None else self.rotary(x, positions, layer_type)
        )
        return rotations


def make_length_independent(model: PreTrainedModel) -> RotaryTable | None:
    """Replaces the rotary embedding of a transformers model where it depends on the length; returns the table.

    Raises ConfigError where the model has rotary embeddings elsewhere than the families known here.
    """
    parameters = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    # One set of parameters, or one for each type of layer.
    sets = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    if not any(one.get("rope_type") in LENGTH_DEPENDENT_TYPES for one in sets):
        return None
    base: Any = model.base_model
    if getattr(base, "rotary_emb", None) is None:
        if not any("rotary" in name for name, _ in model.named_modules()):
            return None  # config.json speaks of rotations, and the model has none
        raise ConfigError(
            f"the model of type {model.config.model_type} rotates by length (rope_parameters is {parameters}) in a way "
            "that is not known here; it must be a model with one rotary embedding for all layers"
        )
    rereads = OWN_INPUTS.get(model.config.model_type) is OwnInputs.rereads
    table = base.rotary_emb = RotaryTable(base.rotary_emb, rereads=rereads)
    return table
