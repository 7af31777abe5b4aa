"""A model written for llama.cpp gives there the tokens that it gives in transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conf.schema import ConfigError
from launch.benchmark.gguf_export import export, gguf_name, interleaved
from tests.support.tiny_models import generate_greedily, random_prompt

ROOT = Path(__file__).resolve().parents[4]
NUM_TOKENS = 24


def llama_of(tmp_path, folder: Path, num_ctx: int = 512, **config):
    """Both of them: transformers' model and llama.cpp's, in fp32."""
    pytest.importorskip("gguf", reason="Requires: gguf")
    llama_cpp = pytest.importorskip("llama_cpp", reason="Requires: llama-cpp-python")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **config).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    export(model, tokenizer, tmp_path / "model.gguf", torch.float32)
    fp32 = llama_cpp.GGML_TYPE_F32
    settings = {"n_ctx": num_ctx, "n_threads": 1, "n_threads_batch": 1, "type_k": fp32, "type_v": fp32}
    return model, tokenizer, llama_cpp.Llama(str(tmp_path / "model.gguf"), verbose=False, **settings)


def greedy(llama, prompt: list[int]) -> list[int]:
    tokens = llama.generate(prompt, temp=0.0)
    return [next(tokens) for _ in range(NUM_TOKENS)]


def test_the_demo_pair_writes_the_same_and_splits_text_alike(tmp_path):
    model, tokenizer, llama = llama_of(tmp_path, ROOT / "assets/demo/target")
    text = 'def add(left, right):\n    """It\'s 1234 + 5."""\n    return  left + right  # Über\n\n\nclass A:\n'
    ids = tokenizer(text)["input_ids"]
    assert llama.tokenize(text.encode(), add_bos=True) == ids
    assert greedy(llama, ids) == generate_greedily(model, ids, NUM_TOKENS)


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 4}, {"tie_word_embeddings": True}], ids=str)
def test_random_models_write_the_same(tmp_path, checkpoints, changes):
    """Grouped heads, equal heads, tied embeddings."""
    folder = checkpoints("llama", **changes)
    model, _, llama = llama_of(tmp_path, folder)
    prompt = random_prompt(60)
    assert greedy(llama, prompt) == generate_greedily(model, prompt, NUM_TOKENS)


def test_positions_stretched_by_yarn_are_the_same(tmp_path, checkpoints):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0}
    folder = checkpoints("llama", rope_parameters=yarn)
    model, _, llama = llama_of(tmp_path, folder)
    prompt = random_prompt(300)
    assert greedy(llama, prompt) == generate_greedily(model, prompt, NUM_TOKENS)


def test_every_weight_has_a_name():
    assert gguf_name("model.layers.12.self_attn.k_proj.weight") == "blk.12.attn_k.weight"
    assert gguf_name("model.embed_tokens.weight") == "token_embd.weight"


def test_rows_of_two_halves_become_neighbours():
    rows = torch.arange(8.0)[:, None]
    assert interleaved(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize(
    ("model_type", "changes", "words"),
    [
        ("qwen2", {}, "model type qwen2"),
        ("llama", {"attention_bias": True}, "without biases"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "type dynamic"),
    ],
    ids=str,
)
def test_what_cannot_be_written_is_refused(tmp_path, checkpoints, model_type, changes, words):
    pytest.importorskip("gguf", reason="Requires: gguf")
    folder = checkpoints(model_type, **changes)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with pytest.raises(ConfigError, match=words):
        export(model, tokenizer, tmp_path / "model.gguf", torch.float32)


def test_a_tokenizer_of_another_kind_is_left_out(tmp_path, checkpoints):
    gguf = pytest.importorskip("gguf", reason="Requires: gguf")
    folder = checkpoints("llama")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert json.loads(tokenizer.backend_tokenizer.to_str())["model"]["type"] == "WordLevel"
    export(model, tokenizer, tmp_path / "model.gguf", torch.float16)
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.model"].contents() == "no_vocab" and "tokenizer.ggml.tokens" not in fields
