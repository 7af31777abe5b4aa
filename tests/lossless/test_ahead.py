"""Drafting ahead leaves the target's law as it is: by enumeration, and by token equality.

A path that is used for the tokens on it must be seen to fail. How random numbers are keyed: test_distribution.py.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

import orchestrator.ahead
from conf.schema import Coupling, DecodingConfig, Mode, Overlap, SamplingConfig
from tests.lossless.test_enumeration import CLEARLY, SAMPLINGS, assert_exact, error
from tests.support.tiny_models import random_prompt
from tests.support.tiny_runs import DISK, engine_for, tiny_run
from tests.support.tiny_runs import generate as run_tiny
from tests.support.toy_models import LOOKUP, generate, make_setup
from workers.acceptance import GumbelCoupling, KeyedRandom, distribution
from workers.messages import Verdict

BLOCK = SamplingConfig(temperature=1.0, top_p=1.0, block_verification=True)
OVERLAPS = (Overlap.ahead, Overlap.outcomes)
WAYS = {
    "triforce": {"mode": Mode.triforce, "num_steps_ahead": 1},
    "retrieval": {"mode": Mode.retrieval, "gamma2": 2},
    "streaming": {"mode": Mode.streaming, "gamma2": 2, "num_steps_ahead": 1},
    "streaming_lookup": {"mode": Mode.streaming, "gamma2": 2, "drafter": LOOKUP, "prompt": (0, 1, 0, 0, 1, 1, 0, 1, 0)},
}


@pytest.mark.parametrize(("way", "overlap"), list(product(WAYS, OVERLAPS)))
@pytest.mark.parametrize("sampling", [*SAMPLINGS, "block"])
def test_three_tokens_of_two_symbols_have_exactly_the_targets_law(way, overlap, sampling):
    assert_exact(make_setup(2, overlap=overlap, sampling=(SAMPLINGS | {"block": BLOCK})[sampling], **WAYS[way]), 3)


@pytest.mark.parametrize("num_steps", [0, 1, 4])
@pytest.mark.parametrize("overlap", OVERLAPS)
def test_however_long_a_verification_takes(num_steps, overlap):
    assert_exact(make_setup(2, overlap=overlap, num_steps_ahead=num_steps, mode=Mode.retrieval), 4)


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_with_rebuilds_between_the_drafting_and_the_use(overlap):
    setup = make_setup(2, overlap=overlap, mode=Mode.retrieval, rebuild=1)
    tables = (setup.retrieval, setup.retrieval.flip(1))
    assert_exact(setup.but(retrieval=tables), 4)


def test_negative_control_a_path_that_is_used_for_the_tokens_on_it(monkeypatch):
    """Whether a draft is used must not depend on its own tokens: those dropped would be missing from the law."""
    right = orchestrator.ahead._Path.follows

    def follows(self, verdict: Verdict) -> bool:
        return right(self, verdict) and self.continuation().tokens[:1] == [0]

    monkeypatch.setattr(orchestrator.ahead._Path, "follows", follows)
    setup = make_setup(2, overlap=Overlap.ahead, num_steps_ahead=3, mode=Mode.retrieval)
    assert error(setup, 4) > CLEARLY


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_under_gumbel_coupling_the_tokens_are_those_of_decoding_alone(seed, temperature, overlap):
    sampling = SamplingConfig(temperature=temperature, top_p=0.9, coupling=Coupling.gumbel)
    alone = make_setup(5, seed=seed, sampling=sampling, mode=Mode.autoregressive, max_new_tokens=60)
    wanted = generate(alone.build(KeyedRandom(seed)))
    for mode, num_steps in product((Mode.triforce, Mode.retrieval, Mode.streaming), (1, 3, 12)):
        setup = alone.but(mode=mode, gamma1=2, gamma2=4, overlap=overlap, num_steps_ahead=num_steps)
        assert generate(setup.build(KeyedRandom(seed))) == wanted


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_paths_are_hit_and_blocks_begin_with_them(overlap):
    sampling = SamplingConfig(temperature=1.0, top_p=1.0, coupling=Coupling.gumbel)
    setup = make_setup(5, sampling=sampling, mode=Mode.retrieval, gamma2=4, overlap=overlap, num_steps_ahead=24)
    hierarchy = setup.but(max_new_tokens=200).build(KeyedRandom(1))
    rounds = [hierarchy.start()]
    while not hierarchy.session.is_finished:
        rounds.append(hierarchy.round())
    hits = [record.ahead for record in rounds[1:] if record.ahead.is_hit]
    assert len(hits) > len(rounds) / 4
    assert all(record.ahead.num_steps <= 24 for record in rounds[1:])
    for before, record in zip(rounds[1:-2], rounds[2:-1], strict=True):
        assert len(record.proposed) >= before.ahead.num_tokens


def test_runners_up_are_second_places():
    torch.manual_seed(0)
    random, sampling = KeyedRandom(3), SamplingConfig(temperature=1.0, top_p=1.0, coupling=Coupling.gumbel)
    coupling, logits = GumbelCoupling(sampling, random), torch.randn(3, 7)
    scores = torch.stack([random.scores(row, 10 + i) for i, row in enumerate(distribution(logits, sampling))])
    order = scores.argsort(-1, descending=True)
    runners_up, closeness = coupling.runners_up(logits, order[:, 0].tolist(), 10)
    assert runners_up == order[:, 1].tolist()
    assert all(0 <= share <= 1 for share in closeness)


# ---- The real engine, whose target verifies in a thread of its own. ----


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("mode", [Mode.triforce, Mode.retrieval, Mode.streaming])
def test_the_engine_gives_the_tokens_of_decoding_alone(checkpoints, mode, overlap):
    sampling = SamplingConfig(temperature=0.8, top_p=0.9, coupling=Coupling.gumbel)
    config = tiny_run(checkpoints("llama"), checkpoints("llama", seed=1), mode, DISK, sampling=sampling)
    wanted = run_tiny(replace(config, decoding=DecodingConfig(mode=Mode.autoregressive)), random_prompt(90), 16).tokens
    result = run_tiny(replace(config, decoding=replace(config.decoding, overlap=overlap)), random_prompt(90), 16)
    assert result.tokens == wanted
    assert any(record.ahead.num_steps for record in result.rounds[1:])


@pytest.mark.parametrize("block_verification", [False, True])
def test_roles_that_work_at_the_same_time_draw_from_sources_of_their_own(checkpoints, block_verification):
    """One source would give the target's verdict the round of whatever is drafted meanwhile."""
    sampling = SamplingConfig(temperature=1.0, block_verification=block_verification)
    config = tiny_run(checkpoints("llama"), checkpoints("llama", seed=1), sampling=sampling)
    config.decoding.overlap = Overlap.ahead
    with engine_for(config, random_prompt(40), 8) as engine:
        roles = (engine.hierarchy.verifier, engine.hierarchy.retriever, engine.hierarchy.drafter)
        assert len({id(role._coupling._random) for role in roles}) == 3


def test_without_a_retrieval_draft_the_drafter_names_the_runners_up(checkpoints):
    config = tiny_run(checkpoints("llama"), checkpoints("llama", seed=1), Mode.streaming)
    config.decoding.overlap = Overlap.outcomes
    with engine_for(config, random_prompt(40), 8) as engine:
        engine.hierarchy.start()
        draft = engine.hierarchy.drafter.propose([], 3)
        assert len(draft.runners_up) == len(draft.closeness) == 3
