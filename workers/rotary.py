"""Rotary embeddings whose frequencies depend on the sequence's length (dynamic NTK, longrope), made repeatable.

transformers recomputes such frequencies when a forward pass meets a longer sequence. In speculative decoding the same
position is computed in passes of different lengths, so each position gets one fixed rotation here: the one that plain
decoding uses, which reads the prompt in one pass and then one token a pass.
"""

from __future__ import annotations

import torch

LENGTH_DEPENDENT_TYPES = ("dynamic", "longrope")


class RotaryTable(torch.nn.Module):
    """Stands for a model's rotary embedding: cos and sin [1, T, D] by position, from a table that grows on demand."""

    def __init__(self, rotary: torch.nn.Module):
        super().__init__()
        self.rotary = rotary
        self._rows: list[tuple[torch.Tensor, torch.Tensor]] = []

    def read_prompt(self, num_tokens: int) -> None:
        """A new sequence: its first `num_tokens` positions are computed in one pass."""
        self._rows, self._num_prompt_tokens = [], num_tokens

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor):
        num_known = sum(cos.shape[1] for cos, _ in self._rows)
        last = int(position_ids.max())
        while num_known <= last:
            count = self._num_prompt_tokens if not self._rows else 1
            positions = torch.arange(num_known, num_known + count, device=position_ids.device)[None]
            self._rows.append(self.rotary(x, positions))
            num_known += count
        if len(self._rows) > 1:
            self._rows = [tuple(torch.cat(parts, dim=1) for parts in zip(*self._rows, strict=True))]
        cos, sin = self._rows[0]
        return cos[:, position_ids[0]], sin[:, position_ids[0]]


def make_length_independent(model) -> RotaryTable | None:
    """Replaces the rotary embedding of a transformers model where it depends on the length; returns the table."""
    config = model.config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    if parameters.get("rope_type") not in LENGTH_DEPENDENT_TYPES:
        return None
    base = model.base_model
    base.rotary_emb = RotaryTable(base.rotary_emb)
    return base.rotary_emb
