"""Models and tokenizers from local folders or the hub: described and checked before any weight is read, then loaded.

No code from a checkpoint is ever run: configurations with `auto_map` are loaded by transformers' own classes, or
refused, and older checkpoints in PyTorch's format are read as weights only.
"""

from __future__ import annotations

import copy
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import huggingface_hub
import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from conf.model_source import model_source
from conf.schema import ConfigError
from tiers.base import CacheShape
from tiers.device_layer import DeviceLayer
from tiers.device_tier import DeviceTier
from tiers.full_cache import FullCache
from workers.models.cached_models import CausalModel
from workers.models.sharded_weights import fill, make_skeleton, weight_files
from workers.parallel.shard import WHOLE, Shard, check_size
from workers.parallel.tensor_parallel import AllReduce, connect, cut, plan_sharding

# Attention that our function would compute silently wrong, or that is none.
REFUSED_MODEL_TYPES = ("llama4", "llama4_text", "gemma3n", "gemma3n_text")
SUPPORTED_LAYER_TYPES = ("full_attention", "sliding_attention")
SUPPORTED = "a decoder with full or sliding-window attention, such as Llama, Qwen, Mistral, Gemma 3, Phi or OLMo"
HUB_TIMEOUT_SECONDS = 2.0
SELF_CHECK_TOKENS, SELF_CHECK_PIECE_TOKENS = 24, 5
SELF_CHECK_LAYERS = 2
"""Of a tensor-parallel model, which no rank has whole."""
SELF_CHECK_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


@dataclass(kw_only=True)
class ModelFacts:
    """What a configuration says of a model, or of one rank's part of it."""

    key: str
    """model.target or model.drafter."""
    source: str
    """Folder or hub id to load from."""
    config: transformers.PretrainedConfig
    tokenizer: transformers.PreTrainedTokenizerBase
    dtype: torch.dtype
    cache_shape: CacheShape
    windows: list[int | None]
    """The sliding window of each layer, in tokens."""
    max_positions: int
    eos_ids: frozenset[int]
    num_weight_bytes: int
    shard: Shard = WHOLE
    """The part that `cache_shape` and `num_weight_bytes` are of, and that `load_model` reads."""

    def sharded(self, shard: Shard) -> ModelFacts:
        """Of a whole model's facts those of one rank's part. Raises ConfigError, as for a size that is not legal."""
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
        model = _without_memory(self.config)
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
    text_config = config.get_text_config()
    _refuse_unsupported(key, name, text_config)
    if max_positions is not None:
        _stretch(text_config, max_positions)
    if Path(source).is_dir():
        _check_weight_files(key, Path(source))
    tokenizer = _load(key, name, AutoTokenizer, source)
    return ModelFacts(
        key=key,
        source=source,
        config=config,
        tokenizer=tokenizer,
        dtype=dtype,
        cache_shape=_cache_shape(key, name, text_config, dtype),
        windows=_windows(text_config),
        max_positions=_max_positions(text_config),
        eos_ids=_eos_ids(source, config),
        num_weight_bytes=_num_parameters(key, name, config) * dtype.itemsize,
    )


def _go_offline_without_network() -> None:
    """Then only what was downloaded before is looked for; the hub's library would try for half a minute."""
    if huggingface_hub.constants.HF_HUB_OFFLINE or getproxies():
        return
    hub = urlsplit(huggingface_hub.constants.ENDPOINT)
    port = hub.port or (80 if hub.scheme == "http" else 443)
    try:
        socket.create_connection((hub.hostname, port), timeout=HUB_TIMEOUT_SECONDS).close()
    except OSError:
        huggingface_hub.constants.HF_HUB_OFFLINE = True


def _load(key: str, name: str, auto_class, source: str):
    try:
        return auto_class.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # whatever transformers makes of files that are not as they should be
        reason = " ".join(str(error).split())[:300]
        rule = "a local folder, or the hub id of a model that transformers knows without remote code"
        raise ConfigError(f"{key} is {name!r}; it must be {rule}. {auto_class.__name__} says: {reason}") from error


def _refuse_unsupported(key: str, name: str, config) -> None:
    odd_layers = sorted(set(getattr(config, "layer_types", None) or []) - set(SUPPORTED_LAYER_TYPES))
    if config.model_type in REFUSED_MODEL_TYPES or odd_layers:
        what = f"layers of type {', '.join(odd_layers)}" if odd_layers else f"model type {config.model_type}"
        raise ConfigError(f"{key} is {name!r} with {what}, which cannot be served exactly; it must be {SUPPORTED}")
    if not getattr(config, "num_attention_heads", None):
        raise ConfigError(f"{key} is {name!r} of model type {config.model_type}; it must be {SUPPORTED}")


def _cache_shape(key: str, name: str, config, dtype: torch.dtype) -> CacheShape:
    heads = config.num_attention_heads
    try:
        num_kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    except RuntimeError as error:  # transformers raises it where an attribute differs from layer to layer
        raise ConfigError(f"{key} is {name!r}, whose layers differ in their heads; it must be {SUPPORTED}") from error
    if min(config.hidden_size, config.num_hidden_layers, num_kv_heads, head_dim) < 1:
        raise ConfigError(f"{key} is {name!r}, whose config.json gives a size below 1; it must be {SUPPORTED}")
    return CacheShape(num_layers=config.num_hidden_layers, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype)


WEIGHT_FILES = (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME)


def _check_weight_files(key: str, folder: Path) -> None:
    """Every file of weights that the folder should have is there, and if it is safetensors, whole."""
    first = next((name for name in WEIGHT_FILES if (folder / name).is_file()), SAFE_WEIGHTS_NAME)
    names = [first]
    if first.endswith(".index.json"):
        try:
            names = sorted(set(json.loads((folder / first).read_text())["weight_map"].values()))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ConfigError(f"{key}: {folder / first} is damaged ({error!r}); download it again") from error
    for path in (folder / name for name in names):
        if not path.is_file():
            raise ConfigError(f"{key}: {path} is missing; download the model again, as safetensors")
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, framework="pt") as file:
                    file.keys()
            except (SafetensorError, OSError) as error:
                raise ConfigError(f"{key}: {path} is damaged ({error}); download it again") from error


def _windows(config) -> list[int | None]:
    num_layers, window = config.num_hidden_layers, getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["full_attention"] * num_layers
    if window is not None and getattr(config, "layer_types", None) is None:
        types = ["sliding_attention"] * num_layers
    return [window if kind == "sliding_attention" else None for kind in types]


def _max_positions(config) -> int:
    """Positions the model is made for, RoPE scaling included."""
    positions = getattr(config, "max_position_embeddings", None) or 2**31
    rope = getattr(config, "rope_parameters", None) or {}
    factor, kind = rope.get("factor") or 1.0, rope.get("rope_type", "default")
    if kind in ("linear", "dynamic"):
        return int(positions * factor)
    if kind == "yarn" and rope.get("original_max_position_embeddings"):
        return max(positions, int(rope["original_max_position_embeddings"] * factor))
    return positions


def _stretch(config, max_positions: int) -> None:
    """Gives the model so many positions by YaRN (arXiv 2309.00071). Raises ConfigError."""
    trained = _max_positions(config)
    if max_positions <= trained:
        rule = f"above the {trained} positions that the model has, or null"
        raise ConfigError(f"model.max_positions is {max_positions}; it must be {rule}")
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


def _eos_ids(source: str, config) -> frozenset[int]:
    try:
        eos = transformers.GenerationConfig.from_pretrained(source).eos_token_id
    except OSError:
        eos = config.get_text_config().eos_token_id
    return frozenset() if eos is None else frozenset([eos] if isinstance(eos, int) else eos)


def _num_parameters(key: str, name: str, config) -> int:
    """Buffers are small and left out. Raises ConfigError for a configuration that makes no model."""
    try:
        model = _without_memory(config)
    except Exception as error:  # whatever a model's code makes of odd sizes
        raise ConfigError(
            f"{key} is {name!r}, whose config.json makes no model ({error!r}); check its sizes"
        ) from error
    return sum(parameter.numel() for parameter in model.parameters())


def _without_memory(config):
    """A model of this configuration, to be counted."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def check_same_vocabulary(target: ModelFacts, drafter: ModelFacts) -> None:
    """Token texts must agree, id by id; the padding of the vocabularies may differ. Raises ConfigError."""
    ours, theirs = target.tokenizer.get_vocab(), drafter.tokenizer.get_vocab()
    if ours == theirs:
        return
    our_texts, their_texts = ({token_id: text for text, token_id in vocab.items()} for vocab in (ours, theirs))
    both = our_texts.keys() | their_texts.keys()
    first = min(token_id for token_id in both if our_texts.get(token_id) != their_texts.get(token_id))
    example = f"id {first} is {their_texts.get(first)!r} there and {our_texts.get(first)!r} in the target's"
    raise ConfigError(
        f"model.drafter is {drafter.source!r}; its tokenizer must be that of model.target={target.source!r}: "
        f"{example}. Name a drafter of the same family, or model.drafter=lookup"
    )


def load_model(
    facts: ModelFacts, device: torch.device, *, self_check: bool, all_reduce: AllReduce | None = None
) -> CausalModel:
    """Reads the weights onto `device`. Raises ConfigError where our attention differs from transformers' own.

    For one rank's part there is an `all_reduce` over the ranks, all of which load their parts at the same time.
    """
    transformers.utils.logging.disable_progress_bar()
    if facts.shard != WHOLE:
        assert all_reduce is not None, f"rank {facts.shard.rank} of {facts.shard.size} needs sums over the ranks"
        files = _files_to_part(facts)
        if self_check:
            _self_check_sharded(facts, files, device, all_reduce)
        return CausalModel(_read_part(facts, files, device, all_reduce), device)
    hf_model = _read_whole(facts, device)
    tokens = _self_check_tokens(facts)
    wanted = _logits(hf_model, tokens) if self_check else None
    model = CausalModel(hf_model, device)
    if wanted is not None:
        _self_check(facts, model, tokens, wanted)
    return model


@contextmanager
def _refusing_unreadable(facts: ModelFacts) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # damaged files, or pickled code in the place of weights
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"{facts.key} is {facts.source!r}, whose weights cannot be read: {reason}") from error


def _read_whole(facts: ModelFacts, device: torch.device):
    with _refusing_unreadable(facts):
        hf_model, loaded = AutoModelForCausalLM.from_pretrained(
            facts.source,
            config=facts.config,
            dtype=facts.dtype,
            device_map={"": device},
            attn_implementation="eager",
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    _check_loaded(facts, loaded)
    return hf_model


def _files_to_part(facts: ModelFacts) -> dict[str, Path]:
    """See workers.models.sharded_weights.weight_files."""
    with _refusing_unreadable(facts):
        files = weight_files(facts.source)
    if files is None:
        raise ConfigError(
            f"the number of verifier ranks is {facts.shard.size}; it must be 1 for {facts.key}={facts.source}, whose "
            "weights are not in safetensors files, of which alone a part can be read"
        )
    return files


def _read_part(facts: ModelFacts, files: dict[str, Path], device: torch.device, all_reduce: AllReduce):
    """One rank's part, of which alone the bytes are read.

    But for families whose weights transformers converts as it reads them (experts of a mixture, mostly): there all is
    read to the host, and then cut.
    """
    model = make_skeleton(facts.config, facts.dtype)
    sharding = plan_sharding(model, facts.shard)
    with _refusing_unreadable(facts):
        is_filled = fill(model, sharding, files, facts.dtype, device)
    if not is_filled:
        model = _read_whole(facts, torch.device("cpu"))
        cut(model, sharding)
        model.to(device)
    connect(model, sharding, all_reduce)
    return model


def _check_loaded(facts: ModelFacts, loaded: dict) -> None:
    """Every weight came from the files; transformers leaves others random."""
    lacking = sorted(loaded["missing_keys"])
    lacking += sorted(f"{name} (another shape)" for name, *_ in loaded["mismatched_keys"])
    if lacking:
        raise ConfigError(
            f"{facts.key} is {facts.source!r}, whose files lack {len(lacking)} of the weights that its config.json "
            f"asks for, {lacking[0]} among them; download the model again"
        )


def _self_check_tokens(facts: ModelFacts) -> list[int]:
    fixed = torch.Generator().manual_seed(0)
    return torch.randint(0, facts.config.get_text_config().vocab_size, (SELF_CHECK_TOKENS,), generator=fixed).tolist()


@torch.inference_mode()
def _logits(hf_model, tokens: list[int]) -> torch.Tensor:
    """[T, V] by transformers alone."""
    return hf_model(input_ids=torch.tensor([tokens], device=hf_model.device), use_cache=False).logits[0]


def _self_check_sharded(facts: ModelFacts, files: dict[str, Path], device: torch.device, all_reduce: AllReduce) -> None:
    """The model's first layers, with its weights: sharded over all ranks, against whole ones on this rank alone.

    The others are read in the same way and not checked: no rank has the memory for the whole model.
    """
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # or it lists the weights of the other layers
    try:
        short = _first_layers(facts, SELF_CHECK_LAYERS)
        tokens = _self_check_tokens(short)
        wanted = _logits(_read_whole(short, device), tokens)
        _self_check(short, CausalModel(_read_part(short, files, device, all_reduce), device), tokens, wanted)
    finally:
        transformers.utils.logging.set_verbosity(verbosity)


def _first_layers(facts: ModelFacts, num_layers: int) -> ModelFacts:
    """Of a model with fewer layers but for that the same."""
    config = copy.deepcopy(facts.config)
    text_config = config.get_text_config()
    whole, num_layers = text_config.num_hidden_layers, min(num_layers, text_config.num_hidden_layers)
    for name, value in vars(text_config).items():
        if isinstance(value, list) and len(value) == whole:  # something of each layer
            setattr(text_config, name, value[:num_layers])
    text_config.num_hidden_layers = num_layers
    return replace(
        facts,
        config=config,
        cache_shape=replace(facts.cache_shape, num_layers=num_layers),
        windows=facts.windows[:num_layers],
    )


def _self_check(facts: ModelFacts, model: CausalModel, tokens: list[int], wanted: torch.Tensor) -> None:
    """The logits of a few tokens behind others in a cache, against transformers' eager attention in one pass."""
    tier = DeviceTier(model.device)
    layers = [DeviceLayer(facts.cache_shape, len(tokens), tier) for _ in facts.windows]
    cache = FullCache(layers, facts.windows)
    half = len(tokens) // 2
    model.start_sequence(len(tokens))
    try:
        _read(facts, model, tokens[:half], cache, tier)
        got = model.forward(tokens[half:], cache, len(tokens) - half)
        wanted = wanted[half:]
        error = float((got.float() - wanted.float()).abs().max() / wanted.float().abs().max())
    except Exception as failure:  # whatever it is: this model calls attention in a way that ours does not know
        error, reason = float("inf"), f": {failure}"
    else:
        reason = ""
    if not error <= SELF_CHECK_TOLERANCE[facts.dtype]:
        raise ConfigError(
            f"{facts.key} is {facts.source!r} of model type {facts.config.model_type}; its attention cannot be served "
            f"exactly (relative error {error:.2g} in the self-check{reason}). Use another model"
        )


def _read(facts: ModelFacts, model: CausalModel, tokens: list[int], cache: FullCache, tier: DeviceTier) -> None:
    """As the model will be used: a target reads its prompt layer by layer, in pieces."""
    if facts.key != "model.target":
        model.forward(tokens, cache, 1)
        return
    with cache.prefill(len(tokens)) as make_layer_cache:
        model.layer_major.prefill(
            tokens,
            make_layer_cache,
            SELF_CHECK_PIECE_TOKENS,
            make_hidden=lambda *size: tier.allocate(*size, dtype=model.dtype),
        )
