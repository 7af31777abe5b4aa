"""What is refused before a model runs: each message names the key, what is wrong, and the file or id concerned."""

from __future__ import annotations

import json
import shutil
import socket
import sys
import time

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from conf.schema import ConfigError
from launch.assembly.prepare import rules_of
from tests.support.tiny_models import save_checkpoint, tiny_config
from tests.support.tiny_runs import tiny_run
from workers.checkpoint import facts as facts_module
from workers.checkpoint.facts import describe

CPU = torch.device("cpu")


def facts_of(folder, key="model.target", dtype=torch.float32):
    return describe(key, str(folder), dtype)


def message_of(call, *args, **kwargs) -> str:
    with pytest.raises(ConfigError) as refused:
        call(*args, **kwargs)
    return str(refused.value)


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def folder(checkpoints, tmp_path):
    """A copy of a good checkpoint, to be spoiled."""
    return shutil.copytree(checkpoints("llama"), tmp_path / "model")


@pytest.fixture
def sharded(tmp_path):
    folder = save_checkpoint(tmp_path / "sharded", tiny_config("llama"), max_shard_size="12KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def test_a_description_says_what_the_checkpoint_is(checkpoints):
    facts = facts_of(checkpoints("gemma2"))
    assert (facts.cache_shape.num_layers, facts.cache_shape.num_kv_heads, facts.cache_shape.head_dim) == (2, 2, 8)
    assert facts.windows == [24, None] and facts.max_positions == 512
    num_weights = sum(tensor.numel() for tensor in load_file(checkpoints("gemma2") / "model.safetensors").values())
    assert facts.num_weight_bytes == 4 * num_weights


@pytest.mark.parametrize(
    ("rope", "wanted"),
    [
        ({"rope_type": "default"}, 512),
        ({"rope_type": "linear", "factor": 4.0}, 2048),
        ({"rope_type": "dynamic", "factor": 2.0}, 1024),
        ({"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 64}, 2048),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}, 512),
    ],
)
def test_positions_include_rope_scaling(checkpoints, rope, wanted):
    folder = checkpoints("llama", rope_parameters=rope | {"rope_theta": 1e4})
    assert facts_of(folder).max_positions == wanted


# ---- Places ----


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_a_folder_that_does_not_exist_is_refused(name):
    message = message_of(describe, "model.target", name, torch.float32)
    assert message.startswith("model.target is ") and repr(name) in message and "no such folder" in message


def test_a_folder_without_a_configuration_is_refused(tmp_path):
    message = message_of(facts_of, tmp_path, "model.drafter")
    assert "model.drafter" in message and "config.json" in message and str(tmp_path) in message


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_type": "llama", "hidden_size": "big"}', "{}"])
def test_a_damaged_configuration_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    message = message_of(facts_of, folder)
    assert message.startswith("model.target is ") and str(folder) in message


@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers", "head_dim"])
def test_a_model_of_no_size_is_refused(folder, name):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"head_dim": None} | {name: 0}))
    message = message_of(facts_of, folder)
    assert message.startswith("model.target is ") and str(folder) in message


@pytest.mark.parametrize("is_set_offline", [True, False])
def test_a_hub_id_is_refused_at_once_where_there_is_no_network(monkeypatch, is_set_offline):
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", is_set_offline)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setattr(facts_module, "getproxies", dict)
    began = time.monotonic()
    message = message_of(describe, "model.target", "tierforce-nobody/no-such-model", torch.float32)
    assert time.monotonic() - began < 5
    assert "model.target is 'tierforce-nobody/no-such-model'" in message and "hub id" in message
    assert constants.HF_HUB_OFFLINE


def test_a_hub_that_answers_is_asked(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as hub:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{hub.getsockname()[1]}")
        monkeypatch.setattr(facts_module, "getproxies", dict)
        facts_module._go_offline_without_network()
        assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_a_folder_without_a_tokenizer_is_refused(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    message = message_of(facts_of, folder)
    assert message.startswith("model.target is ") and "Tokenizer" in message


# ---- Code from a checkpoint ----


def test_an_unknown_model_with_its_own_code_is_refused_before_any_of_it_runs(folder):
    code = {"AutoConfig": "their_code.TheirConfig", "AutoModelForCausalLM": "their_code.TheirModel"}
    change_json(folder / "config.json", model_type="their_own", auto_map=code, architectures=["TheirModel"])
    (folder / "their_code.py").write_text(f"open({str(folder / 'executed')!r}, 'w')\n")
    message = message_of(facts_of, folder)
    assert message.startswith("model.target is ") and "without remote code" in message
    assert not (folder / "executed").exists()
    assert not any("their_code" in module for module in sys.modules)


def test_a_tokenizer_with_its_own_code_is_not_run(folder):
    change_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["their_code.TheirTokenizer", None]})
    (folder / "their_code.py").write_text(f"open({str(folder / 'executed')!r}, 'w')\n")
    try:
        facts_of(folder)
    except ConfigError as refused:
        assert str(refused).startswith("model.target is ")
    assert not (folder / "executed").exists()


# ---- Files of weights ----


def test_a_missing_shard_is_refused_by_name(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    message = message_of(facts_of, sharded)
    assert str(shard) in message and "missing" in message and "download" in message


@pytest.mark.parametrize("num_bytes", [0, 4, 100, -1])
def test_a_truncated_shard_is_refused_by_name(sharded, num_bytes):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:num_bytes])
    message = message_of(facts_of, sharded)
    assert str(shard) in message and "damaged" in message and "download" in message


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", '{"weight_map": null}'])
def test_a_damaged_index_is_refused_by_name(sharded, text):
    index = sharded / "model.safetensors.index.json"
    index.write_text(text)
    message = message_of(facts_of, sharded)
    assert str(index) in message and "damaged" in message


def test_a_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    message = message_of(facts_of, folder)
    assert "model.safetensors is missing" in message


def test_weights_in_gguf_alone_are_refused_by_name(folder):
    (folder / "model.safetensors").rename(folder / "model-q4.gguf")
    message = message_of(facts_of, folder)
    assert "model-q4.gguf" in message and "as safetensors" in message
    (folder / "config.json").unlink()
    assert "model-q4.gguf" in message_of(facts_of, folder)


# ---- Adapters ----

ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "owner/base"}


@pytest.mark.parametrize("beside", [True, False], ids=["beside weights", "instead of a model"])
@pytest.mark.parametrize("key", ["model.target", "model.drafter"])
def test_an_adapter_is_refused_with_the_model_it_is_of(folder, key, beside):
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    if beside:
        shutil.copy(folder / "adapter_model.safetensors", folder / "model.safetensors")
    else:
        (folder / "config.json").unlink()
    message = message_of(facts_of, folder, key)
    assert message.startswith(f"{key} is {str(folder)!r}")
    assert "adapters are not applied" in message and "'owner/base'" in message and "merge_and_unload" in message


@pytest.mark.parametrize("text", ["", "[]", "{}", None], ids=["empty", "a list", "no base", "no file"])
def test_an_adapter_that_names_no_model_is_refused_too(folder, text):
    shutil.copy(folder / "model.safetensors", folder / "adapter_model.safetensors")
    if text is not None:
        (folder / "adapter_config.json").write_text(text)
    message = message_of(facts_of, folder)
    assert "adapters are not applied" in message and "the model that it was trained for" in message


# ---- Quantized weights ----


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "nobodys", None])
def test_quantized_weights_that_cannot_be_read_are_refused_by_their_method(folder, method):
    change_json(folder / "config.json", quantization_config={"quant_method": method, "bits": 4, "load_in_4bit": True})
    message = message_of(facts_of, folder)
    assert "quantization_config" in message and str(method) in message and "not quantized" in message


# ---- Families ----

REFUSED_FAMILIES = {
    "llama4_text": "chunked_attention",
    "qwen3_next": "linear_attention",
    "mamba": "linear_attention",
    "falcon_h1": "hybrid",
    "deepseek_v32": "indexed_attention",
    "gemma4_text": "layers differ in their heads",
}


@pytest.mark.parametrize("family", REFUSED_FAMILIES)
def test_a_family_that_would_be_served_wrongly_is_refused_by_name(tmp_path, checkpoints, family):
    folder = shutil.copytree(checkpoints("llama"), tmp_path / family)
    AutoConfig.for_model(family).save_pretrained(folder)
    message = message_of(facts_of, folder)
    assert (
        message.startswith(f"model.target is {str(folder)!r}")
        and REFUSED_FAMILIES[family] in message
        and "such as Llama" in message
    )


def test_a_decoder_whose_configuration_denies_it_is_accepted(checkpoints):
    facts = facts_of(checkpoints("gpt_neox", num_key_value_heads=4))
    assert facts.config.is_decoder is False


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("bert", ["an encoder", "is_decoder"]),
        ("modernbert", ["modernbert"]),
        ("t5", ["an encoder and a decoder"]),
        ("bart", ["an encoder and a decoder"]),
        ("whisper", ["an encoder and a decoder"]),
        ("musicgen", ["several models of text"]),
    ],
)
def test_what_is_no_decoder_alone_is_refused_by_name(tmp_path, checkpoints, family, words):
    folder = shutil.copytree(checkpoints("llama"), tmp_path / family)
    AutoConfig.for_model(family).save_pretrained(folder)
    message = message_of(facts_of, folder)
    assert message.startswith(f"model.target is {str(folder)!r}") and all(word in message for word in [family, *words])


@pytest.mark.parametrize(
    ("rope", "max_positions", "words"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, 64, ["model.max_positions is 64", "above the 128 positions"]),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}, 1024, ["must be null", "linear"]),
    ],
)
def test_only_a_plain_rotary_embedding_is_stretched_and_only_to_more(tmp_path, rope, max_positions, words):
    folder = save_checkpoint(tmp_path / "m", tiny_config("llama", max_position_embeddings=128, rope_parameters=rope))
    with pytest.raises(ConfigError) as caught:
        describe("model.target", str(folder), torch.float32, max_positions)
    assert all(word in str(caught.value) for word in words)


def test_rules_on_the_end_of_sequence_mean_the_ends_that_generate_knows_of(folder):
    """A text ends at more: at what config.json and the tokenizer name, too."""
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))
    change_json(folder / "config.json", eos_token_id=5)
    facts = facts_of(folder)
    assert facts.rule_eos_ids == {2, 3} and facts.eos_ids >= {2, 3, 5}
    config = tiny_run(folder)
    assert rules_of(config, facts).eos_ids == {2, 3}
