"""Writes a Llama of transformers as a GGUF file, which llama.cpp reads: the same weights, in fp32, fp16 or bf16.

The tokenizer goes along where it is a byte-level BPE that llama.cpp splits text for in the same way; otherwise the file
has none, and takes and gives token ids only. Needs the package gguf.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

from conf.schema import ConfigError
from launch.prompts.encoder import Encoder

ARCHITECTURE = "llama"
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OTHER_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
GGML_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
DIGIT_SPLITTING, PLAIN = "smollm", "gpt-2"
"""llama.cpp's names of ways to split text: GPT-2's, after single digits; GPT-2's alone."""
GPT2_SPLIT = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
SPECIAL, UNUSED, NORMAL = "CONTROL", "UNUSED", "NORMAL"
"""gguf's names of kinds of tokens."""


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, dtype: torch.dtype) -> None:
    """Writes a LlamaForCausalLM, its matrices as `dtype`, vectors as fp32. Raises ConfigError for any other model."""
    import gguf

    config = _llama_config(model)
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    heads = config.num_attention_heads
    kv_heads = config.num_key_value_heads or heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_rope(writer, gguf, config)
    _add_tokenizer(writer, gguf, tokenizer, config.vocab_size)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if ".q_proj." in name or ".k_proj." in name:
            tensor = interleaved(tensor, heads if ".q_proj." in name else kv_heads)
        kind = getattr(gguf.GGMLQuantizationType, GGML_TYPES[dtype if tensor.dim() > 1 else torch.float32])
        values = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _llama_config(model: PreTrainedModel) -> LlamaConfig:
    """The configuration of a model that llama.cpp reads as a Llama. Raises ConfigError."""
    config = model.config
    if config.model_type != ARCHITECTURE or config.attention_bias or config.mlp_bias:
        raise ConfigError(
            f"model.target is of model type {config.model_type}; for llama.cpp it must be a llama without biases"
        )
    assert isinstance(config, LlamaConfig)
    return config


def gguf_name(name: str) -> str:
    """The name in a GGUF file of a weight that transformers calls `name`."""
    if name in OTHER_NAMES:
        return OTHER_NAMES[name]
    layer, _, part = name.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{LAYER_NAMES[part.removesuffix('.weight')]}.weight"


def interleaved(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of q or k in llama.cpp's order: it rotates neighbours, transformers a row and the one half a head away."""
    rows, width = weight.shape
    return weight.view(num_heads, 2, rows // num_heads // 2, width).transpose(1, 2).reshape(rows, width)


def _add_rope(writer: Any, gguf: Any, config: LlamaConfig) -> None:
    """Writes the rotary embedding. Raises ConfigError for one that llama.cpp does not have."""
    rope: dict[str, Any] = {**(config.rope_parameters or {})}
    kind = rope.get("rope_type", "default")
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    if kind == "default":
        return
    if kind not in ("yarn", "linear"):
        raise ConfigError(
            f"model.target has a rotary embedding of type {kind}; for llama.cpp it must be default or yarn"
        )
    writer.add_rope_scaling_type(getattr(gguf.RopeScalingType, kind.upper()))
    writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _add_tokenizer(writer: Any, gguf: Any, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Writes the tokenizer, or that there is none, where llama.cpp would split text in another way."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    split = _split_name(described)
    if split is None:
        writer.add_tokenizer_model("no_vocab")
        return
    texts = {token_id: text for text, token_id in tokenizer.get_vocab().items()}
    special = {token["id"] for token in described["added_tokens"] if token["special"]}
    kinds = [
        SPECIAL if token_id in special else NORMAL if token_id in texts else UNUSED for token_id in range(vocab_size)
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list([texts.get(token_id, f"[unused {token_id}]") for token_id in range(vocab_size)])
    writer.add_token_types([getattr(gguf.TokenType, kind) for kind in kinds])
    writer.add_token_merges(
        [pair if isinstance(pair, str) else " ".join(pair) for pair in described["model"]["merges"]]
    )
    for token_id, add in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.eos_token_id, writer.add_eos_token_id),
    ):
        if token_id is not None:
            add(token_id)
    writer.add_add_bos_token(
        tokenizer.bos_token_id is not None and Encoder(tokenizer).beginning == [tokenizer.bos_token_id]
    )


def _split_name(described: dict[str, Any]) -> str | None:
    """llama.cpp's name of the way this tokenizer (tokenizer.json) splits text; None: it has none that we know."""
    if described["model"]["type"] != "BPE" or described.get("normalizer") is not None:
        return None
    steps = described.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    *before, last = steps
    if {key: last.get(key) for key in GPT2_SPLIT} != GPT2_SPLIT:
        return None
    if not before:
        return PLAIN
    return DIGIT_SPLITTING if before == [{"type": "Digits", "individual_digits": True}] else None
