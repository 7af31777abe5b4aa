"""Checkpoints of tiny random models, saved as a hub folder is: configuration, safetensors, tokenizer.

Their logits are spread (standard deviation about 4), so that greedy ties are rare, and depend on the context: a token
that attention sees wrongly changes the output.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE = 96
WINDOW = 24
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
ONE_LAYER_SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, dict] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 12},
    "mistral": {"sliding_window": WINDOW},
    "gemma2": ONE_LAYER_SLIDING
    | {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 20.0},
    "gemma3_text": ONE_LAYER_SLIDING | {"query_pre_attn_scalar": 16},
    "phi3": {"sliding_window": WINDOW},
    "olmo2": {},
    "granite": {"attention_multiplier": 0.2, "residual_multiplier": 0.7, "embedding_multiplier": 3.0},
    "cohere": {"logit_scale": 0.5},
    "cohere2": ONE_LAYER_SLIDING | {"logit_scale": 0.5},
    "glm": {"partial_rotary_factor": 0.5},
    "glm4": {"partial_rotary_factor": 0.5},
    "starcoder2": {"sliding_window": WINDOW},
    "gpt_oss": ONE_LAYER_SLIDING | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "exaone4": ONE_LAYER_SLIDING,
    "smollm3": {"no_rope_layer_interval": 2},
    "olmo3": ONE_LAYER_SLIDING,
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
"""What a family's configuration has beyond SIZES; the keys are transformers' model types."""


def tiny_config(model_type: str, **changes) -> transformers.PretrainedConfig:
    """The configuration of a family, shrunk; `changes` win."""
    return AutoConfig.for_model(model_type, **SIZES | FAMILIES.get(model_type, {}) | changes)


def tiny_tokenizer(vocab_size: int = VOCAB_SIZE, *, prefix: str = "t") -> PreTrainedTokenizerFast:
    """Words t0, t1, ...: one for each id."""
    vocab = {f"{prefix}{token_id}": token_id for token_id in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocab, unk_token=f"{prefix}0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def random_model(config: transformers.PretrainedConfig, seed: int = 0, *, logit_spread: float = 4.0):
    """fp32 weights of a fixed seed; one-dimensional ones (norms, biases, sinks) vary around their usual value."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(parameter.nan_to_num().clamp(-1, 1) + 0.2 * noise)
            elif parameter is head:
                parameter.copy_(noise * logit_spread / parameter.shape[1] ** 0.5)
            else:
                parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)
    return model


def save_checkpoint(
    folder: Path,
    config: transformers.PretrainedConfig,
    seed: int = 0,
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    max_shard_size: str = "1GB",
    published_fields: dict | None = None,
    logit_spread: float = 4.0,
) -> Path:
    """Writes a checkpoint to `folder`.

    `published_fields` are merged into config.json as they stand (None removes), and are then all that is known.
    """
    model = random_model(config, seed, logit_spread=logit_spread)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    if published_fields:
        path = folder / "config.json"
        (folder / "generation_config.json").unlink()
        fields = json.loads(path.read_text()) | published_fields
        path.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))
    return folder


class Checkpoints:
    """Makes each checkpoint once, under `root`."""

    def __init__(self, root: Path):
        self._root, self._folders = root, {}

    def __call__(self, model_type: str, seed: int = 0, *, logit_spread: float = 4.0, **changes) -> Path:
        """The folder of a random model of this family; `changes` are of its configuration."""
        key = repr((model_type, seed, logit_spread, sorted(changes.items())))
        if key not in self._folders:
            folder, config = self._root / f"{len(self._folders)}-{model_type}", tiny_config(model_type, **changes)
            self._folders[key] = save_checkpoint(folder, config, seed, logit_spread=logit_spread)
        return self._folders[key]


def random_prompt(num_tokens: int, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> list[int]:
    """The second half repeats parts of the first, as texts do."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.randint(vocab_size, (num_tokens - num_tokens // 2,), generator=generator)
    return torch.cat([half, half[: num_tokens // 2].flip(0)]).tolist()


def greedy_tokens(folder: Path, prompt: list[int], num_tokens: int, dtype: torch.dtype = torch.float32) -> list[int]:
    """What transformers' own generate gives, with its eager attention and its own caches."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    return generate_greedily(model, prompt, num_tokens)


def generate_greedily(model, prompt: list[int], num_tokens: int) -> list[int]:
    """`num_tokens` tokens after `prompt`, past any end-of-sequence token."""
    # The model's own one would fill in an end of sequence; and without the mask, pad_token_id is taken for padding.
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        ids = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=num_tokens)
    return ids[0, len(prompt) :].tolist()
