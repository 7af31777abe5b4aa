"""Sizes of models, from their config.json or as published: enough to plan by. Standard library only."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from conf.positions import num_positions
from conf.values import ConfigError


@dataclass(kw_only=True, frozen=True, slots=True)
class ModelShape:
    """Sizes of a decoder with gated MLPs, as Llama and Qwen have."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    ties_embeddings: bool = False

    @property
    def num_layer_parameters(self) -> int:
        """Number of parameters of one layer; norms and biases are small and left out."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        return attention + 3 * self.hidden_size * self.intermediate_size

    @property
    def num_parameters(self) -> int:
        """Number of parameters of the whole model."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.ties_embeddings else 2)
        return embeddings + self.num_layers * self.num_layer_parameters

    @property
    def num_read_parameters(self) -> int:
        """Number of parameters read in one forward pass: all but the table that embeds the input."""
        return self.num_layers * self.num_layer_parameters + self.vocab_size * self.hidden_size


def _llama(
    layers: int,
    hidden: int,
    intermediate: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    positions: int,
    *,
    head_dim: int | None = None,
    ties_embeddings: bool = False,
) -> ModelShape:
    """Sizes of one of the models below; where `head_dim` is None, the heads share out the hidden size."""
    return ModelShape(
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_heads=heads,
        num_kv_heads=kv_heads,
        vocab_size=vocab,
        max_positions=positions,
        head_dim=head_dim or hidden // heads,
        ties_embeddings=ties_embeddings,
    )


PUBLISHED = {
    "NousResearch/Yarn-Llama-2-7b-128k": _llama(32, 4096, 11008, 32, 32, 32000, 131072),
    "NousResearch/Yarn-Llama-2-13b-128k": _llama(40, 5120, 13824, 40, 40, 32000, 131072),
    "LargeWorldModel/LWM-Text-Chat-128K": _llama(32, 4096, 11008, 32, 32, 32000, 131072),
    "JackFram/llama-68m": _llama(2, 768, 3072, 12, 12, 32000, 2048),
    "meta-llama/Llama-3.1-8B": _llama(32, 4096, 14336, 32, 8, 128256, 131072),
    "meta-llama/Llama-3.2-3B": _llama(28, 3072, 8192, 24, 8, 128256, 131072, ties_embeddings=True),
    "meta-llama/Llama-3.2-1B": _llama(16, 2048, 8192, 32, 8, 128256, 131072, ties_embeddings=True),
    "Qwen/Qwen2.5-7B": _llama(28, 3584, 18944, 28, 4, 152064, 131072),
    "Qwen/Qwen2.5-0.5B": _llama(24, 896, 4864, 14, 2, 151936, 32768, ties_embeddings=True),
    "Qwen/Qwen3-8B": _llama(36, 4096, 12288, 32, 8, 151936, 40960, head_dim=128),
    "Qwen/Qwen3-0.6B": _llama(28, 1024, 3072, 16, 8, 151936, 40960, head_dim=128, ties_embeddings=True),
}
"""Sizes of the models of conf/model, by hub id."""


def model_shape(key: str, name: str, source: str) -> ModelShape:
    """Sizes of the model in the folder `source`, or of a published one; `name` is the value of `key`.

    Raises ConfigError where neither tells them.
    """
    folder = Path(source)
    if not folder.is_dir():
        if name in PUBLISHED:
            return PUBLISHED[name]
        known = ", ".join(sorted(PUBLISHED))
        raise ConfigError(f"{key} is {name!r}, whose sizes are not known here; it must be a local folder or of {known}")
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    fields = fields.get("text_config", fields)
    try:
        heads, hidden = fields["num_attention_heads"], fields["hidden_size"]
        return ModelShape(
            num_layers=fields["num_hidden_layers"],
            hidden_size=hidden,
            intermediate_size=fields["intermediate_size"],
            num_heads=heads,
            num_kv_heads=fields.get("num_key_value_heads") or heads,
            head_dim=fields.get("head_dim") or hidden // heads,
            vocab_size=fields["vocab_size"],
            max_positions=num_positions(
                fields.get("max_position_embeddings"), fields.get("rope_parameters") or fields.get("rope_scaling") or {}
            ),
            ties_embeddings=bool(fields.get("tie_word_embeddings", False)),
        )
    except KeyError as error:
        raise ConfigError(f"{key} is {name!r}; its config.json must have {error}, to plan without loading it") from None
