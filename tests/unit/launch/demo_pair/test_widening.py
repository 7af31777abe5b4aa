"""A widened model computes what the small one does, in the shapes that were asked for; what cannot be is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from conf.model_shapes import PUBLISHED, model_shape
from conf.schema import Dtype, Mode
from launch.demo_pair.checkpoint import SHARD_BYTES, Fill, WidenConfig, wide_shape, widen
from launch.widen import main
from tests.support.tiny_models import VOCAB_SIZE, random_prompt
from tests.support.tiny_runs import HOST, engine_for, generate, tiny_run
from tiers.base import CacheShape
from workers.checkpoint.facts import describe

ROOT = Path(__file__).resolve().parents[4]
# Sums over the wide model's zeros may be taken in another order: a few units of fp32's last place, for each layer.
TOLERANCE = 1e-5
SIZES = {"num_layers": 5, "hidden_size": 72, "intermediate_size": 100, "num_heads": 12, "num_kv_heads": 3}
LLAMA_7B, LLAMA_68M, LLAMA_8B = "NousResearch/Yarn-Llama-2-7b-128k", "JackFram/llama-68m", "meta-llama/Llama-3.1-8B"


@pytest.fixture(scope="module")
def small(checkpoints) -> Path:
    """Grouped: 4 query heads, 2 kv heads x 8; eps is so large that it matters."""
    return checkpoints("llama", rms_norm_eps=1e-2)


def widened(source: Path, output: Path, shard_bytes: int = SHARD_BYTES, **changes) -> Path:
    config = WidenConfig(source=str(source), output=str(output), **{"shape": None, "dtype": Dtype.float32} | changes)
    return widen(config, shard_bytes).folder


@torch.inference_mode()
def logits(folder: Path, tokens: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]


def assert_same(wide: torch.Tensor, wanted: torch.Tensor) -> None:
    error = (wide[:, : wanted.shape[1]] - wanted).abs().max() / wanted.abs().max()
    assert error < TOLERANCE, float(error)


@pytest.mark.parametrize("fill", list(Fill))
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"num_layers": 3},
        {"hidden_size": 64},
        {"intermediate_size": 50},
        {"num_heads": 8, "num_kv_heads": 4},
        {"num_heads": 8},
        SIZES,
        SIZES | {"vocab_size": 130},
    ],
    ids=lambda sizes: " ".join(sizes) or "as it is",
)
def test_wide_logits_are_the_small_model_s(small, tmp_path, sizes, fill):
    tokens = random_prompt(60)
    wanted = logits(small, tokens)
    wide = logits(widened(small, tmp_path, fill=fill, **sizes), tokens)
    assert wide.shape[1] == sizes.get("vocab_size", VOCAB_SIZE)
    assert_same(wide, wanted)


def test_padded_tokens_never_win(small, tmp_path):
    wide = logits(widened(small, tmp_path, **SIZES, vocab_size=130), random_prompt(60))
    assert torch.softmax(wide / 100, -1)[:, VOCAB_SIZE:].max() == 0, "at the highest temperature that is legal"
    assert torch.isfinite(wide).all()


def test_negative_control_without_corrected_eps_the_logits_differ(small, tmp_path):
    folder = widened(small, tmp_path, **SIZES)
    fields = json.loads((folder / "config.json").read_text())
    assert fields["rms_norm_eps"] == pytest.approx(1e-2 * 32 / 72)
    (folder / "config.json").write_text(json.dumps(fields | {"rms_norm_eps": 1e-2}))
    with pytest.raises(AssertionError):
        assert_same(logits(folder, random_prompt(60)), logits(small, random_prompt(60)))


def test_tied_embeddings_get_a_head_of_their_own_where_that_is_asked_for(checkpoints, tmp_path):
    tied = checkpoints("llama", tie_word_embeddings=True)
    folder = widened(tied, tmp_path, hidden_size=40, vocab_size=100, ties_embeddings=False)
    assert not json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    assert_same(logits(folder, random_prompt(50)), logits(tied, random_prompt(50)))


def test_greedy_tokens_of_the_engine_are_the_small_model_s(small, tmp_path):
    wide = widened(small, tmp_path, **SIZES, vocab_size=130, fill=Fill.noise)
    prompt = random_prompt(120)
    wanted = generate(tiny_run(small, mode=Mode.autoregressive), prompt, 40)
    got = generate(tiny_run(wide, small, Mode.triforce, HOST), prompt, 40)
    assert got.tokens == wanted.tokens
    assert got.num_accepted > 0


def test_shards_are_read_as_one_model_and_zeros_take_no_place(small, tmp_path):
    folder = widened(small, tmp_path, **SIZES, shard_bytes=40_000)
    assert len(list(folder.glob("*.safetensors"))) > 3
    assert_same(logits(folder, random_prompt(30)), logits(small, random_prompt(30)))
    folder = widened(small, tmp_path, hidden_size=4096, intermediate_size=4096)
    (file,) = folder.glob("*.safetensors")
    assert file.stat().st_size > 200e6 > 10 * 512 * os.stat(file).st_blocks


def test_demo_pair_gets_the_published_shapes_and_their_bytes():
    """What `describe` says of a configuration alone; the weights of a 7B are not written here."""
    target, drafter = (model_shape("source", name, str(ROOT / "assets/demo" / name)) for name in ("target", "drafter"))
    wide = wide_shape(WidenConfig(shape=LLAMA_7B), target)
    assert wide == PUBLISHED[LLAMA_7B]
    assert wide.num_layers * 2 * wide.num_kv_heads * wide.head_dim * 2 == 512 << 10, "KV bytes a token"
    of_68m = wide_shape(WidenConfig(shape=LLAMA_68M), drafter)
    assert (of_68m.num_heads, of_68m.head_dim) == (6, 128)
    assert of_68m.num_parameters == PUBLISHED[LLAMA_68M].num_parameters
    of_8b = wide_shape(WidenConfig(shape=LLAMA_8B), target)
    assert of_8b == PUBLISHED[LLAMA_8B]


def test_configuration_says_what_was_asked_for(small, tmp_path):
    folder = widened(small, tmp_path, **SIZES, vocab_size=130)
    facts = describe("model.target", str(folder), torch.float32)
    assert facts.cache_shape == CacheShape(num_layers=5, num_kv_heads=3, head_dim=8, dtype=torch.float32)
    assert facts.config.num_attention_heads == 12 and facts.config.vocab_size == 130
    assert (
        facts.num_weight_bytes
        == json.loads((folder / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    )
    assert facts.tokenizer.get_vocab() == describe("model.target", str(small), torch.float32).tokenizer.get_vocab()
    with engine_for(tiny_run(folder, mode=Mode.autoregressive, tier=HOST), random_prompt(200), 8) as engine:
        stored = engine.memory_report()["host"]["planned_bytes"]
        assert stored == 208 // 16 * 16 * facts.cache_shape.bytes_per_token


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["shape=null", "hidden_size=8"], "hidden_size is 8; it must be at least the 32"),
        (["shape=null", "num_layers=1"], "num_layers is 1"),
        (["shape=null", "num_heads=5"], "num_heads is 5; it must be a multiple of num_kv_heads=2"),
        (["shape=null", "num_heads=12"], "num_heads is 12; it must be a divisor of hidden_size=32"),
        (["shape=null", "num_heads=4", "num_kv_heads=4"], "num_heads is 4; it must be at least 8"),
        (["shape=null", "vocab_size=200"], "vocab_size is 200; it must be the source's 96 unless hidden_size grows"),
        (["shape=gpt-5"], "shape is 'gpt-5'; it must be null, a folder, or of"),
        (["shape=null", "hidden_size=0"], "hidden_size is 0"),
        (["dtype=float16"], "dtype is 'float16'; it must be bfloat16 or float32"),
        (["source=/nowhere"], "source is '/nowhere'"),
        (["widht=5"], "widht"),
        (["fill=ones"], "fill"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_what_cannot_be_is_refused_with_one_message(small, tmp_path, capsys, overrides, message):
    assert main([f"source={small}", f"output={tmp_path / 'out'}", *overrides]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_other_families_are_refused(checkpoints, tmp_path, capsys):
    assert main([f"source={checkpoints('qwen2')}", f"output={tmp_path}"]) == 2
    assert "it must be a Llama model without biases" in capsys.readouterr().err
