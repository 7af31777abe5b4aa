"""The real loop over toy models, all branches walked: its output has exactly the target's law.

Each wrong rule below is one that published code contains or that is easily written; each must be seen to fail.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch

import workers.acceptance
from conf.schema import Mode, SamplingConfig
from orchestrator.hierarchy import Hierarchy
from tests.lossless.wrong_rules import (
    AlwaysAccepting,
    BlockWithTokenResidual,
    BonusFromThePositionBefore,
    CutByTheTokenDropped,
    HandingUpTheRowBefore,
    ProposalDrawnUncut,
    ProposalStoredUncut,
    RowsShiftedByOne,
    SwappedRatio,
    TriForceRule,
    making,
)
from tests.support.enumeration import joint_law, outcomes
from tests.support.toy_models import (
    DRAFTER_LEVEL,
    EXACT,
    LOOKUP,
    RETRIEVAL_LEVEL,
    TARGET_LEVEL,
    MarkovModel,
    Setup,
    generate,
    make_setup,
    nearby_table,
    random_table,
    target_law,
    total_variation,
)
from workers.acceptance import residual

EXACTLY = 1e-12
CLEARLY = 1e-3

GREEDY = SamplingConfig(temperature=0.0, top_p=1.0)
TOP_P = SamplingConfig(temperature=1.0, top_p=0.8)
TOP_K = SamplingConfig(temperature=1.0, top_p=1.0, top_k=2)
SAMPLINGS = {
    "T1": EXACT,
    "top_p": TOP_P,
    "top_k": TOP_K,
    "T06_top_p": SamplingConfig(temperature=0.6, top_p=0.9),
    "greedy": GREEDY,
}
BLOCK = {
    "block": SamplingConfig(temperature=1.0, top_p=1.0, block_verification=True),
    "block_top_p": SamplingConfig(temperature=1.0, top_p=0.8, block_verification=True),
    "block_top_k": SamplingConfig(temperature=1.0, top_p=1.0, top_k=2, block_verification=True),
}
WAYS = {
    "triforce_1_1": {"mode": Mode.triforce, "gamma1": 1, "gamma2": 1},
    "triforce_1_2": {"mode": Mode.triforce, "gamma1": 1, "gamma2": 2},
    "triforce_2_1": {"mode": Mode.triforce, "gamma1": 2, "gamma2": 1},
    "triforce_2_2": {"mode": Mode.triforce, "gamma1": 2, "gamma2": 2},
    "triforce_no_gamma1": {"mode": Mode.triforce, "gamma1": 0, "gamma2": 2},
    "triforce_lookup": {"mode": Mode.triforce, "gamma1": 2, "gamma2": 2, "drafter": LOOKUP},
    "retrieval_1": {"mode": Mode.retrieval, "gamma2": 1},
    "retrieval_2": {"mode": Mode.retrieval, "gamma2": 2},
    "streaming_1": {"mode": Mode.streaming, "gamma2": 1},
    "streaming_3": {"mode": Mode.streaming, "gamma2": 3},
    "streaming_lookup": {"mode": Mode.streaming, "gamma2": 2, "drafter": LOOKUP},
    "autoregressive": {"mode": Mode.autoregressive},
}
LOOKUP_PROMPT = (0, 1, 0, 0, 1, 1, 0, 1, 0, 0)


def assert_exact(setup: Setup, num_tokens: int) -> None:
    law = joint_law(setup, num_tokens)
    assert abs(sum(law.values()) - 1) < EXACTLY
    assert total_variation(law, target_law(setup, num_tokens)) < EXACTLY


def error(setup: Setup, num_tokens: int = 3) -> float:
    """How wrong the joint law is: total variation, or the missing or excess probability if that is more."""
    law = joint_law(setup, num_tokens)
    return max(total_variation(law, target_law(setup, num_tokens)), abs(sum(law.values()) - 1))


def setup_for(way: str, sampling: SamplingConfig, vocab_size: int, **changes) -> Setup:
    prompt = LOOKUP_PROMPT if "lookup" in way else (0, 1, 0)
    return make_setup(vocab_size, **{"sampling": sampling, "prompt": prompt, **WAYS[way], **changes})


@pytest.mark.parametrize(("way", "sampling"), list(product(WAYS, SAMPLINGS | BLOCK)))
def test_three_tokens_of_two_symbols_have_exactly_the_targets_law(way, sampling):
    assert_exact(setup_for(way, (SAMPLINGS | BLOCK)[sampling], 2), 3)


LENGTHS_WITH_BONUS = {"triforce_1_1": 4, "triforce_1_2": 5, "retrieval_2": 4, "streaming_3": 5, "streaming_lookup": 4}


@pytest.mark.parametrize("sampling", ["T1", "block"])
@pytest.mark.parametrize("way", LENGTHS_WITH_BONUS)
def test_the_law_is_exact_up_to_the_token_after_the_longest_block(way, sampling):
    """The target alone gives the first token, so a block is tokens 2 to n + 1 and the bonus is token n + 2."""
    assert_exact(setup_for(way, (SAMPLINGS | BLOCK)[sampling], 2), LENGTHS_WITH_BONUS[way])


SMALL_WAYS = [way for way in WAYS if way != "triforce_2_2"]


@pytest.mark.parametrize(("way", "sampling"), list(product(SMALL_WAYS, SAMPLINGS | BLOCK)))
def test_two_tokens_of_three_symbols_have_exactly_the_targets_law(way, sampling):
    assert_exact(setup_for(way, (SAMPLINGS | BLOCK)[sampling], 3), 2)


@pytest.mark.parametrize("sampling", ["top_p", "top_k", "T06_top_p", "block_top_k"])
@pytest.mark.parametrize("way", SMALL_WAYS)
def test_three_tokens_of_three_symbols_have_exactly_the_targets_law_where_it_is_cut_off(way, sampling):
    assert_exact(setup_for(way, (SAMPLINGS | BLOCK)[sampling], 3), 3)


@pytest.mark.parametrize("block_verification", [False, True])
@pytest.mark.parametrize("mode", [Mode.triforce, Mode.retrieval, Mode.streaming])
@pytest.mark.parametrize("seed", range(10, 15))
def test_whatever_the_models_the_law_is_the_targets(seed, mode, block_verification):
    sampling = SamplingConfig(temperature=1.0, top_p=1.0, block_verification=block_verification)
    assert_exact(make_setup(3, seed=seed, mode=mode, sampling=sampling), 3)


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4])
@pytest.mark.parametrize("way", ["triforce_2_2", "retrieval_2", "streaming_3"])
def test_the_law_is_exact_up_to_the_last_token_of_a_session(way, num_tokens):
    """Blocks get shorter there."""
    assert_exact(setup_for(way, EXACT, 2, max_new_tokens=num_tokens), num_tokens)


@pytest.mark.parametrize("rebuild", ["never", "adaptive", 1, 2])
@pytest.mark.parametrize("tail_tokens", [0, 2, 1000])
@pytest.mark.parametrize("mode", [Mode.triforce, Mode.retrieval])
def test_the_law_is_exact_whenever_the_retrieval_cache_is_rebuilt(mode, tail_tokens, rebuild):
    """Here each rebuild makes another retrieval model."""
    setup = make_setup(2, mode=mode, rebuild=rebuild, tail_tokens=tail_tokens)
    tables = (setup.retrieval, nearby_table(setup.target, 5), random_table(4, 2, 6))
    assert_exact(setup.but(retrieval=tables), 4)


@pytest.mark.parametrize("prompt", [(1,), (0, 1), (1, 1, 0, 1)])
@pytest.mark.parametrize("way", ["triforce_1_2", "retrieval_2", "streaming_3"])
def test_the_law_is_exact_after_short_prompts(way, prompt):
    assert_exact(setup_for(way, EXACT, 2, prompt=prompt), 3)


@pytest.mark.parametrize("way", ["triforce_1_2", "retrieval_2", "streaming_3"])
@pytest.mark.parametrize("sampling", [EXACT, TOP_K, BLOCK["block"]], ids=["T1", "top_k", "block"])
def test_the_law_is_exact_where_the_models_exclude_each_others_tokens(way, sampling):
    """Exact zeros: of the target where drafts are likely, of the drafts where the target is likely."""
    setup = setup_for(way, sampling, 3)
    target, retrieval, drafter = setup.target.clone(), setup.retrieval.clone(), setup.drafter.clone()
    target[:, 0] = -torch.inf
    retrieval[::2, 1] = -torch.inf
    drafter[1::2, 2] = -torch.inf
    assert_exact(setup.but(target=target, retrieval=retrieval, drafter=drafter), 2)


@pytest.mark.parametrize("sampling", [EXACT, BLOCK["block"]], ids=["token", "block"])
@pytest.mark.parametrize("mode", [Mode.triforce, Mode.retrieval, Mode.streaming])
def test_equal_models_accept_everything_and_stay_exact(mode, sampling):
    table = random_table(9, 3, 3)
    setup = Setup(target=table, retrieval=table, drafter=table, mode=mode, sampling=sampling)
    assert_exact(setup, 3)
    rounds = [hierarchy for _, _, hierarchy in outcomes(setup.build, [], 1)]
    num_block = 2 if mode is Mode.triforce else 1
    assert {len(hierarchy.session.generated) for hierarchy in rounds} == {1 + num_block + 1}


@pytest.mark.parametrize("vocab_size", [2, 4])
def test_a_drafter_with_another_vocabulary_size_stays_exact(vocab_size):
    """Smaller: ids it lacks are drawn from the residual. Larger: it never drafts ids that the target lacks."""
    for mode in (Mode.streaming, Mode.triforce):
        for sampling in (EXACT, TOP_P, BLOCK["block"]):
            setup = make_setup(3, mode=mode, sampling=sampling, order=1)
            assert_exact(setup.but(drafter=random_table(3, vocab_size, 8)), 3)


class NotFiniteAfter(MarkovModel):
    """Its logits are all `value` after `token`."""

    token, value = 0, torch.nan

    def append(self, tokens: list[int], num_logits: int) -> torch.Tensor:
        logits = super().append(tokens, num_logits)
        return torch.full_like(logits, self.value) if self.tokens[-1] == self.token else logits


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("mode", [Mode.streaming, Mode.triforce])
@pytest.mark.parametrize("sampling", [EXACT, BLOCK["block"], GREEDY], ids=["token", "block", "greedy"])
def test_a_drafter_whose_logits_are_not_finite_costs_speed_only(mode, sampling, value):
    def broken(model: MarkovModel) -> MarkovModel:
        model.__class__ = type("Broken", (NotFiniteAfter,), {"value": value, "token": most_likely_first})
        return model

    gamma2 = 1 if mode is Mode.triforce else 2
    setup = make_setup(2, mode=mode, gamma1=2, gamma2=gamma2, sampling=sampling, wrap_drafter=broken)
    most_likely_first = int(MarkovModel(setup.target).logits_after(list(setup.prompt)).argmax())
    assert_exact(setup, 3)
    failures = [hierarchy.drafter.num_failures for _, _, hierarchy in outcomes(setup.build, [], 2)]
    assert max(failures) > 0


def test_greedy_decoding_takes_one_path_that_is_autoregressive_decodings():
    for way in WAYS:
        setup = setup_for(way, GREEDY, 3, max_new_tokens=40)
        assert generate(setup.build(NoRandom())) == generate(setup.but(mode=Mode.autoregressive).build(NoRandom()))


class NoRandom:
    """Has no random numbers to give."""

    def start_round(self, index: int) -> None:
        pass


# The rule that block verification rests on: where a block ends may follow from its tokens, not from later ones.


@pytest.mark.parametrize(("gamma1", "gamma2"), [(2, 2), (2, 1), (1, 2)])
def test_block_verification_is_exact_for_blocks_that_end_where_an_inner_step_ends(gamma1, gamma2):
    setup = make_setup(2, gamma1=gamma1, gamma2=gamma2, sampling=BLOCK["block"])
    assert_exact(setup, 3)


@pytest.mark.parametrize("block", [False, True])
def test_control_a_draft_cut_by_the_token_it_drops_is_seen(block):
    sampling = BLOCK["block"] if block else EXACT
    setup = make_setup(3, mode=Mode.streaming, gamma2=2, sampling=sampling)
    assert error(setup) < EXACTLY
    assert error(setup.but(make=making(CutByTheTokenDropped, TARGET_LEVEL))) > CLEARLY


# Negative controls.


CONTROLS = {
    "triforce_rule": (TriForceRule, RETRIEVAL_LEVEL, "triforce_1_1", EXACT),
    "missing_residual": (TriForceRule, TARGET_LEVEL, "streaming_1", EXACT),
    "swapped_at_the_target": (SwappedRatio, TARGET_LEVEL, "streaming_1", EXACT),
    "swapped_at_the_retrieval_draft": (SwappedRatio, RETRIEVAL_LEVEL, "triforce_1_1", EXACT),
    "swapped_in_block_verification": (SwappedRatio, TARGET_LEVEL, "streaming_3", BLOCK["block"]),
    "always_accepting_at_the_target": (AlwaysAccepting, TARGET_LEVEL, "streaming_1", EXACT),
    "always_accepting_at_the_retrieval_draft": (AlwaysAccepting, RETRIEVAL_LEVEL, "triforce_1_1", EXACT),
    "bonus_from_the_position_before": (BonusFromThePositionBefore, TARGET_LEVEL, "streaming_1", EXACT),
    "bonus_from_the_position_before_in_a_block": (
        BonusFromThePositionBefore,
        TARGET_LEVEL,
        "streaming_3",
        BLOCK["block"],
    ),
    "reported_row_off_by_one": (HandingUpTheRowBefore, RETRIEVAL_LEVEL, "triforce_1_1", EXACT),
    "rows_shifted_by_one": (RowsShiftedByOne, TARGET_LEVEL, "streaming_1", EXACT),
    "proposal_stored_uncut": (ProposalStoredUncut, DRAFTER_LEVEL, "streaming_1", TOP_P),
    "proposal_stored_uncut_top_k": (ProposalStoredUncut, DRAFTER_LEVEL, "triforce_1_1", TOP_K),
    "proposal_drawn_uncut": (ProposalDrawnUncut, DRAFTER_LEVEL, "streaming_1", TOP_K),
    "block_with_token_residual": (BlockWithTokenResidual, TARGET_LEVEL, "streaming_3", BLOCK["block"]),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_control_a_wrong_rule_is_seen(name):
    wrong, level, way, sampling = CONTROLS[name]
    setup, num_tokens = setup_for(way, sampling, 3), 3
    if way == "streaming_3":
        setup, num_tokens = setup.but(gamma2=2), 4
    assert error(setup, num_tokens) < EXACTLY
    assert error(setup.but(make=making(wrong, level)), num_tokens) > CLEARLY


def test_control_the_triforce_rule_cannot_be_seen_in_greedy_decoding():
    """So equality of greedy tokens proves nothing about sampling."""
    setup = setup_for("triforce_1_1", SamplingConfig(temperature=1e-4, top_p=1.0), 3)
    assert error(setup.but(make=making(TriForceRule, RETRIEVAL_LEVEL))) < EXACTLY


def test_control_a_residual_that_is_not_normalised_is_seen(monkeypatch):
    def unnormalised(target_probs, draft_probs):
        return (target_probs - draft_probs).clamp_min(0)

    monkeypatch.setattr(workers.acceptance, "residual", unnormalised)
    assert abs(sum(joint_law(setup_for("streaming_1", EXACT, 3), 2).values()) - 1) > CLEARLY


def test_control_a_swapped_residual_is_seen(monkeypatch):
    def swapped(target_probs, draft_probs):
        return residual(draft_probs, target_probs)

    monkeypatch.setattr(workers.acceptance, "residual", swapped)
    assert error(setup_for("streaming_1", EXACT, 3)) > CLEARLY


@pytest.mark.parametrize("mode", [Mode.triforce, Mode.streaming])
def test_control_a_target_cache_that_is_not_rolled_back_is_seen(mode):
    class NeverRolledBack(MarkovModel):
        def truncate(self, length: int) -> None:
            """Keeps the rejected tokens."""

    def forgetful(model: MarkovModel) -> MarkovModel:
        model.__class__ = NeverRolledBack
        return model

    assert error(make_setup(3, mode=mode, wrap_target=forgetful)) > CLEARLY


def test_control_a_target_that_reads_the_retrieval_cache_is_seen():
    setup = make_setup(3)
    assert total_variation(joint_law(setup, 2), target_law(setup.but(target=setup.retrieval), 2)) > CLEARLY


class PaceByOutcomes:
    """γ1 and γ2 follow from how the earlier rounds went; see orchestrator.pace.AdaptivePace."""

    def __init__(self):
        self.gamma1, self.gamma2, self.budget, self.last_accepted, self.wants = 1, 1, None, 0, False

    def choose(self) -> None:
        self.gamma1, self.gamma2 = ((0, 1), (1, 1), (0, 2))[min(self.last_accepted, 2)]

    def wants_rebuild(self) -> bool:
        return self.wants

    def learn(self, round_) -> None:
        self.last_accepted, self.wants = round_.num_accepted, bool(round_.proposed) and not round_.num_accepted


@pytest.mark.parametrize("sampling", [EXACT, TOP_P], ids=["T1", "top_p"])
@pytest.mark.parametrize("mode", [Mode.triforce, Mode.retrieval, Mode.streaming])
def test_a_pace_that_follows_earlier_rounds_keeps_the_law(mode, sampling):
    setup = make_setup(2, mode=mode, sampling=sampling, make_pace=PaceByOutcomes, max_new_tokens=6)
    assert total_variation(joint_law(setup, 4), target_law(setup, 4)) < EXACTLY


def test_control_a_block_that_is_dropped_for_its_own_tokens_is_seen(monkeypatch):
    setup = make_setup(2, mode=Mode.retrieval, sampling=EXACT, make_pace=PaceByOutcomes, max_new_tokens=6)
    draft = Hierarchy._draft_block

    def choosy(self, most):
        block, steps, num_steps_ahead = draft(self, most)
        return (block.cut(0), [], 0) if block.tokens[:1] == [0] else (block, steps, num_steps_ahead)

    monkeypatch.setattr(Hierarchy, "_draft_block", choosy)
    assert total_variation(joint_law(setup, 3), target_law(setup, 3)) > CLEARLY
