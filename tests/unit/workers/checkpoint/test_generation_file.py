"""What is read of a checkpoint: the keys that change its text, and every end of it, wherever it is named."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, GenerationConfig

from conf.schema import ConfigError
from tests.support.tiny_models import tiny_tokenizer
from workers.checkpoint.facts import describe
from workers.checkpoint.generation_file import end_ids


@pytest.fixture
def folder(checkpoints, tmp_path):
    """A copy of a checkpoint without an end of sequence, and without generation_config.json."""
    folder = shutil.copytree(checkpoints("llama"), tmp_path / "model")
    (folder / "generation_config.json").unlink()
    return folder


def write(folder, **values):
    (folder / "generation_config.json").write_text(json.dumps(values))


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def add_special_tokens(folder, **changes):
    """Makes t90 to t95 special tokens, of which `changes` tell more."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [f"t{index}" for index in range(90, 96)]})
    tokenizer.save_pretrained(folder)
    change(folder / "tokenizer_config.json", **changes)


def facts_of(folder):
    return describe("model.target", str(folder), torch.float32)


def test_a_checkpoint_that_names_no_end_has_none(folder):
    assert facts_of(folder).eos_ids == frozenset()


def test_defaults_of_transformers_classes_are_no_ends(folder):
    """LlamaConfig says 2 where config.json says nothing: a word, in most vocabularies."""
    config = json.loads((folder / "config.json").read_text())
    del config["eos_token_id"]
    (folder / "config.json").write_text(json.dumps(config))
    assert AutoConfig.from_pretrained(folder).eos_token_id == 2 and facts_of(folder).eos_ids == frozenset()


CHAT = "{% for m in messages %}{{ 't90 ' if m.role == 'user' else 't91 ' }}{{ m.content }} t92\n{% endfor %}"


@pytest.mark.parametrize(
    ("spoil", "wanted"),
    [
        (lambda folder: change(folder / "config.json", eos_token_id=7), {7}),
        (lambda folder: change(folder / "config.json", eos_token_id=[7, 9]), {7, 9}),
        (lambda folder: write(folder, eos_token_id=5), {5}),
        (lambda folder: write(folder, eos_token_id=[5, 6]), {5, 6}),
        (lambda folder: write(folder, eos_token_id=[5, -1]), {5}),
        (lambda folder: add_special_tokens(folder, eos_token="t93"), {93}),
        (lambda folder: add_special_tokens(folder, eot_token="t94"), {94}),
        (lambda folder: add_special_tokens(folder, chat_template=CHAT), {92}),
        (lambda folder: add_special_tokens(folder, chat_template="{{ raise_exception('no such roles') }}"), set()),
        (lambda folder: add_special_tokens(folder, chat_template=CHAT.replace("t92", "t12")), set()),
    ],
)
def test_an_end_counts_wherever_it_is_named(folder, spoil, wanted):
    spoil(folder)
    assert facts_of(folder).eos_ids == wanted


def test_all_ends_count_together(folder):
    change(folder / "config.json", eos_token_id=7)
    write(folder, eos_token_id=[5])
    add_special_tokens(folder, eos_token="t93", chat_template=CHAT)
    assert facts_of(folder).eos_ids == {5, 7, 92, 93}


def test_the_text_part_of_a_model_of_several_names_ends_too(tmp_path):
    text = {"model_type": "llama", "eos_token_id": [8, 9]}
    published = {"model_type": "llava", "text_config": text, "eos_token_id": 4, "vision_config": {"eos_token_id": 3}}
    (tmp_path / "config.json").write_text(json.dumps(published))
    config = AutoConfig.from_pretrained(tmp_path)
    assert end_ids(GenerationConfig(), config, str(tmp_path), tiny_tokenizer()) == {4, 8, 9}


def test_only_keys_that_change_the_text_are_read(folder):
    write(folder, repetition_penalty=1.0, num_beams=1, top_k=20, use_cache=True, pad_token_id=3, made_up="x", min_p=0.1)
    assert facts_of(folder).generation == {"top_k": 20, "min_p": 0.1}


def test_an_old_checkpoint_says_it_in_its_config(folder):
    change(folder / "config.json", repetition_penalty=1.2)
    assert facts_of(folder).generation == {"repetition_penalty": 1.2}


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"max_new_tokens": -3}', '{"watermarking_config": {"bias": "x", "y": 1}}']
)
def test_a_file_that_cannot_be_read_is_refused_by_name(folder, text):
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"model\.target is .*generation_config\.json cannot be read"):
        facts_of(folder)
