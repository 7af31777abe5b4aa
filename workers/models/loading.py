"""Models from local folders or the hub: weights onto a device, and a check that our attention serves them exactly.

No code from a checkpoint is ever run: older checkpoints in PyTorch's format are read as weights only.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from conf.schema import ConfigError
from tiers.device_layer import DeviceLayer
from tiers.device_tier import DeviceTier
from tiers.full_cache import FullCache
from workers.checkpoint.facts import ModelFacts
from workers.models.causal_model import CausalModel
from workers.models.finite_weights import check_finite
from workers.models.sharded_weights import fill, weight_files
from workers.models.skeleton import make_skeleton
from workers.parallel.shard import WHOLE
from workers.parallel.tensor_parallel import AllReduce, connect, cut, plan_sharding

SELF_CHECK_TOKENS, SELF_CHECK_PIECE_TOKENS = 24, 5
SELF_CHECK_LAYERS = 2
"""Layers that are checked of a tensor-parallel model, which no rank has whole."""
SELF_CHECK_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest error of the logits that passes, as a share of the largest logit."""

_LIBRARY_LOG: Any = transformers_logging  # its functions have no types


def load_model(
    facts: ModelFacts,
    device: torch.device,
    *,
    self_check: bool,
    layer_major: bool = True,
    all_reduce: AllReduce | None = None,
) -> CausalModel:
    """Reads the weights onto `device`. Raises ConfigError where our attention differs from transformers' own.

    With `layer_major` the self-check reads as a target reads its prompt, layer by layer; else as a drafter does, in
    one pass. For one rank's part there is an `all_reduce` over the ranks, all of which load their parts at once.
    """
    _LIBRARY_LOG.disable_progress_bar()
    if facts.shard != WHOLE:
        assert all_reduce is not None, f"rank {facts.shard.rank} of {facts.shard.size} needs sums over the ranks"
        files = _files_to_part(facts)
        if self_check:
            _self_check_sharded(facts, files, device, all_reduce, layer_major=layer_major)
        return CausalModel(_read_part(facts, files, device, all_reduce), device)
    hf_model = _read_whole(facts, device)
    tokens = _self_check_tokens(facts)
    wanted = _logits(facts, hf_model, tokens) if self_check else None
    model = CausalModel(hf_model, device)
    if wanted is not None:
        _self_check(facts, model, tokens, wanted, layer_major=layer_major)
    return model


@contextmanager
def _refusing_unreadable(facts: ModelFacts) -> Iterator[None]:
    """Within it, whatever goes wrong as weights are read is a ConfigError, unless memory is lacking."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # damaged files, or pickled code in the place of weights
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"{facts.key} is {facts.source!r}, whose weights cannot be read: {reason}") from error


def _read_whole(facts: ModelFacts, device: torch.device) -> PreTrainedModel:
    """The model with all of its weights on `device`. Raises ConfigError."""
    read: Any = AutoModelForCausalLM.from_pretrained  # typed as if it returned a model alone, whatever it is asked for
    hf_model: PreTrainedModel
    loaded: dict[str, Any]
    with _refusing_unreadable(facts):
        hf_model, loaded = read(
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
    check_finite(facts, hf_model)
    return hf_model


def _files_to_part(facts: ModelFacts) -> dict[str, Path]:
    """The safetensors file of each weight. Raises ConfigError where there are none."""
    with _refusing_unreadable(facts):
        files = weight_files(facts.source)
    if files is None:
        raise ConfigError(
            f"the number of verifier ranks is {facts.shard.size}; it must be 1 for {facts.key}={facts.source}, whose "
            "weights are not in safetensors files, of which alone a part can be read"
        )
    return files


def _read_part(
    facts: ModelFacts, files: dict[str, Path], device: torch.device, all_reduce: AllReduce
) -> PreTrainedModel:
    """One rank's part of the model; only the bytes of this part are read.

    Where transformers converts weights as it reads them (experts of a mixture, mostly), all of them are read to the
    host first, and then cut.
    """
    model = make_skeleton(facts.config, facts.dtype)
    sharding = plan_sharding(model, facts.shard)
    with _refusing_unreadable(facts):
        is_filled = fill(model, sharding, files, facts.dtype, device)
    if not is_filled:
        model = _read_whole(facts, torch.device("cpu"))
        cut(model, sharding)
        module: nn.Module = model  # whose `to` has types
        module.to(device)
    else:
        check_finite(facts, model)
    connect(model, sharding, all_reduce)
    return model


def _check_loaded(facts: ModelFacts, loaded: dict[str, Any]) -> None:
    """Raises ConfigError unless each weight came from the files; transformers leaves others random."""
    lacking = sorted(loaded["missing_keys"])
    lacking += sorted(f"{name} (another shape)" for name, *_ in loaded["mismatched_keys"])
    if lacking:
        raise ConfigError(
            f"{facts.key} is {facts.source!r}, whose files lack {len(lacking)} of the weights that its config.json "
            f"asks for, {lacking[0]} among them; download the model again"
        )


def _self_check_tokens(facts: ModelFacts) -> list[int]:
    """Random ids, the same each time."""
    fixed = torch.Generator().manual_seed(0)
    vocab_size = facts.config.get_text_config().vocab_size
    tokens: list[int] = torch.randint(0, vocab_size, (SELF_CHECK_TOKENS,), generator=fixed).tolist()
    return tokens


@torch.inference_mode()
def _logits(facts: ModelFacts, hf_model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """Logits [T, V] by transformers alone. Raises ConfigError where it cannot compute with this configuration."""
    try:
        output = hf_model(input_ids=torch.tensor([tokens], device=hf_model.device), use_cache=False)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model's code makes of sizes that do not fit each other
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{facts.key} is {facts.source!r}, with which transformers itself cannot compute ({reason}); check the "
            "sizes and ids in its config.json"
        ) from error
    logits: torch.Tensor = output.logits[0]
    return logits


def _self_check_sharded(
    facts: ModelFacts, files: dict[str, Path], device: torch.device, all_reduce: AllReduce, *, layer_major: bool
) -> None:
    """Checks the model's first layers, sharded over all ranks, against whole ones on this rank alone.

    The other layers are read in the same way and not checked: no rank has the memory for the whole model.
    Raises ConfigError.
    """
    verbosity = _LIBRARY_LOG.get_verbosity()
    _LIBRARY_LOG.set_verbosity_error()  # or it lists the weights of the other layers
    try:
        short = _first_layers(facts, SELF_CHECK_LAYERS)
        tokens = _self_check_tokens(short)
        wanted = _logits(short, _read_whole(short, device), tokens)
        model = CausalModel(_read_part(short, files, device, all_reduce), device)
        _self_check(short, model, tokens, wanted, layer_major=layer_major)
    finally:
        _LIBRARY_LOG.set_verbosity(verbosity)


def _first_layers(facts: ModelFacts, num_layers: int) -> ModelFacts:
    """The facts of a model that has only the first `num_layers` layers and is the same in all else."""
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


def _self_check(
    facts: ModelFacts, model: CausalModel, tokens: list[int], wanted: torch.Tensor, *, layer_major: bool
) -> None:
    """Holds logits of tokens behind others in a cache against `wanted` [T, V], by transformers' attention in one pass.

    Raises ConfigError.
    """
    tier = DeviceTier(model.device)
    cache = FullCache([DeviceLayer(facts.cache_shape, len(tokens), tier) for _ in facts.windows], facts.windows)
    half = len(tokens) // 2
    model.start_sequence(len(tokens))
    try:
        if layer_major:
            _read_layer_major(model, tokens[:half], cache, tier)
        else:
            model.forward(tokens[:half], cache, 1)
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


def _read_layer_major(model: CausalModel, tokens: list[int], cache: FullCache, tier: DeviceTier) -> None:
    """Reads `tokens` into an empty cache layer by layer, in pieces, as a target reads its prompt."""
    with cache.prefill(len(tokens)) as make_layer_cache:
        model.layer_major.prefill(
            tokens,
            make_layer_cache,
            SELF_CHECK_PIECE_TOKENS,
            make_hidden=lambda *size: tier.allocate(*size, dtype=model.dtype),
        )
