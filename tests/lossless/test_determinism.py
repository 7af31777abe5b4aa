"""The same seed gives the same tokens, again and again, and in an engine that has served another prompt before."""

from __future__ import annotations

import pytest

from conf.schema import Coupling, Mode, SamplingConfig
from tests.support.tiny_models import random_prompt
from tests.support.tiny_runs import DEVICE, HOST, engine_for, generate, next_session, run_to_end, tiny_run

NUM_TOKENS = 16
SAMPLINGS = {
    "maximal": SamplingConfig(temperature=0.8, top_p=0.95),
    "block": SamplingConfig(temperature=0.8, top_p=0.95, block_verification=True),
    "gumbel": SamplingConfig(temperature=0.8, top_p=0.95, coupling=Coupling.gumbel),
}


def repeat(target, sampling: SamplingConfig, times: int) -> None:
    config, prompt = tiny_run(target, target, Mode.triforce, HOST, sampling=sampling), random_prompt(100)
    first = generate(config, prompt, NUM_TOKENS, seed=5)
    for _ in range(times - 1):
        again = generate(config, prompt, NUM_TOKENS, seed=5)
        assert again.tokens == first.tokens
        assert [one.proposed for one in again.rounds] == [one.proposed for one in first.rounds]
    assert generate(config, prompt, NUM_TOKENS, seed=6).tokens != first.tokens


@pytest.mark.parametrize("name", SAMPLINGS)
def test_the_same_seed_gives_the_same_tokens(checkpoints, name):
    repeat(checkpoints("llama"), SAMPLINGS[name], 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_the_same_seed_gives_the_same_tokens_twenty_times(checkpoints, family, name):
    repeat(checkpoints(family), SAMPLINGS[name], 20)


@pytest.mark.parametrize(("family", "tier"), [("llama", DEVICE), ("gemma2", HOST)])
@pytest.mark.parametrize("mode", list(Mode))
def test_a_second_prompt_gives_what_a_new_engine_gives(checkpoints, mode, family, tier):
    """Lengths, distributions and blocks too: nothing of the first prompt is left in any cache, at any level."""
    config = tiny_run(checkpoints(family), checkpoints(family, seed=1), mode, tier, sampling=SAMPLINGS["maximal"])
    first, second = random_prompt(150, seed=1), random_prompt(110, seed=2)
    fresh = generate(config, second, NUM_TOKENS)
    with engine_for(config, first, NUM_TOKENS) as engine:
        run_to_end(engine.hierarchy)
        hierarchy = next_session(engine.hierarchy, second, NUM_TOKENS)
        rounds = run_to_end(hierarchy)
        assert hierarchy.session.generated == fresh.tokens
    assert [one.proposed for one in rounds] == [one.proposed for one in fresh.rounds]
    assert [one.inner_steps for one in rounds] == [one.inner_steps for one in fresh.rounds]
    assert [one.rebuilt for one in rounds] == [one.rebuilt for one in fresh.rounds]


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_length_start_anew_with_each_prompt(checkpoints, rope_type):
    """transformers' own rotary module remembers the longest sequence it has met."""
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    if rope_type == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]}
    positions = {"max_position_embeddings": 64} if rope_type == "dynamic" else {}
    target = checkpoints("llama", rope_parameters=rope, **positions)
    config, first = tiny_run(target, target, window=30), random_prompt(150)
    for length in (80, 30):
        fresh = generate(config, random_prompt(length), NUM_TOKENS)
        with engine_for(config, first, NUM_TOKENS) as engine:
            run_to_end(engine.hierarchy)
            hierarchy = next_session(engine.hierarchy, random_prompt(length), NUM_TOKENS)
            run_to_end(hierarchy)
            assert hierarchy.session.generated == fresh.tokens
