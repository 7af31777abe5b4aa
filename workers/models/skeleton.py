"""Models of a configuration without their weights: to be counted, or to be filled."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

_from_config: Any = AutoModelForCausalLM.from_config  # transformers gives it no types


def weightless(config: PreTrainedConfig) -> PreTrainedModel:
    """The model with all of its tensors on the meta device: names and shapes alone."""
    with torch.device("meta"):
        model: PreTrainedModel = _from_config(config)
    return model


def make_skeleton(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The whole model with its weights on the meta device, and its buffers, which no file has, on the host."""
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = _from_config(config, dtype=dtype, attn_implementation="eager").eval()
    return model
