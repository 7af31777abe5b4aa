"""What a rank reads of a checkpoint is its part of what transformers reads, and no more."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from conf.schema import ConfigError
from tests.support.tiny_models import FAMILIES, save_checkpoint, tiny_config
from workers.checkpoint.facts import describe
from workers.models import sharded_weights
from workers.models.loading import _first_layers, load_model
from workers.models.sharded_weights import fill, weight_files
from workers.models.skeleton import make_skeleton
from workers.parallel.shard import Shard
from workers.parallel.tensor_parallel import cut, plan_sharding

CPU, SHARD = torch.device("cpu"), Shard(1, 2)
CONVERTED_ON_READING = ("qwen3_moe", "mixtral")


class Recorder:
    """Stands for safe_open and counts the bytes that are read."""

    def __init__(self, safe_open):
        self._safe_open, self.num_bytes = safe_open, 0

    def __call__(self, path, framework):
        file, recorder = self._safe_open(path, framework=framework), self

        class File:
            keys = file.keys
            __enter__ = lambda self: self  # noqa: E731
            __exit__ = lambda self, *_: None  # noqa: E731

            def get_slice(self, name):
                part = file.get_slice(name)

                class Part:
                    get_shape = part.get_shape

                    def __getitem__(self, index):
                        rows = part[index]
                        recorder.num_bytes += rows.nbytes
                        return rows

                return Part()

        return File()


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder(sharded_weights.safe_open)
    monkeypatch.setattr(sharded_weights, "safe_open", recorder)
    return recorder


def read(folder, dtype=torch.float32):
    """The filled skeleton, and whether it could be."""
    facts = describe("model.target", str(folder), dtype)
    model = make_skeleton(facts.config, dtype)
    sharding = plan_sharding(model, SHARD)
    return model, fill(model, sharding, weight_files(facts.source), dtype, CPU)


def cut_from_whole(folder, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    cut(model, plan_sharding(model, SHARD))
    return model


def assert_same_tensors(model, wanted):
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(model, kind)()), dict(getattr(wanted, kind)())
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name
            assert ours[name].is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in (*CONVERTED_ON_READING, "gpt_oss")])
def test_the_parts_are_those_of_what_transformers_reads(checkpoints, family, dtype):
    model, is_filled = read(checkpoints(family), dtype)
    assert is_filled
    assert_same_tensors(model, cut_from_whole(checkpoints(family), dtype))


@pytest.mark.parametrize("family", CONVERTED_ON_READING)
def test_weights_that_transformers_converts_are_left_to_it(checkpoints, family):
    assert not read(checkpoints(family))[1]


def test_a_rank_reads_its_bytes_alone(checkpoints, recorder):
    folder = checkpoints("llama", num_hidden_layers=4)
    facts = describe("model.target", str(folder), torch.float32).sharded(SHARD)
    assert read(folder)[1]
    assert recorder.num_bytes == facts.num_weight_bytes < 0.7 * (folder / "model.safetensors").stat().st_size


def test_shards_with_an_index(tmp_path):
    folder = save_checkpoint(tmp_path / "sharded", tiny_config("llama"), max_shard_size="12KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    model, is_filled = read(folder)
    assert is_filled
    assert_same_tensors(model, cut_from_whole(folder))


@pytest.mark.parametrize("kept", ["model.embed_tokens.weight", "lm_head.weight", "both"])
def test_tied_embeddings_are_one_tensor_under_whichever_name_they_are_stored(checkpoints, tmp_path, kept):
    folder = shutil.copytree(checkpoints("llama", tie_word_embeddings=True), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    shared = weights.pop("model.embed_tokens.weight", None)
    shared = weights.pop("lm_head.weight", shared)
    names = ["model.embed_tokens.weight", "lm_head.weight"] if kept == "both" else [kept]
    save_file(weights | {name: shared.clone() for name in names}, folder / "model.safetensors", {"format": "pt"})
    model, is_filled = read(folder)
    assert is_filled and model.lm_head.weight is model.model.embed_tokens.weight
    assert_same_tensors(model, cut_from_whole(folder))


def test_an_index_that_names_a_weight_its_file_has_not_is_refused(tmp_path):
    folder = save_checkpoint(tmp_path / "sharded", tiny_config("llama"), max_shard_size="12KB")
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    other = next(file for file in weight_map.values() if file != weight_map["model.norm.weight"])
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map | {"model.norm.weight": other}}))
    message = refusal(folder)
    assert message.startswith(f"model.target is {str(folder)!r}, whose weights cannot be read: ")
    assert "model.norm.weight" in message


class NoSum:
    def all_reduce(self, tensor):
        pass


def refusal(folder, self_check: bool = False) -> str:
    with pytest.raises(ConfigError) as refused:
        facts = describe("model.target", str(folder), torch.float32).sharded(SHARD)
        load_model(facts, CPU, self_check=self_check, all_reduce=NoSum())
    return str(refused.value)


@pytest.fixture
def folder(checkpoints, tmp_path):
    """A copy of a good checkpoint, to be spoiled."""
    return shutil.copytree(checkpoints("llama"), tmp_path / "model")


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_files_that_lack_a_weight_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    message = refusal(folder)
    assert "lack 1 of the weights" in message and "model.layers.1.mlp.up_proj.weight" in message


def test_weights_of_another_shape_are_refused(folder):
    change_config(folder, intermediate_size=64)
    assert "model.layers.0.mlp.down_proj.weight (another shape)" in refusal(folder)


@pytest.mark.parametrize("self_check", [True, False])
def test_checkpoints_in_the_older_format_are_refused(folder, self_check):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    message = refusal(folder, self_check)
    assert "the number of verifier ranks is 2" in message and "safetensors" in message


def test_quantized_weights_are_refused(folder):
    change_config(folder, quantization_config={"quant_method": "fp8"})
    message = refusal(folder)
    assert "the number of verifier ranks is 2; it must be 1" in message and "quantized" in message


def test_a_size_that_does_not_suit_the_heads_is_refused(folder):
    facts = describe("model.target", str(folder), torch.float32)
    with pytest.raises(
        ConfigError, match="the number of verifier ranks is 3; it must be one of 1, 2, 4 for model.target="
    ):
        facts.sharded(Shard(0, 3))


@pytest.mark.parametrize("family", ["gemma3_text", "smollm3"])
def test_the_first_layers_of_a_model_are_its_own(checkpoints, family):
    changes = {"num_hidden_layers": 4}
    if family == "gemma3_text":
        changes["layer_types"] = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    facts = describe("model.target", str(checkpoints(family, **changes)), torch.float32)
    short = _first_layers(facts, 3)
    config = short.config.get_text_config()
    assert config.num_hidden_layers == len(short.windows) == len(config.layer_types) == 3
    assert short.windows == facts.windows[:3] and facts.config.num_hidden_layers == 4
    assert short.cache_shape.num_layers == 3
