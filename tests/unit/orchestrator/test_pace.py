"""The choice of γ1, γ2 and budget, in a world whose costs and acceptances are known."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from orchestrator.ahead import AheadRecord
from orchestrator.pace import PROBE_AFTER, WARM_UP, Acceptance, AdaptivePace, Cost
from orchestrator.round import Round
from tiers.planning.cost import expected_tokens

GAMMAS1, GAMMAS2 = (0, 1, 2, 4, 8), (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)


@dataclass(kw_only=True)
class World:
    """Seconds of each step, and the chance that a token is accepted, of each budget that of the retrieval draft."""

    draft_step: float = 0.001
    retrieval_step: float = 0.004
    verify: float = 0.1
    of_row: float = 0.001
    of_1024_slots: float = 0.0
    draft_acceptance: float = 0.5
    retrieval_acceptance: dict[int, float] = field(default_factory=lambda: {1024: 0.9})

    tail: int = 0
    """Tokens since the last rebuild."""

    def play(self, pace: AdaptivePace, num_rounds: int, seed: int = 0) -> list[Round]:
        chance, rounds = random.Random(seed), []
        for index in range(num_rounds + 1):
            rounds.append(self._round(pace, index, chance))
            pace.learn(rounds[-1])
        return rounds

    def _round(self, pace: AdaptivePace, index: int, chance: random.Random) -> Round:
        if index == 0:
            return Round(index=0, proposed=[], origins=[], num_accepted=0, tokens=[0], seconds={"verify": 9.0})
        pace.choose()
        budget = pace.budget
        steps, num_proposed = [], 0
        while num_proposed < pace.gamma2:
            accepted = _run_of(chance, self.draft_acceptance, pace.gamma1)
            steps.append((pace.gamma1, accepted))
            num_proposed += accepted + 1
        num_accepted = _run_of(chance, self.retrieval_acceptance[budget], num_proposed)
        slots = (budget + self.tail) / 1024
        step = self.retrieval_step + self.of_row * pace.gamma1 + self.of_1024_slots * slots
        self.tail += num_accepted + 1
        wants_rebuild = pace.wants_rebuild() or self.tail > budget // 2
        self.tail = 0 if wants_rebuild else self.tail
        seconds = {"verify": self.verify + self.of_row * num_proposed, "refresh": 0.0}
        if steps:
            seconds |= {"draft": self.draft_step * pace.gamma1 * len(steps), "retrieval": step * len(steps)}
        return Round(
            index=index,
            proposed=[0] * num_proposed,
            origins=[],
            num_accepted=num_accepted,
            tokens=[0] * (num_accepted + 1),
            gamma1=pace.gamma1,
            gamma2=pace.gamma2,
            budget=budget,
            inner_steps=steps,
            rebuilt=wants_rebuild,
            seconds=seconds,
        )

    def expected(self, gamma1: int, gamma2: int, budget: int = 1024) -> tuple[float, float]:
        """Seconds and tokens of a round."""
        per_step = expected_tokens(self.draft_acceptance, gamma1)
        step = self.draft_step * gamma1 + self.retrieval_step + self.of_row * gamma1
        step += self.of_1024_slots * budget / 1024
        seconds = self.verify + self.of_row * gamma2 + step * gamma2 / per_step
        num_proposed = gamma2 and gamma2 + round((per_step - 1) / 2)
        return seconds, expected_tokens(self.retrieval_acceptance[budget], num_proposed)

    def best(self) -> float:
        """Seconds per token of the best fixed choice."""
        rounds = [self.expected(gamma1, gamma2) for gamma1 in GAMMAS1 for gamma2 in GAMMAS2]
        return min(seconds / tokens for seconds, tokens in rounds)


def _run_of(chance: random.Random, acceptance: float, most: int) -> int:
    """How many of `most` tokens are accepted, in order."""
    count = 0
    while count < most and chance.random() < acceptance:
        count += 1
    return count


WORLDS = {
    "streamed": World(verify=0.4),
    "streamed_poor_drafter": World(verify=0.4, draft_acceptance=0.1),
    "streamed_good_drafter": World(verify=0.4, draft_acceptance=0.9, draft_step=0.0005),
    "resident": World(verify=0.02, of_row=0.004),
    "drafts_are_useless": World(verify=0.01, of_row=0.005, retrieval_step=0.008, retrieval_acceptance={1024: 0.5}),
    "very_slow_link": World(verify=4.0, retrieval_acceptance={1024: 0.97}),
}


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_comes_near_to_the_best_fixed_choice(world, seed):
    pace = AdaptivePace(GAMMAS1, GAMMAS2, [1024])
    expected = [world.expected(each.gamma1, each.gamma2) for each in world.play(pace, 120, seed)[30:]]
    seconds, tokens = (sum(each) for each in zip(*expected, strict=True))
    assert seconds / tokens <= world.best() / 0.95


def test_drafting_that_does_not_pay_is_left_off_and_probed():
    rounds = WORLDS["drafts_are_useless"].play(AdaptivePace(GAMMAS1, GAMMAS2, [1024]), 120)[len(WARM_UP) + 20 :]
    drafting = sum(bool(each.gamma2) for each in rounds)
    assert 1 <= drafting <= 4


def test_drafting_begins_again_when_it_pays_again():
    pace = AdaptivePace(GAMMAS1, GAMMAS2, [1024])
    WORLDS["drafts_are_useless"].play(pace, 60)
    assert pace.gamma2 == 0
    WORLDS["streamed"].play(pace, 8 * PROBE_AFTER)
    assert pace.gamma2 >= 6


def test_what_is_configured_stays():
    for gammas1, gammas2 in (([2], GAMMAS2), (GAMMAS1, [6]), ([0], GAMMAS2)):
        rounds = WORLDS["streamed"].play(AdaptivePace(gammas1, gammas2, [1024]), 40)[1:]
        assert {each.gamma1 for each in rounds} <= set(gammas1) and {each.gamma2 for each in rounds} <= set(gammas2)
        assert {each.budget for each in rounds} == {1024}


@pytest.mark.parametrize(
    ("of_1024_slots", "acceptances", "best"),
    [
        (0.0, {512: 0.7, 1024: 0.8, 2048: 0.9, 4096: 0.97}, 4096),
        (0.02, {512: 0.9, 1024: 0.9, 2048: 0.9, 4096: 0.9}, 512),
    ],
)
def test_the_budget_that_pays_is_found(of_1024_slots, acceptances, best):
    world = World(verify=0.1, of_1024_slots=of_1024_slots, retrieval_acceptance=acceptances)
    pace = AdaptivePace([0], GAMMAS2, list(acceptances))
    world.play(pace, 120)
    assert pace.budget == best


def test_a_budget_changes_only_at_a_rebuild():
    world = World(retrieval_acceptance={512: 0.7, 1024: 0.8, 2048: 0.95})
    rounds = world.play(AdaptivePace([1], GAMMAS2, [512, 1024, 2048]), 100)[1:]
    for before, after in zip(rounds, rounds[1:], strict=False):
        assert before.budget == after.budget or before.rebuilt
    assert len({each.budget for each in rounds}) > 1


def test_tokens_drafted_ahead_cost_no_time_of_the_round():
    """With most of the next block there for nothing, longer blocks pay."""
    world, pace = World(verify=0.1, retrieval_step=0.02), AdaptivePace([0], GAMMAS2, [1024])
    world.play(pace, 60)
    alone = pace.gamma2
    for round_ in world.play(pace, 100):
        round_.ahead = AheadRecord(num_tokens=12)
        pace.learn(round_)
    pace.choose()
    assert pace.gamma2 > alone


def test_costs_are_a_line_and_recent_ones_count_more():
    cost = Cost([0.05])
    assert cost.at(3) == 0
    for rows in (2, 5, 3, 9, 4, 7) * 5:
        cost.add(0.1 + 0.01 * rows, rows)
    assert cost.at(1) == pytest.approx(0.11, rel=0.02) and cost.at(17) == pytest.approx(0.27, rel=0.02)
    for rows in (2, 5, 3, 9, 4, 7) * 20:
        cost.add(0.2 + 0.02 * rows, rows)
    assert cost.at(5) == pytest.approx(0.3, rel=0.1)


def test_one_stalled_observation_does_not_spoil_a_cost():
    cost = Cost([0.05])
    for rows in (2, 5, 3, 9) * 5:
        cost.add(0.1 + 0.01 * rows, rows)
    cost.add(60.0, 5)
    assert cost.at(5) < 0.2


def test_of_one_count_alone_a_cost_assumes_little_of_others():
    cost = Cost([0.05])
    for _ in range(10):
        cost.add(1.0, 1)
    assert cost.at(1) == pytest.approx(1.0, rel=0.01) and 1.2 < cost.at(9) < 1.6


def test_expected_tokens_follow_each_place_of_the_block():
    acceptance = Acceptance(0.5)
    for _ in range(400):
        acceptance.add(3, 2)  # the first two always, the third never
    tokens = acceptance.tokens(5)
    assert tokens[0] == 1 and tokens[2] == pytest.approx(3, abs=0.2)
    assert tokens[3] - tokens[2] < 0.15
    assert acceptance.mean == pytest.approx(2 / 3, abs=0.05)
