"""Facts of a model in a local folder or on the hub, read and checked before any weight is.

No code from a checkpoint is ever run: configurations with `auto_map` are loaded by transformers' own classes, or
refused.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import huggingface_hub
import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.quantizers.auto import AutoHfQuantizer

from conf.model_source import model_source
from conf.positions import check_stretch, num_positions
from conf.schema import ConfigError
from tiers.base import CacheShape
from workers.checkpoint.families import OwnInputs, check_inputs, original_length
from workers.checkpoint.files import check_no_adapter, check_weight_files
from workers.checkpoint.generation_file import as_ids, end_ids, read_generation, values_of
from workers.models.skeleton import weightless
from workers.parallel.shard import WHOLE, Shard, check_size
from workers.parallel.tensor_parallel import plan_sharding

# Attention that our function would compute silently wrong, or that is none.
REFUSED_MODEL_TYPES = ("llama4", "llama4_text", "gemma3n", "gemma3n_text")
SUPPORTED_LAYER_TYPES = ("full_attention", "sliding_attention")
SUPPORTED = "a decoder with full or sliding-window attention, such as Llama, Qwen, Mistral, Gemma 3, Phi or OLMo"
HUB_TIMEOUT_SECONDS = 2.0


@dataclass(kw_only=True)
class ModelFacts:
    """All that is known of a model before its weights are read, or of one rank's part of it."""

    key: str
    """The configuration key that asked for it, model.target or model.drafter; messages name it."""
    source: str
    """Folder or hub id to load from."""
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    cache_shape: CacheShape
    windows: list[int | None]
    """The sliding window of each layer, in tokens."""
    max_positions: int
    generation: dict[str, Any]
    """Values of its generation_config.json; see workers.checkpoint.generation_file.values_of."""
    original_length: int | None
    """Tokens beyond which a text is read in another way; see workers.checkpoint.families. None: there are none."""
    eos_ids: frozenset[int]
    """Ids of the tokens that end a text; see workers.checkpoint.generation_file.end_ids."""
    rule_eos_ids: frozenset[int]
    """Those of them that `generate` knows of, which rules on the end of sequence mean."""
    num_weight_bytes: int
    shard: Shard = WHOLE
    """The part that `cache_shape` and `num_weight_bytes` are of, and that workers.models.loading reads."""

    def sharded(self, shard: Shard) -> ModelFacts:
        """The facts of one rank's part; these must be a whole model's. Raises ConfigError, as for an illegal size."""
        assert self.shard == WHOLE, f"rank {self.shard.rank} of {self.shard.size} is a part already"
        if shard == WHOLE:
            return self
        text_config = self.config.get_text_config()
        name = f"{self.key}={self.source}"
        check_size(name, text_config.num_attention_heads, self.cache_shape.num_kv_heads, shard.size)
        if getattr(self.config, "quantization_config", None):
            raise ConfigError(
                f"the number of verifier ranks is {shard.size}; it must be 1 for {name}, whose weights are quantized"
            )
        model = weightless(self.config)
        sharding = plan_sharding(model, shard)
        return replace(
            self,
            cache_shape=replace(self.cache_shape, num_kv_heads=sharding.heads.num_kv),
            num_weight_bytes=sharding.num_parameters(model) * self.dtype.itemsize,
            shard=shard,
        )


def describe(key: str, name: str, dtype: torch.dtype, max_positions: int | None = None) -> ModelFacts:
    """Reads configuration and tokenizer of `name`, which `key` asked for, to be stretched to `max_positions`.

    Raises ConfigError.
    """
    source = model_source(key, name)
    if not Path(source).is_dir():
        _go_offline_without_network()
    config = _load(key, name, AutoConfig, source)
    text_config = _text_config(key, name, config)
    _refuse_unsupported(key, name, text_config)
    _refuse_unread(key, name, config)
    check_no_adapter(key, source)
    if max_positions is not None:
        _stretch(text_config, max_positions)
    if Path(source).is_dir():
        check_weight_files(key, Path(source))
    tokenizer = _load(key, name, AutoTokenizer, source)
    generation = read_generation(key, name, source)
    model = _weightless(key, name, config)
    _refuse_encoder(key, name, model)
    check_inputs(key, name, model)
    length, max_positions = original_length(key, name, text_config), _max_positions(text_config)
    if length is not None and length.rule is OwnInputs.up_to_original:
        max_positions, length = length.num_tokens, None
    return ModelFacts(
        key=key,
        source=source,
        config=config,
        tokenizer=tokenizer,
        dtype=dtype,
        cache_shape=_cache_shape(key, name, text_config, dtype),
        windows=_windows(text_config),
        max_positions=max_positions,
        original_length=None if length is None else length.num_tokens,
        generation=values_of(generation),
        eos_ids=end_ids(generation, config, source, tokenizer),
        rule_eos_ids=frozenset(as_ids(generation.eos_token_id)),
        # Buffers are small and left out.
        num_weight_bytes=sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize,
    )


def _go_offline_without_network() -> None:
    """Without a network, has only what was downloaded before looked for; the hub's library tries for half a minute."""
    if huggingface_hub.constants.HF_HUB_OFFLINE or getproxies():
        return
    hub = urlsplit(huggingface_hub.constants.ENDPOINT)
    port = hub.port or (80 if hub.scheme == "http" else 443)
    try:
        socket.create_connection((hub.hostname, port), timeout=HUB_TIMEOUT_SECONDS).close()
    except OSError:
        huggingface_hub.constants.HF_HUB_OFFLINE = True


def _load(key: str, name: str, auto_class: type[AutoConfig] | type[AutoTokenizer], source: str) -> Any:
    """Reads `source` by one of transformers' classes. Raises ConfigError."""
    try:
        return auto_class.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # whatever transformers makes of files that are not as they should be
        reason = " ".join(str(error).split())[:300]
        rule = "a local folder, or the hub id of a model that transformers knows without remote code"
        raise ConfigError(f"{key} is {name!r}; it must be {rule}. {auto_class.__name__} says: {reason}") from error


def _refuse_unsupported(key: str, name: str, config: PreTrainedConfig) -> None:
    """Raises ConfigError for a model that our attention cannot serve exactly."""
    odd_layers = sorted(set(getattr(config, "layer_types", None) or []) - set(SUPPORTED_LAYER_TYPES))
    if config.model_type in REFUSED_MODEL_TYPES or odd_layers:
        what = f"layers of type {', '.join(odd_layers)}" if odd_layers else f"model type {config.model_type}"
        raise ConfigError(f"{key} is {name!r} with {what}, which cannot be served exactly; it must be {SUPPORTED}")
    if config.is_encoder_decoder:
        kind = f"model type {config.model_type}, an encoder and a decoder"
        raise ConfigError(f"{key} is {name!r} of {kind}; it must be {SUPPORTED}")
    if not getattr(config, "num_attention_heads", None):
        raise ConfigError(f"{key} is {name!r} of model type {config.model_type}; it must be {SUPPORTED}")


def _refuse_encoder(key: str, name: str, model: PreTrainedModel) -> None:
    """Raises ConfigError for a model whose tokens see those behind them, as BERT's without `is_decoder` do."""
    # GPT-NeoX has the field as well, and is a decoder whatever it says.
    is_causal = any(getattr(module, "is_causal", False) is True for module in model.modules())
    if getattr(model.config, "is_decoder", True) is False and not is_causal:
        kind = f"model type {model.config.model_type}, an encoder (its is_decoder is false)"
        raise ConfigError(f"{key} is {name!r} of {kind}; it must be {SUPPORTED}")


def _text_config(key: str, name: str, config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of the configuration that is of the text's model. Raises ConfigError where there are several."""
    try:
        return config.get_text_config()
    except ValueError as error:
        raise ConfigError(
            f"{key} is {name!r} of model type {config.model_type}, which has several models of text; it must be "
            f"{SUPPORTED}"
        ) from error


def _refuse_unread(key: str, name: str, config: PreTrainedConfig) -> None:
    """Raises ConfigError for quantized weights that transformers cannot read on this machine."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return
    fields = quantization if isinstance(quantization, dict) else vars(quantization)
    try:
        untyped: Any = AutoHfQuantizer
        untyped.from_config(quantization, pre_quantized=True).validate_environment(device_map=None)
    except Exception as error:  # a method that is not known, or whose library is not installed
        reason = " ".join(str(error).split())[:300]
        method = getattr(fields.get("quant_method"), "value", fields.get("quant_method"))
        raise ConfigError(
            f"{key} is {name!r}, whose weights are quantized (quantization_config.quant_method is {method!r}) and "
            f"cannot be read here: {reason}. Name a model that is not quantized"
        ) from error


def _cache_shape(key: str, name: str, config: PreTrainedConfig, dtype: torch.dtype) -> CacheShape:
    """The sizes of keys and values. Raises ConfigError."""
    heads = config.num_attention_heads
    try:
        num_kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    except RuntimeError as error:  # transformers raises it where an attribute differs from layer to layer
        raise ConfigError(f"{key} is {name!r}, whose layers differ in their heads; it must be {SUPPORTED}") from error
    if min(config.hidden_size, config.num_hidden_layers, num_kv_heads, head_dim) < 1:
        raise ConfigError(f"{key} is {name!r}, whose config.json gives a size below 1; it must be {SUPPORTED}")
    return CacheShape(num_layers=config.num_hidden_layers, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype)


def _windows(config: PreTrainedConfig) -> list[int | None]:
    num_layers, window = config.num_hidden_layers, getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["full_attention"] * num_layers
    if window is not None and getattr(config, "layer_types", None) is None:
        types = ["sliding_attention"] * num_layers
    return [window if kind == "sliding_attention" else None for kind in types]


def _max_positions(config: PreTrainedConfig) -> int:
    """Positions the model is made for, RoPE scaling included."""
    return num_positions(
        getattr(config, "max_position_embeddings", None), getattr(config, "rope_parameters", None) or {}
    )


def _stretch(config: PreTrainedConfig, max_positions: int) -> None:
    """Gives the model so many positions by YaRN (arXiv 2309.00071). Raises ConfigError."""
    trained = _max_positions(config)
    check_stretch(max_positions, trained)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "default":
        raise ConfigError(
            f"model.max_positions is {max_positions}; it must be null for this model: only a plain rotary embedding "
            f"can be stretched, and its rope_parameters are {rope}"
        )
    config.rope_parameters = rope | {
        "rope_type": "yarn",
        "factor": max_positions / trained,
        "original_max_position_embeddings": trained,
    }
    config.max_position_embeddings = max_positions


def _weightless(key: str, name: str, config: PreTrainedConfig) -> PreTrainedModel:
    """The model without its weights. Raises ConfigError where `config` makes none."""
    try:
        return weightless(config)
    except Exception as error:  # whatever a model's code makes of odd sizes
        raise ConfigError(
            f"{key} is {name!r}, whose config.json makes no model ({error!r}); check its sizes"
        ) from error
