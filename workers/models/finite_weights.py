"""Finds weights that are not finite numbers, and the file that they came from."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from conf.schema import ConfigError
from workers.checkpoint.facts import ModelFacts
from workers.models.sharded_weights import weight_files

CHECKED_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_finite(facts: ModelFacts, model: PreTrainedModel) -> None:
    """Raises ConfigError that names tensor and file where a weight is NaN or infinite: every output would be, too."""
    name = next((name for name, weight in model.named_parameters() if not _is_finite(weight)), None)
    if name is None:
        return
    place = _in_files(facts.source)
    if place is None:
        raise ConfigError(
            f"{facts.key} is {facts.source!r}, whose weight {name} has NaN or infinite numbers as "
            f"{str(facts.dtype).removeprefix('torch.')}; it must be finite: download the model again, or set "
            "model.dtype to float32 if its numbers are too large"
        )
    name, path = place
    raise ConfigError(
        f"{facts.key} is {facts.source!r}, whose weight {name} in {path} has NaN or infinite numbers; it must be "
        "finite: download the model again"
    )


def _is_finite(weight: torch.Tensor) -> bool:
    """Whether all numbers are; in one pass over the memory and without another tensor of this size."""
    if weight.dtype not in CHECKED_DTYPES or not weight.numel() or weight.is_meta:
        return True
    low, high = weight.detach().aminmax()  # NaN where any is NaN
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _in_files(source: str) -> tuple[str, Path] | None:
    """The first weight in the checkpoint's files that is not finite, and its file; None: there, all are."""
    for name, path in (weight_files(source) or {}).items():
        with safe_open(path, framework="pt") as file:
            if not _is_finite(file.get_tensor(name)):
                return name, path
    return None
