"""The real engine on a tiny model: its tokens have exactly the law that plain forward passes and top-p give.

Vocabulary 16, a fixed prompt. The target alone draws the first token, which is certain after this prompt; the cells are
the two tokens after it, which come from drafts, replacements and bonuses. Truncation by top-p makes cells of
probability zero, where bugs hide. The law is made by transformers' own sampling processors. Each sample starts the same
roles anew, with another seed.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from conf.schema import Coupling, Mode, RunConfig, SamplingConfig
from launch.assembly import role_builder as roles
from tests.lossless.test_distribution import chi_square_p_value
from tests.support.tiny_models import random_prompt
from tests.support.tiny_runs import CHUNK, DEVICE, HOST, engine_for, next_session, tiny_run
from tiers.full_cache import FullCache
from workers import acceptance
from workers.acceptance import KeyedRandom

VOCAB_SIZE = 16
SMALL = {"vocab_size": VOCAB_SIZE, "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 24}
PROMPT = random_prompt(64, seed=19, vocab_size=VOCAB_SIZE)
NUM_TOKENS = 3
"""The certain one and two more."""
ROOM = 12
"""Tokens that a session may generate: more than are looked at, so that rounds have their full length."""
SPREAD = 1.5

TEMPERATURE, TOP_P = 0.6, 0.9
MAXIMAL = SamplingConfig(temperature=TEMPERATURE, top_p=TOP_P)
BLOCK = SamplingConfig(temperature=TEMPERATURE, top_p=TOP_P, block_verification=True)
GUMBEL = SamplingConfig(temperature=TEMPERATURE, top_p=TOP_P, coupling=Coupling.gumbel)

NUM_SAMPLES_SLOW = 20_000
P_VALUE_BELOW_WHICH_TO_FAIL, P_VALUE_OF_A_WRONG_LAW = 1e-3, 1e-6


class ReseededRandom(KeyedRandom):
    """The random numbers of an engine whose seed changes from sample to sample."""

    def __init__(self):
        super().__init__(0)

    def reseed(self, seed: int) -> None:
        super().__init__(seed)


@pytest.fixture
def random(monkeypatch):
    random = ReseededRandom()
    monkeypatch.setattr(roles, "KeyedRandom", lambda seed: random)
    return random


@pytest.fixture(scope="module")
def models(checkpoints):
    """Target and drafter."""
    return tuple(checkpoints("llama", seed, logit_spread=SPREAD, **SMALL) for seed in (0, 1))


@pytest.fixture(scope="module")
def law(models) -> dict[tuple[int, ...], float]:
    """The probability of each sequence of the first tokens."""
    model = AutoModelForCausalLM.from_pretrained(models[0], dtype=torch.float32, attn_implementation="eager")
    processors = LogitsProcessorList([TemperatureLogitsWarper(TEMPERATURE), TopPLogitsWarper(TOP_P)])
    law = {(): 1.0}
    for _ in range(NUM_TOKENS):
        ids = torch.tensor([[*PROMPT, *tokens] for tokens in law])
        with torch.inference_mode():
            probs = processors(ids, model(ids).logits[:, -1]).double().softmax(-1).tolist()
        law = {
            (*tokens, token): weight * prob
            for (tokens, weight), row in zip(law.items(), probs, strict=True)
            for token, prob in enumerate(row)
            if prob
        }
    return law


def counts(config: RunConfig, random: ReseededRandom, num_samples: int) -> Counter:
    """The first tokens over as many seeds."""
    counted: Counter = Counter()
    with engine_for(config, PROMPT, ROOM) as built:
        for seed in range(num_samples):
            random.reseed(seed)
            hierarchy = next_session(built.hierarchy, PROMPT, ROOM, config.cache.retrieval.rebuild)
            hierarchy.start()
            while len(hierarchy.session.generated) < NUM_TOKENS:
                hierarchy.round()
            counted[tuple(hierarchy.session.generated[:NUM_TOKENS])] += 1
    return counted


def config_for(models, mode: Mode, sampling: SamplingConfig, tier=HOST, **changes) -> RunConfig:
    knobs = {"gamma1": 1, "gamma2": 1, "budget": CHUNK, "window": 24, "self_check": False} | changes
    return tiny_run(*models, mode, tier, sampling=sampling, **knobs)


# (mode, sampling, changes, number of samples)
CASES = {
    "triforce": (Mode.triforce, MAXIMAL, {}, 2_000),
    "triforce_rebuilt_each_round": (Mode.triforce, MAXIMAL, {"gamma2": 2, "rebuild": "1"}, 200),
    "triforce_block": (Mode.triforce, BLOCK, {"gamma2": 2}, 200),
    "triforce_gumbel": (Mode.triforce, GUMBEL, {"gamma2": 2}, 200),
    "retrieval": (Mode.retrieval, MAXIMAL, {"tier": DEVICE}, 300),
    "streaming": (Mode.streaming, MAXIMAL, {"gamma2": 3}, 500),
    "streaming_block": (Mode.streaming, BLOCK, {"gamma2": 3}, 500),
    "autoregressive": (Mode.autoregressive, MAXIMAL, {}, 300),
}


@pytest.mark.parametrize("name", CASES)
def test_tokens_have_the_law_of_plain_forward_passes(models, law, random, name):
    mode, sampling, changes, num_samples = CASES[name]
    counted = counts(config_for(models, mode, sampling, **changes), random, num_samples)
    assert chi_square_p_value(counted, law) > P_VALUE_BELOW_WHICH_TO_FAIL


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_tokens_of_many_samples_have_the_law_of_plain_forward_passes(models, law, random, name):
    mode, sampling, changes, _ = CASES[name]
    counted = counts(config_for(models, mode, sampling, **changes), random, NUM_SAMPLES_SLOW)
    assert chi_square_p_value(counted, law) > P_VALUE_BELOW_WHICH_TO_FAIL


def test_the_law_has_many_cells_and_many_of_probability_zero(law):
    """So that the test can see something."""
    assert sum(law.values()) == pytest.approx(1)
    assert len({tokens[0] for tokens in law}) == 1
    assert 20 < len(law) < VOCAB_SIZE**2 / 2
    assert sum(weight * 300 >= 5 for weight in law.values()) > 10


@pytest.mark.parametrize("name", ["triforce_rebuilt_each_round", "streaming"])
def test_control_a_missing_residual_is_seen(models, law, random, monkeypatch, name):
    monkeypatch.setattr(acceptance, "residual", lambda target_probs, draft_probs: target_probs)
    mode, sampling, changes, num_samples = CASES[name]
    changes = changes | {"summary_tokens": 0}  # a draft that is far from the target shows a wrong rule sooner
    counted = counts(config_for(models, mode, sampling, **changes), random, num_samples)
    assert chi_square_p_value(counted, law) < P_VALUE_OF_A_WRONG_LAW


def test_control_rejected_drafts_that_stay_in_the_cache_are_seen(models, law, random, monkeypatch):
    truncate = FullCache.truncate
    far_back = len(PROMPT) // 2
    monkeypatch.setattr(FullCache, "truncate", lambda cache, to: truncate(cache, to) if to < far_back else None)
    mode, sampling, changes, num_samples = CASES["streaming"]
    counted = counts(config_for(models, mode, sampling, DEVICE, **changes), random, num_samples)
    assert chi_square_p_value(counted, law) < P_VALUE_OF_A_WRONG_LAW
