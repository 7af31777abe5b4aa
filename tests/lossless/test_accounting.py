"""Acceptance that is known in advance: rates, positions and tokens of the real loop must be exactly those."""

from __future__ import annotations

import pytest
import torch

from conf.schema import Mode, SamplingConfig
from orchestrator.hierarchy import Hierarchy
from orchestrator.metrics import Metrics
from orchestrator.round import Round
from tests.support.enumeration import outcomes
from tests.support.toy_models import EXACT, Setup, make_setup, random_table
from workers.acceptance import KeyedRandom
from workers.messages import DRAFTER, RETRIEVAL

GREEDY = SamplingConfig(temperature=0.0)
BLOCK = SamplingConfig(temperature=1.0, top_p=1.0, block_verification=True)
NUM_ROUNDS = 20


def run_rounds(hierarchy: Hierarchy, num_rounds: int = NUM_ROUNDS) -> list[Round]:
    """All but the first, which is the target's own token."""
    hierarchy.start()
    return [hierarchy.round() for _ in range(num_rounds)]


def counted(setup: Setup, rounds: list[Round]) -> dict[str, dict]:
    """What a run reports of its levels."""
    uses_drafter = setup.mode in (Mode.triforce, Mode.streaming)
    uses_retrieval = setup.mode in (Mode.triforce, Mode.retrieval)
    metrics = Metrics(uses_drafter=uses_drafter, uses_retrieval=uses_retrieval)
    metrics.add(Round(index=0, proposed=[], origins=[], num_accepted=0, tokens=[0]), 1.0)
    for record in rounds:
        metrics.add(record, 1.0)
    assert metrics.num_tokens == 1 + sum(len(record.tokens) for record in rounds)
    assert metrics.tokens_per_verification == pytest.approx(sum(len(record.tokens) for record in rounds) / len(rounds))
    return {level.name: level.to_plain() for level in metrics.levels}


def assert_consistent(hierarchy: Hierarchy, rounds: list[Round]) -> None:
    assert hierarchy.session.generated[1:] == [token for record in rounds for token in record.tokens]
    for record in rounds:
        assert record.tokens[:-1] == record.proposed[: record.num_accepted]
        assert len(record.tokens) == record.num_accepted + 1
        assert len(record.origins) == len(record.proposed)


def certain(*next_token: int) -> torch.Tensor:
    """Logits [V, V]: after token t comes `next_token[t]`, certainly."""
    return torch.eye(len(next_token), dtype=torch.float64)[list(next_token)].log()


UPWARDS, DOWNWARDS = certain(1, 2, 3, 0), certain(3, 0, 1, 2)
RIGHT_AFTER_EVEN = certain(1, 3, 3, 1)
LONG = {"max_new_tokens": 10_000, "prompt": (0, 1, 0)}


@pytest.mark.parametrize("sampling", [EXACT, GREEDY, BLOCK], ids=["token", "greedy", "block"])
@pytest.mark.parametrize(
    ("mode", "gamma1", "gamma2", "block"),
    [
        (Mode.streaming, 0, 4, 4),
        (Mode.streaming, 0, 1, 1),
        (Mode.retrieval, 0, 3, 3),
        (Mode.triforce, 2, 4, 6),
        (Mode.triforce, 1, 6, 6),
        (Mode.triforce, 3, 1, 4),
        (Mode.triforce, 0, 2, 2),
    ],
)
def test_equal_models_accept_every_token(mode, gamma1, gamma2, block, sampling):
    """An inner step brings its gamma1 tokens and one more, so that a block may be longer than gamma2."""
    table = random_table(4, 4, 40)
    setup = Setup(
        target=table, retrieval=table, drafter=table, mode=mode, gamma1=gamma1, gamma2=gamma2, sampling=sampling, **LONG
    )
    rounds = run_rounds(hierarchy := setup.build(KeyedRandom(0)))
    assert_consistent(hierarchy, rounds)
    assert [len(record.proposed) for record in rounds] == [block] * NUM_ROUNDS
    assert [record.num_accepted for record in rounds] == [block] * NUM_ROUNDS
    levels = counted(setup, rounds)
    for level in levels.values():
        expected_rate = 1.0 if level["proposed"] else None
        assert level["acceptance_rate"] == expected_rate
        assert set(level["accepted_per_position"]) <= {1.0}
    last = levels[DRAFTER if mode is Mode.streaming else RETRIEVAL]
    assert last["proposed"] == last["accepted"] == block * NUM_ROUNDS
    assert len(last["accepted_per_position"]) == block


@pytest.mark.parametrize("sampling", [EXACT, GREEDY, BLOCK], ids=["token", "greedy", "block"])
@pytest.mark.parametrize(
    ("mode", "gamma1", "gamma2"), [(Mode.streaming, 0, 4), (Mode.retrieval, 0, 3), (Mode.triforce, 2, 3)]
)
def test_models_that_exclude_each_others_tokens_accept_none(mode, gamma1, gamma2, sampling):
    """The drafter is wrong for the retrieval draft, and that for the target."""
    setup = Setup(
        target=UPWARDS,
        retrieval=DOWNWARDS,
        drafter=certain(2, 3, 0, 1),
        mode=mode,
        gamma1=gamma1,
        gamma2=gamma2,
        sampling=sampling,
        **LONG,
    )
    rounds = run_rounds(hierarchy := setup.build(KeyedRandom(0)))
    assert_consistent(hierarchy, rounds)
    assert [len(record.tokens) for record in rounds] == [1] * NUM_ROUNDS
    assert [len(record.proposed) for record in rounds] == [gamma2] * NUM_ROUNDS
    levels = counted(setup, rounds)
    assert {level["acceptance_rate"] for level in levels.values()} == {0.0}
    if mode is Mode.triforce:
        assert [record.inner_steps for record in rounds] == [[(2, 0)] * gamma2] * NUM_ROUNDS
        assert levels[DRAFTER]["proposed"] == 2 * gamma2 * NUM_ROUNDS
        assert {origin for record in rounds for origin in record.origins} == {RETRIEVAL}


@pytest.mark.parametrize("sampling", [EXACT, GREEDY, BLOCK], ids=["token", "greedy", "block"])
def test_a_drafter_that_is_right_every_other_time_has_half_its_pairs_accepted(sampling):
    setup = Setup(
        target=UPWARDS,
        retrieval=UPWARDS,
        drafter=RIGHT_AFTER_EVEN,
        mode=Mode.streaming,
        gamma2=2,
        sampling=sampling,
        max_new_tokens=10_000,
        prompt=(2, 3),  # so the first token, the target's own, is even
    )
    rounds = run_rounds(hierarchy := setup.build(KeyedRandom(0)))
    assert_consistent(hierarchy, rounds)
    assert [record.num_accepted for record in rounds] == [1] * NUM_ROUNDS
    (level,) = counted(setup, rounds).values()
    assert level == {
        "name": DRAFTER,
        "proposed": 2 * NUM_ROUNDS,
        "accepted": NUM_ROUNDS,
        "acceptance_rate": 0.5,
        "accepted_per_position": [1.0, 0.0],
    }


def test_each_inner_step_is_counted_where_the_drafter_is_right_every_other_time():
    """Steps of 2: one kept and one of the retrieval draft's own; the target keeps all of it."""
    setup = Setup(
        target=UPWARDS,
        retrieval=UPWARDS,
        drafter=RIGHT_AFTER_EVEN,
        gamma1=2,
        gamma2=4,
        max_new_tokens=10_000,
        prompt=(2, 3),
    )
    hierarchy = setup.build(KeyedRandom(0))
    rounds = run_rounds(hierarchy, 2)
    assert_consistent(hierarchy, rounds)
    # After an even token a step brings 2 tokens; the target's own makes the block of 4 end on an odd one.
    assert rounds[0].inner_steps == [(2, 1), (2, 1)]
    assert rounds[0].origins == [DRAFTER, RETRIEVAL] * 2
    assert rounds[1].inner_steps == [(2, 0), (2, 1), (2, 1)]
    assert counted(setup, rounds)[DRAFTER] == {
        "name": DRAFTER,
        "proposed": 10,
        "accepted": 4,
        "acceptance_rate": 0.4,
        "accepted_per_position": [0.8, 0.0],
    }


ALPHA = 0.5


def half_accepted(gamma2: int, sampling: SamplingConfig = EXACT) -> Setup:
    """The same distributions at every position: the probability that both share is `ALPHA`."""
    target = torch.tensor([[0.1, 0.2, 0.7]] * 3, dtype=torch.float64).log()
    drafter = torch.tensor([[0.6, 0.2, 0.2]] * 3, dtype=torch.float64).log()
    return Setup(
        target=target, retrieval=target, drafter=drafter, mode=Mode.streaming, gamma2=gamma2, sampling=sampling
    )


def expected_tokens(setup: Setup) -> float:
    """Of the first round after the target's own token, over all branches."""
    return sum(weight * (len(hierarchy.session.generated) - 1) for weight, _, hierarchy in outcomes(setup.build, [], 1))


@pytest.mark.parametrize("gamma2", [1, 2, 3])
def test_tokens_per_verification_are_those_of_theory(gamma2):
    """(1 - a ** (n + 1)) / (1 - a), of Leviathan et al."""
    theory = (1 - ALPHA ** (gamma2 + 1)) / (1 - ALPHA)
    assert expected_tokens(half_accepted(gamma2)) == pytest.approx(theory, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_the_acceptance_rate_is_what_both_distributions_share(seed):
    """One minus the total variation, averaged over what precedes."""
    setup = make_setup(3, seed=seed, mode=Mode.streaming, gamma2=1, order=1)
    target, drafter = torch.softmax(setup.target, -1), torch.softmax(setup.drafter, -1)
    shared = torch.minimum(target, drafter).sum(-1)
    theory = 1 + float(target[setup.prompt[-1]] @ shared)
    assert expected_tokens(setup) == pytest.approx(theory, abs=1e-12)


def test_block_verification_keeps_more_than_token_verification_but_for_single_tokens():
    assert expected_tokens(half_accepted(1, BLOCK)) == pytest.approx(expected_tokens(half_accepted(1)), abs=1e-12)
    for gamma2 in (2, 3):
        assert expected_tokens(half_accepted(gamma2, BLOCK)) > expected_tokens(half_accepted(gamma2)) + 1e-3


@pytest.mark.parametrize("mode", [Mode.triforce, Mode.retrieval, Mode.streaming])
def test_sampled_rounds_add_up(mode):
    setup = make_setup(5, order=1, mode=mode, gamma1=2, gamma2=5, rebuild=3, tail_tokens=20, **LONG)
    rounds = run_rounds(hierarchy := setup.build(KeyedRandom(1)), 200)
    assert_consistent(hierarchy, rounds)
    for record in rounds:
        assert 0 <= record.num_accepted <= len(record.proposed)
        assert all(0 <= accepted <= proposed <= 2 for proposed, accepted in record.inner_steps)
        if mode is not Mode.streaming:
            assert sum(accepted + 1 for _, accepted in record.inner_steps) == len(record.proposed)
    levels = counted(setup, rounds)
    for level in levels.values():
        assert level["accepted"] == round(level["acceptance_rate"] * level["proposed"])


@pytest.mark.parametrize("mode", [Mode.triforce, Mode.retrieval, Mode.streaming, Mode.autoregressive])
def test_a_second_session_on_the_same_roles_repeats_the_first(mode):
    setup = make_setup(5, order=1, mode=mode, gamma1=2, gamma2=3, max_new_tokens=30)
    first = setup.build(KeyedRandom(2))
    again = Hierarchy(
        session=setup.build(KeyedRandom(2)).session,
        verifier=first.verifier,
        retriever=first.retriever,
        drafter=first.drafter,
        gamma1=first.gamma1,
        gamma2=first.gamma2,
    )
    for hierarchy in (first, again):
        hierarchy.start()
        while not hierarchy.session.is_finished:
            hierarchy.round()
    assert again.session.generated == first.session.generated
