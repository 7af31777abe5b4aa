"""With the gumbel coupling, sampled tokens are those of autoregressive decoding with the same seed, in every mode."""

from __future__ import annotations

import pytest

from conf.schema import LOOKUP_DRAFTER, Coupling, Mode, SamplingConfig
from tests.support.tiny_models import random_prompt
from tests.support.tiny_runs import CHUNK, DEVICE, DISK, HOST, generate, tiny_run

GUMBEL = SamplingConfig(temperature=0.8, top_p=0.9, coupling=Coupling.gumbel)
NUM_TOKENS = 24
FAMILIES = ["llama", "gemma2"]
SEEDS = range(3)


def prompt_for(seed: int) -> list[int]:
    return random_prompt(60 + 17 * seed, seed=seed)


@pytest.fixture(scope="module")
def wanted(checkpoints):
    """By family and seed."""
    runs = {family: tiny_run(checkpoints(family), mode=Mode.autoregressive, sampling=GUMBEL) for family in FAMILIES}
    return {
        (family, seed): generate(config, prompt_for(seed), NUM_TOKENS, seed).tokens
        for family, config in runs.items()
        for seed in SEEDS
    }


@pytest.mark.parametrize("tier", [DEVICE, HOST, DISK])
@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("family", FAMILIES)
def test_every_mode_gives_the_tokens_of_autoregressive_decoding(checkpoints, wanted, family, mode, tier):
    for seed in SEEDS:
        drafter = (checkpoints(family, seed=1), checkpoints(family), LOOKUP_DRAFTER)[seed % 3]
        knobs = {"gamma1": 1 + seed, "gamma2": 2 + 2 * seed, "budget": 2 * CHUNK}
        config = tiny_run(checkpoints(family), drafter, mode, tier, sampling=GUMBEL, **knobs)
        assert generate(config, prompt_for(seed), NUM_TOKENS, seed).tokens == wanted[family, seed], seed


def test_tokens_depend_on_the_seed(checkpoints, wanted):
    config = tiny_run(checkpoints("llama"), mode=Mode.autoregressive, sampling=GUMBEL)
    assert generate(config, prompt_for(0), NUM_TOKENS, seed=1).tokens != wanted["llama", 0]


def test_a_drafter_that_is_the_target_is_always_right(checkpoints):
    """It draws the same tokens from the same noise."""
    target = checkpoints("llama")
    config = tiny_run(target, target, Mode.triforce, HOST, sampling=GUMBEL, budget=4096, window=300)
    result = generate(config, prompt_for(0), NUM_TOKENS)
    assert result.num_proposed == result.num_accepted > 0
    assert all(proposed == accepted for proposed, accepted in result.inner_steps)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_every_mode_over_many_seeds(checkpoints, seed):
    target, prompt = checkpoints("qwen3"), random_prompt(200, seed=seed)
    plain = tiny_run(target, mode=Mode.autoregressive, sampling=GUMBEL)
    wanted = generate(plain, prompt, 128, seed).tokens
    for mode in (Mode.triforce, Mode.retrieval, Mode.streaming):
        config = tiny_run(target, checkpoints("qwen3", seed=1), mode, HOST, sampling=GUMBEL)
        assert generate(config, prompt, 128, seed).tokens == wanted, mode
