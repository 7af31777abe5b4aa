"""workers/models/shared_weights.py: a model on another process's weights computes the same in no memory of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.tiny_models import random_prompt
from tiers.device_tier import DeviceTier
from tiers.streaming_llm_cache import StreamingLLMCache
from workers.checkpoint.facts import describe
from workers.models.causal_model import CausalModel
from workers.models.loading import load_model
from workers.models.shared_weights import SharedWeights, load_shared_model
from workers.models.streaming_model import StreamingModel

CPU, ROOT, PROMPT = torch.device("cpu"), Path(__file__).resolve().parents[4], random_prompt(20)
FAMILIES = {"llama": {}, "tied": {"tie_word_embeddings": True}, "gemma3_text": {}, "phi3": {}, "gpt_oss": {}}


def logits_of(model: CausalModel, facts) -> torch.Tensor:
    streaming = StreamingModel(model, StreamingLLMCache(facts.cache_shape, 2, 30, 8, DeviceTier(CPU)))
    streaming.prefill(PROMPT)
    return streaming.append([3, 4], 2).clone()


@pytest.fixture(params=FAMILIES)
def loaded(request, checkpoints):
    family = "llama" if request.param == "tied" else request.param
    facts = describe("model.target", str(checkpoints(family, **FAMILIES[request.param])), torch.float32)
    return facts, load_model(facts, CPU, self_check=False)


def test_computes_the_same_on_the_same_memory(loaded):
    facts, model = loaded
    wanted = logits_of(model, facts)
    shared = SharedWeights(model)
    taker = load_shared_model(facts, json.loads(json.dumps(shared.description())), CPU)
    assert torch.equal(logits_of(model, facts), wanted), "they moved"
    assert torch.equal(logits_of(taker, facts), wanted)
    with torch.no_grad():
        for parameter in model.hf_model.parameters():
            parameter.zero_()
    assert all(parameter.eq(0).all() for parameter in taker.hf_model.parameters())


def test_tied_weights_are_there_once(checkpoints):
    facts = describe("model.target", str(checkpoints("llama", tie_word_embeddings=True)), torch.float32)
    shared = SharedWeights(load_model(facts, CPU, self_check=False))
    description = shared.description()
    assert description["tied"] == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in description["names"]
    model = load_shared_model(facts, description, CPU).hf_model
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


IN_ANOTHER_PROCESS = """
import json, sys, torch
from tests.unit.workers.models.test_shared_weights import CPU, describe, load_shared_model, logits_of
facts = describe("model.target", sys.argv[1], torch.float32)
print(json.dumps(logits_of(load_shared_model(facts, json.loads(sys.argv[2]), CPU), facts).tolist()))
"""


def test_another_process_computes_the_same(checkpoints):
    source = str(checkpoints("llama"))
    facts = describe("model.target", source, torch.float32)
    shared = SharedWeights(model := load_model(facts, CPU, self_check=False))
    done = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS, source, json.dumps(shared.description())],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert json.loads(done.stdout.splitlines()[-1]) == logits_of(model, facts).tolist()
