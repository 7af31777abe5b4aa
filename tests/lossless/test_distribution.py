"""The real loop with the real random numbers, over many seeds: a chi-square test against the target's law.

Enumeration (test_enumeration.py) takes decisions for independent; whether they are is up to how the random numbers
are keyed, which only this test sees. Vocabulary 10; the target alone draws the first token, which is certain here, so
the cells are the first two tokens that come from drafts, replacements and bonuses. Three batches of fixed seeds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch

from conf.schema import Coupling, Mode, Overlap, SamplingConfig
from tests.lossless.wrong_rules import (
    BonusFromThePositionBefore,
    ProposalStoredUncut,
    SwappedRatio,
    TriForceRule,
    making,
)
from tests.support.toy_models import (
    DRAFTER_LEVEL,
    EXACT,
    LOOKUP,
    RETRIEVAL_LEVEL,
    TARGET_LEVEL,
    Setup,
    generate,
    make_setup,
    target_law,
)
from workers.acceptance import ACCEPT, CHOOSE, NUM_PURPOSES, RACE, REPLACE, KeyedRandom

VOCAB_SIZE = 10
NUM_TOKENS = 3
P_VALUE_BELOW_WHICH_TO_FAIL = 1e-3
P_VALUE_OF_A_WRONG_LAW = 1e-9
NUM_SEQUENCES, NUM_SEQUENCES_OF_A_CONTROL, NUM_SEQUENCES_SLOW = 1_000, 2_000, 200_000
BATCHES = range(3)

DEFAULT = SamplingConfig(temperature=0.6, top_p=0.9)
TOP_P = SamplingConfig(temperature=1.0, top_p=0.6)
BLOCK = SamplingConfig(temperature=1.0, top_p=1.0, block_verification=True)
GUMBEL = SamplingConfig(temperature=1.0, top_p=1.0, coupling=Coupling.gumbel)
GUMBEL_TOP_P = SamplingConfig(temperature=0.6, top_p=0.9, coupling=Coupling.gumbel)


def setup_for(mode: Mode, sampling: SamplingConfig = EXACT, **changes) -> Setup:
    setup = make_setup(VOCAB_SIZE, order=1, seed=20, mode=mode, sampling=sampling, prompt=(1, 0), **changes)
    setup.target[0] = -torch.inf
    setup.target[0, 1] = 0.0
    return setup


def redrafting_setup() -> Setup:
    """Here the first draft (0 or 1, after 2) is rejected if the second one is a 0, whose place is drafted again."""
    target = torch.tensor([[0, 1, 0, 0], [0.5, 0.5, 0, 0], [0.25, 0.75, 0, 0], [0, 0, 1, 0]], dtype=torch.float64).log()
    draft = torch.tensor([[0.5, 0.5, 0, 0]] * 4, dtype=torch.float64).log()
    return Setup(
        target=target, retrieval=draft, drafter=draft, mode=Mode.streaming, gamma2=2, sampling=BLOCK, prompt=(0, 3)
    )


STREAMING = setup_for(Mode.streaming)
STREAMING_2 = setup_for(Mode.streaming, gamma2=2)
TRIFORCE = setup_for(Mode.triforce)
SETUPS = {
    "triforce": TRIFORCE,
    "triforce_2_2": setup_for(Mode.triforce, gamma1=2, gamma2=2),
    "triforce_default": setup_for(Mode.triforce, DEFAULT, gamma1=2, gamma2=2, rebuild=1),
    "triforce_block": setup_for(Mode.triforce, BLOCK, gamma1=2, gamma2=2),
    "retrieval": setup_for(Mode.retrieval, gamma2=2),
    "streaming": STREAMING,
    "streaming_2": STREAMING_2,
    "streaming_default": setup_for(Mode.streaming, DEFAULT, gamma2=2),
    "streaming_block": setup_for(Mode.streaming, BLOCK, gamma2=3),
    "streaming_block_redrafting": redrafting_setup(),
    "streaming_top_p": setup_for(Mode.streaming, TOP_P, gamma2=2),
    "streaming_lookup": setup_for(Mode.streaming, drafter=LOOKUP, gamma2=2).but(prompt=(1, 2, 3, 1, 5, 0, 1, 2, 0)),
    "triforce_ahead": setup_for(Mode.triforce, gamma1=2, gamma2=2, overlap=Overlap.ahead),
    "triforce_outcomes": setup_for(Mode.triforce, DEFAULT, gamma2=2, overlap=Overlap.outcomes, num_steps_ahead=5),
    "streaming_block_outcomes": setup_for(Mode.streaming, BLOCK, gamma2=3, overlap=Overlap.outcomes, num_steps_ahead=4),
    "autoregressive": setup_for(Mode.autoregressive),
    "gumbel": setup_for(Mode.triforce, GUMBEL, gamma1=2, gamma2=2),
    "gumbel_default": setup_for(Mode.streaming, GUMBEL_TOP_P, gamma2=2),
}


def first_tokens(setup: Setup, seed: int, make_random: Callable[[int], KeyedRandom]) -> tuple[int, ...]:
    hierarchy = setup.build(make_random(seed))
    hierarchy.start()
    while len(hierarchy.session.generated) < NUM_TOKENS:
        hierarchy.round()
    return tuple(hierarchy.session.generated[:NUM_TOKENS])


def p_value(
    setup: Setup,
    batch: int,
    num_sequences: int = NUM_SEQUENCES,
    make_random: Callable[[int], KeyedRandom] = KeyedRandom,
) -> float:
    """Of the chi-square test that the first tokens over a batch of seeds have the target's law."""
    seeds = range(batch * num_sequences, (batch + 1) * num_sequences)
    counts = Counter(first_tokens(setup, seed, make_random) for seed in seeds)
    return chi_square_p_value(counts, target_law(setup, NUM_TOKENS))


def chi_square_p_value(counts: Counter, law: dict[tuple[int, ...], float]) -> float:
    """Cells with an expectation below 5 are merged; a count where the law has none is impossible."""
    if counts.keys() - law.keys():
        return 0.0
    num_sequences = counts.total()
    expected, observed = [0.0], [0]  # the first cell takes what is rare
    for tokens, weight in law.items():
        if weight * num_sequences < 5:
            expected[0] += weight * num_sequences
            observed[0] += counts[tokens]
        else:
            expected.append(weight * num_sequences)
            observed.append(counts[tokens])
    if expected[0] < 5:
        expected[:2], observed[:2] = [sum(expected[:2])], [sum(observed[:2])]
    statistic = sum((seen - mean) ** 2 / mean for seen, mean in zip(observed, expected, strict=True))
    half = torch.tensor([len(expected) - 1, statistic], dtype=torch.float64) / 2
    return float(torch.special.gammaincc(half[0], half[1]))


def test_chi_square_p_values_are_those_of_the_tables():
    """0.05 at 3.841 with one degree of freedom."""
    law = {(0,): 0.5, (1,): 0.5}
    deviation = (3.841 * 1e6 / 4) ** 0.5
    counts = Counter({(0,): round(5e5 + deviation), (1,): round(5e5 - deviation)})
    assert chi_square_p_value(counts, law) == pytest.approx(0.05, abs=1e-3)
    assert chi_square_p_value(Counter({(0,): 50, (2,): 50}), law) == 0


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", SETUPS)
def test_the_first_tokens_have_the_targets_law(name, batch):
    assert p_value(SETUPS[name], batch, NUM_SEQUENCES) > P_VALUE_BELOW_WHICH_TO_FAIL


@pytest.mark.slow
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", SETUPS)
def test_the_first_tokens_of_many_sequences_have_the_targets_law(name, batch):
    assert p_value(SETUPS[name], batch, NUM_SEQUENCES_SLOW) > P_VALUE_BELOW_WHICH_TO_FAIL


@pytest.mark.parametrize("name", ["gumbel", "gumbel_default"])
@pytest.mark.parametrize("mode", [Mode.triforce, Mode.retrieval, Mode.streaming])
@pytest.mark.parametrize(("gamma1", "gamma2"), [(1, 1), (3, 2), (2, 7)])
def test_gumbel_tokens_are_those_of_autoregressive_decoding_for_each_seed(name, mode, gamma1, gamma2):
    plain = SETUPS[name].but(mode=Mode.autoregressive, max_new_tokens=24)
    drafting = plain.but(mode=mode, gamma1=gamma1, gamma2=gamma2, rebuild=2, tail_tokens=5)
    for seed in range(20):
        tokens = generate(plain.build(KeyedRandom(seed)))
        assert generate(drafting.build(KeyedRandom(seed))) == tokens
        assert generate(drafting.but(drafter=LOOKUP).build(KeyedRandom(seed))) == tokens


def test_maximal_tokens_do_depend_on_the_drafts():
    """So the equality above is the coupling's doing."""
    plain = STREAMING_2.but(mode=Mode.autoregressive, max_new_tokens=24)
    assert generate(plain.build(KeyedRandom(0))) != generate(STREAMING_2.but(max_new_tokens=24).build(KeyedRandom(0)))


# Negative controls: random numbers keyed wrongly.


class OneNumberForAcceptAndReplace(KeyedRandom):
    def uniform(self, position: int, purpose: int) -> float:
        return super().uniform(position, purpose - REPLACE + ACCEPT if purpose % NUM_PURPOSES == REPLACE else purpose)


class OneNumberForDraftAndAccept(KeyedRandom):
    """The draft's number is used again to judge it."""

    def uniform(self, position: int, purpose: int) -> float:
        return super().uniform(position, CHOOSE if purpose % NUM_PURPOSES in (CHOOSE, ACCEPT) else purpose)


class OneNumberForAllLevels(KeyedRandom):
    def uniform(self, position: int, purpose: int) -> float:
        return super().uniform(position, purpose % NUM_PURPOSES)


class OneNumberForAllPositions(KeyedRandom):
    def uniform(self, position: int, purpose: int) -> float:
        return super().uniform(0, purpose)


class OneNumberForAllRounds(KeyedRandom):
    def start_round(self, index: int) -> None:
        super().start_round(0)


class OneRaceForAllPositions(KeyedRandom):
    def race(self, probs: torch.Tensor, position: int) -> int:
        return super().race(probs, 0)


class RaceWithoutNoise(KeyedRandom):
    """Uniform numbers in place of exponential ones."""

    def race(self, probs: torch.Tensor, position: int) -> int:
        noise = self._generator(position, RACE, 0).random(len(probs))
        return int((probs / torch.from_numpy(noise)).argmax())


KEYINGS = {
    "one_number_for_accept_and_replace": (OneNumberForAcceptAndReplace, STREAMING),
    "one_number_for_draft_and_accept": (OneNumberForDraftAndAccept, STREAMING),
    "one_number_for_all_levels": (OneNumberForAllLevels, TRIFORCE),
    "one_number_for_all_positions": (OneNumberForAllPositions, STREAMING_2),
    "one_number_for_all_rounds_in_block_verification": (OneNumberForAllRounds, SETUPS["streaming_block_redrafting"]),
    "one_race_for_all_positions": (OneRaceForAllPositions, SETUPS["gumbel"]),
    "a_race_without_exponential_noise": (RaceWithoutNoise, SETUPS["gumbel"]),
}


@pytest.mark.parametrize("name", KEYINGS)
def test_control_wrongly_keyed_random_numbers_are_seen(name):
    wrong, setup = KEYINGS[name]
    assert p_value(setup, 0, NUM_SEQUENCES_OF_A_CONTROL, wrong) < P_VALUE_OF_A_WRONG_LAW


RULES = {
    "triforce_rule": (TriForceRule, RETRIEVAL_LEVEL, TRIFORCE),
    "missing_residual": (TriForceRule, TARGET_LEVEL, STREAMING),
    "swapped": (SwappedRatio, TARGET_LEVEL, STREAMING),
    "bonus_from_the_position_before": (BonusFromThePositionBefore, TARGET_LEVEL, STREAMING),
    "proposal_stored_uncut": (ProposalStoredUncut, DRAFTER_LEVEL, SETUPS["streaming_top_p"]),
}


@pytest.mark.parametrize("name", RULES)
def test_control_a_wrong_rule_is_seen(name):
    wrong, level, setup = RULES[name]
    assert p_value(setup.but(make=making(wrong, level)), 0, NUM_SEQUENCES_OF_A_CONTROL) < P_VALUE_OF_A_WRONG_LAW
