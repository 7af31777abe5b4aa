"""What is refused as weights are read: each message names the key, what is wrong, and the file or id concerned."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AttentionInterface

from conf.schema import ConfigError
from tests.support.tiny_models import VOCAB_SIZE, save_checkpoint, tiny_config
from tests.unit.workers.checkpoint.test_facts import CPU, change_json, facts_of, message_of
from workers.attention.forward_pass import ATTENTION_NAME, cached_attention
from workers.models.layer_major import LayerMajor
from workers.models.loading import SELF_CHECK_TOLERANCE, load_model
from workers.models.sharded_weights import weight_files


@pytest.fixture
def folder(checkpoints, tmp_path):
    """A copy of a good checkpoint, to be spoiled."""
    return shutil.copytree(checkpoints("llama"), tmp_path / "model")


def test_files_that_lack_a_weight_are_refused(folder):
    """transformers would go on with random numbers in its place."""
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    message = message_of(load_model, facts_of(folder), CPU, self_check=True)
    assert "lack 1 of the weights" in message and "model.layers.1.mlp.up_proj.weight" in message


@pytest.mark.parametrize("sizes", [{"num_key_value_heads": 8}, {"num_attention_heads": 8, "num_key_value_heads": 3}])
def test_sizes_with_which_transformers_itself_cannot_compute_are_refused(tmp_path, sizes):
    facts = facts_of(save_checkpoint(tmp_path / "model", tiny_config("llama", **sizes)))
    with pytest.raises(ConfigError) as refused:
        load_model(facts, CPU, self_check=True)
    message = str(refused.value)
    assert message.startswith("model.target is ") and "transformers itself cannot compute" in message


def test_weights_that_do_not_fit_the_configuration_are_refused(folder):
    change_json(folder / "config.json", intermediate_size=64)
    message = message_of(load_model, facts_of(folder), CPU, self_check=True)
    assert "lack 6 of the weights" in message and "model.layers.0.mlp.down_proj.weight (another shape)" in message


def test_older_checkpoints_are_read_as_weights_only(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert load_model(facts_of(folder), CPU, self_check=True).vocab_size == VOCAB_SIZE


def test_older_checkpoints_that_would_run_code_are_not_read(folder):
    class Evil:
        def __reduce__(self):
            return open, (str(folder / "executed"), "w")

    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Evil()}, folder / "pytorch_model.bin")
    message = message_of(load_model, facts_of(folder), CPU, self_check=True)
    assert message.startswith("model.target is ")
    assert not (folder / "executed").exists()


# ---- Weights that are not finite ----

# One that the self-check's tokens never read, and one that they do.
UNREAD, READ = "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [UNREAD, READ])
@pytest.mark.parametrize("self_check", [True, False])
def test_a_weight_that_is_not_finite_is_named_with_its_file(tmp_path, name, number, self_check):
    folder = save_checkpoint(tmp_path / "m", tiny_config("llama"), max_shard_size="12KB")
    shard = weight_files(str(folder))[name]
    weights = load_file(shard)
    weights[name][0, 0] = number
    save_file(weights, shard, metadata={"format": "pt"})
    message = message_of(load_model, facts_of(folder, "model.drafter"), CPU, self_check=self_check)
    assert message.startswith(f"model.drafter is {str(folder)!r}")
    assert name in message and str(shard) in message and "NaN or infinite" in message and "attention" not in message


def test_an_expert_that_is_not_finite_is_named_as_in_its_file(tmp_path):
    """transformers joins experts to one weight as it reads them."""
    folder = save_checkpoint(tmp_path / "m", tiny_config("qwen3_moe"))
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "experts.3" in name)
    weights[name][-1, -1] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    message = message_of(load_model, facts_of(folder), CPU, self_check=True)
    assert name in message and "model.safetensors" in message


def test_numbers_too_large_for_the_type_are_told_from_damaged_ones(folder):
    weights = load_file(folder / "model.safetensors")
    weights[READ][0, 0] = 1e6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    message = message_of(load_model, facts_of(folder, dtype=torch.float16), CPU, self_check=True)
    assert READ in message and "as float16" in message and "model.dtype" in message


def test_older_checkpoints_that_are_not_finite_are_refused_by_the_weight(folder):
    weights = load_file(folder / "model.safetensors")
    weights[READ][0, 0] = float("nan")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert READ in message_of(load_model, facts_of(folder), CPU, self_check=True)


# ---- The self-check ----


def test_the_self_check_refuses_a_model_whose_attention_is_computed_differently(checkpoints):
    """Its own attention is not that of its query, key and value alone: the reference differs from ours."""

    def tilted(module, query, key, value, attention_mask, scaling=None, **kwargs):
        return cached_attention(module, query, key.roll(1, dims=2), value, attention_mask, scaling, **kwargs)

    facts = facts_of(checkpoints("llama"))
    assert load_model(facts, CPU, self_check=True)
    AttentionInterface.register(ATTENTION_NAME, tilted)
    try:
        message = message_of(load_model, facts, CPU, self_check=True)
        assert load_model(facts, CPU, self_check=False)
    finally:
        AttentionInterface.register(ATTENTION_NAME, cached_attention)
    assert "model type llama" in message and "self-check" in message and "relative error" in message


@pytest.mark.parametrize("dtype", SELF_CHECK_TOLERANCE)
def test_the_self_check_accepts_every_dtype(checkpoints, dtype):
    assert load_model(facts_of(checkpoints("llama"), dtype=dtype), CPU, self_check=True)


@pytest.mark.parametrize("failure", [RuntimeError, ValueError, KeyError, AssertionError])
def test_the_self_check_refuses_a_model_that_fails_in_our_attention(checkpoints, failure):
    def failing(*args, **kwargs):
        raise failure("not for this model")

    AttentionInterface.register(ATTENTION_NAME, failing)
    try:
        message = message_of(load_model, facts_of(checkpoints("llama")), CPU, self_check=True)
    finally:
        AttentionInterface.register(ATTENTION_NAME, cached_attention)
    assert "not for this model" in message


@pytest.mark.parametrize("layer_major", [True, False])
def test_the_self_check_reads_as_the_model_will(checkpoints, monkeypatch, layer_major):
    prompts = []
    prefill = LayerMajor.prefill
    monkeypatch.setattr(LayerMajor, "prefill", lambda *args, **kw: (prompts.append(args[1]), prefill(*args, **kw)))
    load_model(facts_of(checkpoints("llama")), CPU, self_check=True, layer_major=layer_major)
    assert bool(prompts) is layer_major
