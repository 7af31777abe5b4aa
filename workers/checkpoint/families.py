"""Families of transformers models that prepare their inputs for generation in a way of their own.

A decoder whose class overrides `prepare_inputs_for_generation` may read something else than the tokens that are new.
Each such family is named here with what is done about it; one that is not named is refused, since its output could be
silently wrong. A test compares these names with the installed transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

from conf.schema import ConfigError


class OwnInputs(StrEnum):
    """What a family's own way of preparing inputs asks of a run."""

    plain = "plain"
    """Nothing: for text alone it reads the new tokens behind a cache, as every other family does."""
    rereads = "rereads"
    """With longrope, all tokens are read again, by the long factors, once the text passes the original length."""
    up_to_original = "up_to_original"
    """As `rereads`, but transformers loses the text as it does so: it is served up to the original length."""


OWN_INPUTS = {
    "ctrl": OwnInputs.plain,
    "gemma3": OwnInputs.plain,
    "roc_bert": OwnInputs.plain,
    "phi3": OwnInputs.rereads,
    "phimoe": OwnInputs.rereads,
    "phi4_multimodal": OwnInputs.up_to_original,
}
"""By transformers' model type. No other family that prepares inputs in its own way is served."""
LONGROPE = "longrope"


def check_inputs(key: str, name: str, model: PreTrainedModel) -> None:
    """Raises ConfigError for a family that prepares its inputs in a way that is not known here."""
    untyped: Any = type(model)
    is_plain = untyped.prepare_inputs_for_generation is GenerationMixin.prepare_inputs_for_generation
    model_type = model.config.model_type
    if not is_plain and model_type not in OWN_INPUTS:
        raise ConfigError(
            f"{key} is {name!r} of model type {model_type}, which prepares its inputs for generation in a way of its "
            f"own that is not known here; it must be a model that reads tokens behind a cache, or one of "
            f"{', '.join(sorted(OWN_INPUTS))}"
        )


@dataclass(frozen=True, slots=True)
class OriginalLength:
    """The number of tokens that a model was first made for, and what it does with more."""

    num_tokens: int
    rule: OwnInputs


def original_length(key: str, name: str, config: PreTrainedConfig) -> OriginalLength | None:
    """The length beyond which the model reads a text in another way; None where there is none.

    Raises ConfigError where config.json names two such lengths.
    """
    rule = OWN_INPUTS.get(config.model_type, OwnInputs.plain)
    rope = getattr(config, "rope_parameters", None) or {}
    length = getattr(config, "original_max_position_embeddings", None)
    if rule is OwnInputs.plain or rope.get("rope_type") != LONGROPE or length is None:
        return None
    if rope.get("original_max_position_embeddings") != length:
        raise ConfigError(
            f"{key} is {name!r}, whose config.json has original_max_position_embeddings={length} and another one in "
            f"its rope_parameters, {rope.get('original_max_position_embeddings')}; they must be equal"
        )
    return OriginalLength(int(length), rule)
