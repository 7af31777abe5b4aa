"""Configurations as they are published, shrunk in size but with the same fields, against transformers' own tokens.

config.json is written field by field as on the hub: old names of RoPE scaling, `torch_dtype`, `auto_map` and all. The
reference for YaRN is a Llama whose configuration says the same in transformers' own words.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from conf.schema import Mode
from tests.support.tiny_models import (
    greedy_tokens,
    random_prompt,
    save_checkpoint,
    tiny_config,
    tiny_tokenizer,
)
from tests.support.tiny_runs import DEVICE, HOST, generate, tiny_run
from workers.checkpoint.facts import describe

NUM_TOKENS, NUM_PROMPT_TOKENS = 16, 120
TOKENIZER_SIZE = 90
LLAMA_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TIED = {"tie_word_embeddings": True}
NO_GQA = {"num_key_value_heads": 4, "head_dim": None}
YARN_128K = {
    "rope_scaling": {"factor": 32.0, "finetuned": True, "original_max_position_embeddings": 4096, "type": "yarn"},
    "max_position_embeddings": 131072,
    "auto_map": {
        "AutoConfig": "configuration_llama.LlamaConfig",
        "AutoModelForCausalLM": "modeling_llama_together_yarn.LlamaForCausalLM",
    },
}
OLD_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "pretraining_tp": 1,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "dtype": None,
    "head_dim": None,
    "rope_parameters": None,
    **LLAMA_IDS,
}
LLAMA3_ROPE = {
    "rope_theta": 500000.0,
    "rope_scaling": {
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "max_position_embeddings": 131072,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "rope_parameters": None,
}
QWEN = {"max_position_embeddings": 32768, "rope_theta": 1000000.0, "use_sliding_window": False, "rope_parameters": None}
QWEN25 = QWEN | {"sliding_window": 32768, "max_window_layers": 1, "use_mrope": False}
QWEN3 = QWEN | {
    "sliding_window": None,
    "max_window_layers": 2,
    "attention_bias": False,
    "max_position_embeddings": 40960,
}

# name: (family, changes of the tiny configuration, fields of config.json as published)
PUBLISHED = {
    "yarn-llama-2-7b-128k": ("llama", NO_GQA, OLD_LLAMA | YARN_128K | {"rms_norm_eps": 1e-5}),
    "yarn-llama-2-13b-128k": (
        "llama",
        NO_GQA | {"num_hidden_layers": 3, "hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 5},
        OLD_LLAMA | YARN_128K | {"use_flash_attention": False, "rms_norm_eps": 1e-5},
    ),
    "lwm-text-chat-128k": (
        "llama",
        NO_GQA,
        OLD_LLAMA
        | {"rope_theta": 10000000.0, "rope_scaling": None, "max_position_embeddings": 131072, "rms_norm_eps": 1e-6},
    ),
    "llama-68m": (
        "llama",
        NO_GQA | {"num_hidden_layers": 2, "intermediate_size": 128},
        {
            "bos_token_id": 0,
            "eos_token_id": 2,
            "pad_token_id": 1,
            "max_position_embeddings": 2048,
            "torch_dtype": "float32",
            "num_key_value_heads": None,
            "head_dim": None,
            "dtype": None,
            "rope_parameters": None,
            "rms_norm_eps": 1e-6,
        },
    ),
    "llama-3.1-8b": ("llama", {}, LLAMA3_ROPE | {"rope_scaling": LLAMA3_ROPE["rope_scaling"] | {"factor": 8.0}}),
    "llama-3.2-1b": (
        "llama",
        TIED,
        LLAMA3_ROPE | {"rope_scaling": LLAMA3_ROPE["rope_scaling"] | {"factor": 32.0}},
    ),
    "qwen2.5-7b": ("qwen2", {"vocab_size": 112}, QWEN25),
    "qwen2.5-0.5b": ("qwen2", {"vocab_size": 104, "hidden_size": 24, "head_dim": 6} | TIED, QWEN25),
    "qwen3-8b": ("qwen3", {"vocab_size": 112, "head_dim": 12}, QWEN3),
    "qwen3-0.6b": ("qwen3", {"vocab_size": 112, "head_dim": 12, "hidden_size": 24} | TIED, QWEN3),
}
PAIRS = [
    ("yarn-llama-2-7b-128k", "llama-68m"),
    ("yarn-llama-2-13b-128k", "llama-68m"),
    ("lwm-text-chat-128k", "llama-68m"),
    ("llama-3.1-8b", "llama-3.2-1b"),
    ("llama-3.2-1b", "llama-3.2-1b"),
    ("qwen2.5-7b", "qwen2.5-0.5b"),
    ("qwen3-8b", "qwen3-0.6b"),
]
REMOTE_FILES = ("configuration_llama.py", "modeling_llama_together_yarn.py")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The folder of a shrunk published model."""
    folders: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in folders:
            family, changes, fields = PUBLISHED[name]
            folder = tmp_path_factory.mktemp("published") / name
            config = tiny_config(family, **changes)
            tokenizer = tiny_tokenizer(TOKENIZER_SIZE)
            seed = sorted(PUBLISHED).index(name)
            save_checkpoint(folder, config, seed, tokenizer=tokenizer, max_shard_size="12KB", published_fields=fields)
            for file in REMOTE_FILES if "auto_map" in fields else ():
                (folder / file).write_text(f"open({str(folder / 'executed')!r}, 'w')\nraise SystemExit('executed')\n")
            folders[name] = folder
        return folders[name]

    return get


@pytest.mark.parametrize("name", PUBLISHED)
def test_checkpoints_are_sharded_and_have_the_published_fields(published, name):
    folder, fields = published(name), PUBLISHED[name][2]
    written = json.loads((folder / "config.json").read_text())
    assert {key: written.get(key) for key in fields} == fields
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1


@pytest.mark.parametrize(("target", "drafter"), PAIRS, ids=lambda name: name)
def test_published_pairs_give_the_tokens_of_transformers(published, target, drafter):
    prompt = random_prompt(NUM_PROMPT_TOKENS, vocab_size=TOKENIZER_SIZE)
    wanted = greedy_tokens(published(target), prompt, NUM_TOKENS)
    for mode, tier in ((Mode.triforce, HOST), (Mode.streaming, DEVICE), (Mode.retrieval, DEVICE)):
        config = tiny_run(published(target), published(drafter), mode, tier)
        assert generate(config, prompt, NUM_TOKENS).tokens == wanted, mode


@pytest.mark.parametrize("name", ["yarn-llama-2-7b-128k", "yarn-llama-2-13b-128k"])
def test_code_from_a_checkpoint_is_not_run(published, name):
    folder = published(name)
    facts = describe("model.target", str(folder), torch.float32)
    generate(tiny_run(folder, mode=Mode.autoregressive), random_prompt(20, vocab_size=TOKENIZER_SIZE), 2)
    assert facts.config.rope_parameters["rope_type"] == "yarn" and facts.max_positions == 131072
    assert type(facts.config).__module__.startswith("transformers.")
    assert not (folder / "executed").exists()
    assert not any("together_yarn" in module for module in sys.modules)


def test_old_fields_of_yarn_mean_the_same_as_new_ones(published, tmp_path):
    """Same weights, RoPE written in today's way; the prompt is long enough for positions to matter."""
    old, (family, changes, _) = published("yarn-llama-2-7b-128k"), PUBLISHED["yarn-llama-2-7b-128k"]
    rope = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "rope_theta": 10000.0}
    positions = {"max_position_embeddings": 131072, "rms_norm_eps": 1e-5, **LLAMA_IDS}
    seed, prompt = sorted(PUBLISHED).index("yarn-llama-2-7b-128k"), random_prompt(300, vocab_size=TOKENIZER_SIZE)
    new = save_checkpoint(tmp_path / "new", tiny_config(family, **changes, **positions, rope_parameters=rope), seed)
    plain = save_checkpoint(tmp_path / "plain", tiny_config(family, **changes, **positions), seed)
    tokens = generate(tiny_run(old, mode=Mode.retrieval, tier=HOST), prompt, NUM_TOKENS).tokens
    assert tokens == greedy_tokens(new, prompt, NUM_TOKENS)
    assert tokens != greedy_tokens(plain, prompt, NUM_TOKENS)


def test_eos_ids_are_all_of_the_published_ones(published):
    facts = describe("model.target", str(published("llama-3.1-8b")), torch.float32)
    assert facts.eos_ids == {128001, 128008, 128009}


def test_windows_that_are_switched_off_are_none(published):
    """Qwen 2.5 names a sliding window that it does not use."""
    assert describe("model.target", str(published("qwen2.5-7b")), torch.float32).windows == [None, None]


def test_vocabularies_padded_differently_work_when_the_target_emits_padding(published):
    """Random weights give padding ids too, which the drafter has no embedding for."""
    target, drafter = published("qwen2.5-7b"), published("qwen2.5-0.5b")
    emitted: set[int] = set()
    for seed in range(4):
        prompt = random_prompt(40, seed=seed, vocab_size=112)
        wanted = greedy_tokens(target, prompt, NUM_TOKENS)
        emitted |= {token for token in prompt + wanted if token >= 104}
        assert generate(tiny_run(target, drafter, gamma2=3), prompt, NUM_TOKENS).tokens == wanted
    assert emitted


def test_every_shard_is_needed(published):
    folder = published("llama-68m")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as shard:
            assert set(shard.keys()) == {name for name, where in index.items() if where == file.name}
