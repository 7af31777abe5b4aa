"""Steps of a draft level with a recorded model and with a plain one, side by side, for any device and recorder."""

from __future__ import annotations

import random

import torch

from tests.support.tiny_models import VOCAB_SIZE, random_prompt
from tiers.base import CacheShape
from tiers.device_tier import DeviceTier
from tiers.retrieval.context_summary import Summary
from tiers.retrieval_cache import LayerUpdate, RetrievalCache, RetrievalUpdate
from tiers.streaming_llm_cache import StreamingLLMCache
from workers.models.causal_model import CausalModel
from workers.models.cuda_graphs import RecordedModel, Recorder
from workers.models.retrieval_model import RetrievalModel
from workers.models.streaming_model import StreamingModel

SHAPE = CacheShape(num_layers=2, num_kv_heads=2, head_dim=8, dtype=torch.float32)
"""Of the tiny Llama in fp32."""
# Both attend to the same keys; empty slots, and another kernel for them, only change the order of sums.
TOLERANCE = {"rtol": 1e-5, "atol": 3e-5}


def random_update(generator: torch.Generator, length: int, budget: int, num_summaries: list[int]) -> RetrievalUpdate:
    """As of a rebuild after `length` tokens; layers differ in how many summaries they have."""

    def rows(count: int) -> torch.Tensor:
        return torch.randn(2, 2, count, 8, generator=generator)

    layers = []
    for count in num_summaries:
        positions = torch.arange(length - budget, length).expand(2, -1)
        summary = Summary(*rows(count), torch.randn(2, count, generator=generator)) if count else None
        layers.append(LayerUpdate(*rows(budget), positions, summary))
    return RetrievalUpdate(is_rebuild=True, start=0, length=length, layers=layers)


def compare_retrieval_drafts(model: CausalModel, record: Recorder) -> None:
    """Many steps of appends, roll backs, replaced keys and rebuilds, of up to 4 recorded tokens and more."""
    caches = [RetrievalCache(SHAPE, 32, 60, 8, DeviceTier(model.device), 40) for _ in range(2)]
    levels = [RetrievalModel(RecordedModel(model, caches[0], 4, record), caches[0]), RetrievalModel(model, caches[1])]
    choices, generator = random.Random(0), torch.Generator().manual_seed(0)
    length, num_steps, sizes = 0, 0, set()
    for _ in range(4):
        base = length = length + 100
        update = random_update(generator, length, choices.choice([8, 24, 32]), choices.choices([0, 3, 30], k=2))
        for level in levels:
            level.load(update)
        while not levels[0].is_full:
            count = choices.choice([1, 1, 2, 3, 4, 5])
            tokens, num_logits = choices.choices(range(VOCAB_SIZE), k=count), choices.randint(1, count)
            got, wanted = (level.append(tokens, num_logits) for level in levels)
            torch.testing.assert_close(got, wanted, **TOLERANCE)
            sizes.add(count)
            num_steps += 1
            length = choices.randint(max(base, levels[0].length - 3), levels[0].length)
            for level in levels:
                level.truncate(length)
            if choices.random() < 0.3 and length > base:
                k, v = torch.randn(2, 2, length - base, 8, generator=generator)
                true = RetrievalUpdate(is_rebuild=False, start=base, length=length, layers=[LayerUpdate(k, v)] * 2)
                for level in levels:
                    level.load(true)
    assert num_steps > 30 and sizes == {1, 2, 3, 4, 5}


def compare_drafters(model: CausalModel, record: Recorder) -> None:
    """Windows slide and are read anew, tokens are rolled back; up to 3 tokens are recorded."""
    caches = [StreamingLLMCache(SHAPE, 4, 20, 12, DeviceTier(model.device)) for _ in range(2)]
    levels = [StreamingModel(RecordedModel(model, caches[0], 3, record), caches[0]), StreamingModel(model, caches[1])]
    choices, prompt = random.Random(1), random_prompt(50)
    for level in levels:
        level.prefill(prompt)
    for _ in range(50):
        tokens = choices.choices(range(VOCAB_SIZE), k=choices.choice([1, 1, 1, 2, 3, 6]))
        got, wanted = (level.append(tokens, 1) for level in levels)
        torch.testing.assert_close(got, wanted, **TOLERANCE)
        length = levels[0].length - choices.choice([0, 0, 1, 2])
        for level in levels:
            level.truncate(length)
    assert levels[0].length > 80
