"""workers/checkpoint/families.py knows each family of transformers that prepares inputs in its own way."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import transformers
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.support.tiny_models import save_checkpoint, tiny_config
from tests.unit.workers.checkpoint.test_facts import facts_of, message_of
from workers.checkpoint.families import OWN_INPUTS, OwnInputs, original_length

METHOD = "prepare_inputs_for_generation"
REFUSED = {
    "layers that are no attention": {
        "bamba",
        "falcon_h1",
        "falcon_mamba",
        "mamba",
        "mamba2",
        "nemotron_h",
        "zamba",
        "zamba2",
    },
    "layers that differ in their heads": {"gemma4", "gemma4_unified"},
    "several models of text": {"musicgen", "musicgen_melody"},
    "its own way": {"cpmant", "openai-gpt", "reformer", "xlm", "xlnet"},
}


def families_with_their_own_inputs() -> set[str]:
    """Model types whose class for generation has the method itself, read from the sources: imports take long."""
    class_of = {
        name: model_type
        for model_type, names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
        for name in ([names] if isinstance(names, str) else names)
    }
    found = set()
    for path in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        source = path.read_text(encoding="utf-8")
        if f"def {METHOD}" not in source or not any(f"class {name}(" in source for name in class_of):
            continue
        classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
        for name, node in classes.items():
            bases = [classes[base.id] for base in node.bases if isinstance(base, ast.Name) and base.id in classes]
            if name in class_of and any(has_method(owner) for owner in [node, *bases]):
                found.add(class_of[name])
    return found


def has_method(node: ast.ClassDef) -> bool:
    return any(isinstance(part, ast.FunctionDef) and part.name == METHOD for part in node.body)


def test_every_family_with_its_own_inputs_is_known_or_refused():
    """A new one turns this red: see what it reads, then name it in OWN_INPUTS, with a test, or here."""
    known = set(OWN_INPUTS).union(*REFUSED.values())
    assert families_with_their_own_inputs() == known


@pytest.mark.parametrize("family", ["openai-gpt", "xlm", "cpmant"])
def test_a_family_with_inputs_that_are_not_known_is_refused_by_name(tmp_path, family):
    folder = save_checkpoint(tmp_path / "m", tiny_config("llama"))
    AutoConfig.for_model(family).save_pretrained(folder)
    message = message_of(facts_of, folder)
    assert message.startswith(f"model.target is {str(folder)!r}") and family in message


def test_two_original_lengths_are_refused():
    config = tiny_config("llama", rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    config.model_type = "phi3"
    assert original_length("model.target", "m", config) is None
    config.rope_parameters = {"rope_type": "longrope", "original_max_position_embeddings": 64}
    config.original_max_position_embeddings = 64
    found = original_length("model.target", "m", config)
    assert found is not None and (found.num_tokens, found.rule) == (64, OwnInputs.rereads)
    config.original_max_position_embeddings = 32
    message = message_of(original_length, "model.target", "m", config)
    assert "original_max_position_embeddings=32" in message and "64" in message
