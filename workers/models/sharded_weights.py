"""Reads from a checkpoint's safetensors files one rank's part of each weight, and no more."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from workers.parallel.tensor_parallel import Sharding, set_parameter


def make_skeleton(config, dtype: torch.dtype) -> nn.Module:
    """The whole model with its weights on the meta device, and its buffers, which no file has, on the host."""
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()


def weight_files(source: str) -> dict[str, Path] | None:
    """The safetensors file of each weight of a folder or a hub id; None: they are in another format."""
    index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    if index is not None:
        weight_map = json.loads(Path(index).read_text())["weight_map"]
        paths = {file: Path(cached_file(source, file)) for file in set(weight_map.values())}
        return {name: paths[file] for name, file in weight_map.items()}
    path = cached_file(source, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)
    if path is None:
        return None
    with safe_open(path, framework="pt") as file:
        return dict.fromkeys(file.keys(), Path(path))


def fill(
    model: nn.Module, sharding: Sharding, files: dict[str, Path], dtype: torch.dtype, device: torch.device
) -> bool:
    """Gives a skeleton this rank's part of its weights; tied ones stay one.

    False where the files do not have each weight by the model's own name and shape, which then has no weights of use:
    transformers renames and joins the weights of some families as it reads them.
    """
    if model._keep_in_fp32_modules or model._keep_in_fp32_modules_strict:
        return False  # transformers knows which of these stay in fp32
    tied = model.all_tied_weights_keys
    wanted = model.state_dict(keep_vars=True)
    lacking = wanted.keys() - files.keys()
    if not lacking <= tied.keys() | set(tied.values()):
        return False
    names_in: dict[Path, list[str]] = {}
    for name in wanted.keys() - lacking:
        names_in.setdefault(files[name], []).append(name)
    for path, names in names_in.items():
        with safe_open(path, framework="pt") as file:
            for name in names:
                whole = file.get_slice(name)
                if list(wanted[name].shape) != whole.get_shape():
                    return False
                cut = sharding.cuts.get(name)
                part = cut.of(whole, wanted[name].dim()) if cut else whole[...]
                kept_dtype = dtype if part.is_floating_point() else part.dtype
                set_parameter(model, name, part.to(device, kept_dtype).contiguous())
    model.tie_weights(missing_keys=set(lacking), recompute_mapping=False)
    if any(parameter.is_meta for parameter in model.parameters()):
        return False
    model.to(device)
    return True
