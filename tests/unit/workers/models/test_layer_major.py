"""A prompt read layer by layer gives what transformers computes in one pass, for every family."""

from __future__ import annotations

from contextlib import closing

import pytest
import torch
import transformers

from tests.support.all_caches import full_cache
from tests.support.tiny_models import FAMILIES, random_prompt, save_checkpoint, tiny_config
from tiers.base import CacheShape
from tiers.device_tier import DeviceTier
from workers.models.causal_model import CausalModel
from workers.models.target_model import TargetModel

CPU = torch.device("cpu")
NUM_TOKENS = 150
PROMPT = random_prompt(NUM_TOKENS + 3)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """A tiny checkpoint of a family, as transformers loads it."""
    folders = {}

    def get(family: str):
        if family not in folders:
            folders[family] = save_checkpoint(tmp_path_factory.mktemp("models") / family, tiny_config(family))
        return transformers.AutoModelForCausalLM.from_pretrained(
            folders[family], dtype=torch.float32, attn_implementation="eager"
        ).eval()

    return get


def target_over(hf_model, tiers: str, piece_tokens: int) -> tuple[TargetModel, object, DeviceTier]:
    """On a full cache whose layers are in `tiers`, taken in turn."""
    config = hf_model.config.get_text_config()
    num_layers = config.num_hidden_layers
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = CacheShape(
        num_layers=num_layers, num_kv_heads=config.num_key_value_heads, head_dim=dim, dtype=torch.float32
    )
    types = getattr(config, "layer_types", None) or ["full_attention"] * num_layers
    windows = [config.sliding_window if kind == "sliding_attention" else None for kind in types]
    letters = (tiers * num_layers)[:num_layers]
    cache = full_cache(letters, capacity=256, windows=windows, shape=shape)
    hidden_tier = DeviceTier(CPU)
    model = CausalModel(hf_model, CPU)
    return (
        TargetModel(model, cache, piece_tokens=piece_tokens, hidden_tier=hidden_tier, selection=None),
        cache,
        hidden_tier,
    )


@pytest.mark.parametrize("tiers", ["d", "h", "sd"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_after_the_prompt_are_those_of_one_plain_pass(load, family, tiers):
    hf_model = load(family)
    with torch.inference_mode():
        wanted = hf_model(input_ids=torch.tensor([PROMPT]), use_cache=False).logits[0, -3:]
    target, cache, hidden_tier = target_over(hf_model, tiers, piece_tokens=32)
    with closing(cache):
        target.prefill(PROMPT[:NUM_TOKENS])
        assert target.length == NUM_TOKENS and hidden_tier.used_bytes == 0 < hidden_tier.peak_bytes
        torch.testing.assert_close(target.append(PROMPT[NUM_TOKENS:], 3), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("num_tokens", [0, 1, 31, 32, 33, 64])
def test_prompts_around_the_size_of_a_piece(load, num_tokens):
    hf_model = load("llama")
    tokens = PROMPT[: num_tokens + 2]
    with torch.inference_mode():
        wanted = hf_model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -2:]
    target, cache, _ = target_over(hf_model, "hd", piece_tokens=32)
    with closing(cache):
        target.prefill(tokens[:num_tokens])
        torch.testing.assert_close(target.append(tokens[num_tokens:], 2), wanted, rtol=0, atol=1e-4)


def test_progress_grows_to_the_whole_and_a_second_prompt_replaces_the_first(load):
    hf_model = load("llama")
    target, cache, _ = target_over(hf_model, "h", piece_tokens=40)
    seen: list[tuple[int, int]] = []
    target.on_prefill_progress = lambda done, total: seen.append((done, total))
    with closing(cache):
        target.prefill(PROMPT[:100])
        done = [count for count, _ in seen]
        assert done == sorted(done) and seen[-1] == (200, 200) and len(seen) == 2 * 3
        first = target.append(PROMPT[100:103], 3)
        target.prefill(PROMPT[50:150])
        target.prefill(PROMPT[:100])
        assert torch.equal(target.append(PROMPT[100:103], 3), first)


def test_a_failure_in_mid_prompt_leaves_nothing_behind(load):
    hf_model = load("llama")
    with torch.inference_mode():
        wanted = hf_model(input_ids=torch.tensor([PROMPT[:101]]), use_cache=False).logits[0, -1:]
    target, cache, hidden_tier = target_over(hf_model, "hd", piece_tokens=40)

    def fail(done: int, total: int) -> None:
        if done > 150:
            raise ZeroDivisionError

    with closing(cache):
        target.on_prefill_progress = fail
        with pytest.raises(ZeroDivisionError):
            target.prefill(PROMPT[:100])
        assert target.length == 0 and hidden_tier.used_bytes == 0
        target.on_prefill_progress = lambda done, total: None
        target.prefill(PROMPT[:100])
        torch.testing.assert_close(target.append(PROMPT[100:101], 1), wanted, rtol=0, atol=1e-4)


def test_a_forward_that_another_library_put_on_a_layer_stays(load):
    hf_model = load("llama")
    layer, calls = hf_model.model.layers[0], []
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: (calls.append(1), forward(*args, **kwargs))[1]
    wrapped = layer.forward
    target, cache, _ = target_over(hf_model, "d", piece_tokens=40)
    with closing(cache):
        target.prefill(PROMPT[:100])
    assert layer.forward is wrapped and len(calls) == 3


def test_a_model_without_a_list_of_layers_is_refused(load):
    hf_model = load("llama")
    hf_model.model.layers = torch.nn.ModuleList(list(hf_model.model.layers)[:1])
    with pytest.raises(TypeError, match="has no list of 2 layers with attention"):
        _ = CausalModel(hf_model, CPU).layer_major
