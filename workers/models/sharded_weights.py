"""Reads from a checkpoint's safetensors files one rank's part of each weight, and no more."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from workers.parallel.tensor_parallel import Sharding, set_parameter


def weight_files(source: str) -> dict[str, Path] | None:
    """The safetensors file of each weight of a folder or a hub id; None: they are in another format."""
    index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    if index is not None:
        weight_map = json.loads(Path(index).read_text())["weight_map"]
        paths = {file: _located(source, file) for file in set(weight_map.values())}
        return {name: paths[file] for name, file in weight_map.items()}
    path = cached_file(source, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)
    if path is None:
        return None
    with safe_open(path, framework="pt") as file:
        return dict.fromkeys(file.keys(), Path(path))


def _located(source: str, name: str) -> Path:
    """Where a file of a folder or a hub id is on this machine. Raises OSError where there is none."""
    path = cached_file(source, name)
    assert path is not None, f"{name} of {source} is missing, and transformers did not say so"
    return Path(path)


def fill(
    model: PreTrainedModel, sharding: Sharding, files: dict[str, Path], dtype: torch.dtype, device: torch.device
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
    module: nn.Module = model  # whose `to` has types
    module.to(device)
    return True
