"""The pace of drafting: γ1, γ2 and the budget of each round, chosen from measured costs and running acceptance.

The choice maximises tokens per second, expected tokens over expected seconds of a round of γ1 and γ2 (and, at a
rebuild, of each budget of the retrieval cache):

    inner steps     n = γ2 / E1, E1 = tokens of a step of the retrieval draft over γ1 drafted ones
    seconds         n * (γ1 * draft step + retrieval step(γ1 + 1 rows)) + verification(γ2 + 1 rows) + refresh
    tokens          1 + sum over the block's places of the chance that all tokens up to there are accepted

γ2 = 0 is among the choices: where drafting does not pay, the target decodes alone. Lossless, for a
choice is made from earlier rounds alone, before the first token of its round is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.round import Phase, Round

WARM_UP = ((1, 4), (0, 6), (2, 10))
"""γ1 and γ2 of the first rounds, which teach what a row of a pass costs."""
PROBE_AFTER, PROBE = 32, (1, 2)
"""Rounds without drafting, after which one drafts, to see whether it would pay by now; twice as many after each."""
MEMORY_OF_COSTS, MEMORY_OF_TOKENS = 0.97, 0.985
"""Share of an observation's weight that is left after the next one."""
PRIOR_TOKENS = 4.0
"""Weight of what is assumed of an acceptance before it was seen, in tokens."""
DRAFTER_ACCEPTANCE, RETRIEVAL_ACCEPTANCE = 0.5, 0.85
"""Acceptance of the two draft levels that is assumed before any was seen."""
BUDGET_EXPONENT = 0.25
"""Rejection falls with the budget to this power, until a budget has been tried: of the measurements in docs/."""
TOKENS_TO_LEAVE_A_BUDGET, TOKENS_TO_TRUST_A_BUDGET = 16.0, 48.0
"""Tokens proposed with a budget before it may be left; before its own acceptance is trusted."""
WORTH_REBUILDING = 0.04
"""Share by which another budget must be faster to be worth a rebuild."""


class Cost:
    """Seconds as a linear function of some counts, by least squares in which older observations weigh less.

    `shares` say, of each count, what part of the constant one of it is assumed to cost before that was seen.
    """

    def __init__(self, shares: Sequence[float], weight: float = 0.5):
        size = len(shares) + 1
        self._squares = [[0.0] * size for _ in range(size)]
        self._products, self._coefficients = [0.0] * size, [0.0] * size
        self._prior = [[0.0] * size for _ in range(size)]
        for index, share in enumerate(shares, start=1):
            row = [0.0] * size
            row[0], row[index] = -share, 1.0
            _add_outer(self._prior, row, weight)
        self.num_seen = 0

    def add(self, seconds: float, *counts: float) -> None:
        """One observation. What took several times as long as expected is the machine's doing, and is cut."""
        if self.num_seen >= 4:
            seconds = min(seconds, 3 * self.at(*counts))
        row = [1.0, *counts]
        self._squares = [[MEMORY_OF_COSTS * value for value in line] for line in self._squares]
        _add_outer(self._squares, row, 1.0)
        self._products = [MEMORY_OF_COSTS * value + seconds * x for value, x in zip(self._products, row, strict=True)]
        both = [[x + y for x, y in zip(*lines, strict=True)] for lines in zip(self._squares, self._prior, strict=True)]
        self._coefficients = _solution(both, self._products)
        self.num_seen += 1

    def at(self, *counts: float) -> float:
        """Predicted seconds for these counts; 0 before the first observation."""
        constant, *slopes = self._coefficients
        return max(0.0, constant + sum(slope * count for slope, count in zip(slopes, counts, strict=True)))


class Acceptance:
    """The chance that a token is accepted where all before it were, by its place in the block.

    Places learn from each other: a place that was seldom reached is taken to be as the mean.
    """

    def __init__(self, initial: float):
        self._initial = initial
        self._reached: list[float] = []
        self._accepted: list[float] = []

    def add(self, num_proposed: int, num_accepted: int) -> None:
        missing = num_proposed - len(self._reached)
        self._reached += [0.0] * missing
        self._accepted += [0.0] * missing
        fade = MEMORY_OF_TOKENS ** min(num_proposed, num_accepted + 1)
        self._reached = [fade * value for value in self._reached]
        self._accepted = [fade * value for value in self._accepted]
        for place in range(min(num_proposed, num_accepted + 1)):
            self._reached[place] += 1
            self._accepted[place] += place < num_accepted

    @property
    def weight(self) -> float:
        """Tokens that the mean rests on, without what was assumed."""
        return sum(self._reached)

    @property
    def mean(self) -> float:
        return (sum(self._accepted) + PRIOR_TOKENS * self._initial) / (sum(self._reached) + PRIOR_TOKENS)

    def tokens(self, most_proposed: int) -> list[float]:
        """Expected tokens of a verification by block length: entry n is for n proposed ones, its own token included."""
        mean, reached, totals = self.mean, 1.0, [1.0]
        for place in range(most_proposed):
            seen = self._reached[place] if place < len(self._reached) else 0.0
            accepted = self._accepted[place] if seen else 0.0
            reached *= (accepted + PRIOR_TOKENS * mean) / (seen + PRIOR_TOKENS)
            totals.append(totals[-1] + reached)
        return totals


class AdaptivePace:
    """Chooses γ1, γ2 and the budget (tokens) from what is allowed; of what is configured there is one.

    Without `budgets` there is no retrieval level.
    """

    def __init__(self, gammas1: Sequence[int], gammas2: Sequence[int], budgets: Sequence[int] = ()):
        self._gammas1, self._gammas2, self._budgets = (tuple(sorted(each)) for each in (gammas1, gammas2, budgets))
        self.gamma1, self.gamma2 = self._gammas1[0], self._gammas2[-1]
        self.budget = self._budgets[len(self._budgets) // 2] if self._budgets else None
        self._draft, self._refresh = Cost([]), Cost([])
        self._retrieval, self._verify = Cost([0.05, 0.03]), Cost([0.05])
        self._of_drafter = Acceptance(DRAFTER_ACCEPTANCE)
        self._of_budget = {budget: Acceptance(RETRIEVAL_ACCEPTANCE) for budget in self._budgets or (0,)}
        self._num_rounds = self._num_alone = self._tokens_since_rebuild = 0
        self._probe_after = PROBE_AFTER
        self._from_ahead = 0.0

    @property
    def _key(self) -> int:
        return self.budget or 0

    def choose(self) -> None:
        """Sets `gamma1` and `gamma2` for the next round."""
        warm_up = WARM_UP[self._num_rounds] if self._num_rounds < len(WARM_UP) else None
        if warm_up is None and self._num_alone >= self._probe_after:
            warm_up, self._num_alone, self._probe_after = PROBE, 0, 2 * self._probe_after
        if warm_up is not None:
            self.gamma1, self.gamma2 = _nearest(self._gammas1, warm_up[0]), _nearest(self._gammas2, warm_up[1])
            return
        _, self.gamma1, self.gamma2 = self._best(self._key)
        if self.gamma2:
            self._probe_after = PROBE_AFTER

    def _best(self, budget: int) -> tuple[float, int, int]:
        """The fastest choice within `budget`: predicted seconds per token, γ1, γ2."""
        per_step = self._of_drafter.tokens(self._gammas1[-1])
        per_round = self._acceptance_with(budget).tokens(self._gammas2[-1] + self._gammas1[-1])
        refresh = self._refresh.at()
        verifications = [self._verify.at(gamma2 + 1) + refresh for gamma2 in self._gammas2]
        choices = []
        for gamma1 in self._gammas1:
            of_drafted = self._seconds_of_drafted(budget, gamma1, per_step[gamma1])
            # Of an inner step's tokens all are proposed, those too that are more than were asked for.
            extra = round((per_step[gamma1] - 1) / 2) if self._budgets else 0
            for gamma2, verification in zip(self._gammas2, verifications, strict=True):
                seconds = verification + of_drafted * max(0.0, gamma2 - self._from_ahead)
                num_proposed = gamma2 + extra if gamma2 else 0
                choices.append((seconds / per_round[num_proposed], gamma1, gamma2))
        return min(choices)

    def _seconds_of_drafted(self, budget: int, gamma1: int, tokens_per_step: float) -> float:
        """Seconds that drafting takes for each token of a block."""
        if not self._budgets:
            return self._draft.at()
        slots = (budget + self._tokens_since_rebuild) / 1024
        return (gamma1 * self._draft.at() + self._retrieval.at(gamma1 + 1, slots)) / tokens_per_step

    def _acceptance_with(self, budget: int) -> Acceptance:
        own, present = self._of_budget[budget], self._of_budget[self._key]
        if budget == self._key or own.weight >= TOKENS_TO_TRUST_A_BUDGET:
            return own
        rejected = (1 - present.mean) * (self._key / budget) ** BUDGET_EXPONENT
        return Acceptance(min(0.995, 1 - rejected))

    def learn(self, round_: Round) -> None:
        """A round is over; its index is 0 where it was the prompt and the first token."""
        if round_.index and Phase.reread not in round_.seconds:
            self._learn(round_)
        self._tokens_since_rebuild = 0 if round_.rebuilt else self._tokens_since_rebuild + len(round_.tokens)

    def _learn(self, round_: Round) -> None:
        seconds, num_proposed = round_.seconds, len(round_.proposed)
        self._num_rounds += 1
        self._num_alone = 0 if num_proposed else self._num_alone + 1
        self._verify.add(seconds.get(Phase.verify, 0.0), num_proposed + 1)
        self._refresh.add(seconds.get(Phase.refresh, 0.0))
        if round_.ahead is not None:
            self._from_ahead += 0.1 * (round_.ahead.num_tokens - self._from_ahead)
        self._learn_drafting(round_)
        if num_proposed:
            self._of_budget[round_.budget or 0].add(num_proposed, round_.num_accepted)

    def _learn_drafting(self, round_: Round) -> None:
        """Learns from the inner steps. Those made ahead took no time of the round: they are left out of the costs."""
        for num_proposed, num_accepted in round_.inner_steps:
            self._of_drafter.add(num_proposed, num_accepted)
        own_steps = round_.inner_steps[round_.num_steps_ahead :]
        num_drafted = sum(proposed for proposed, _ in own_steps) if self._budgets else len(round_.proposed)
        if num_drafted and Phase.draft in round_.seconds:
            self._draft.add(round_.seconds[Phase.draft] / num_drafted)
        if own_steps:
            rows = 1 + num_drafted / len(own_steps)
            slots = ((round_.budget or 0) + self._tokens_since_rebuild) / 1024
            self._retrieval.add(round_.seconds[Phase.retrieval] / len(own_steps), rows, slots)

    def wants_rebuild(self) -> bool:
        """Another budget would be so much faster that it is worth a rebuild; sets `budget` to it."""
        is_known = self._of_budget[self._key].weight >= TOKENS_TO_LEAVE_A_BUDGET or not self.gamma2
        if len(self._budgets) < 2 or self._num_rounds <= len(WARM_UP) or not is_known:
            return False
        seconds = {budget: self._best(budget)[0] for budget in self._budgets}
        fastest = min(self._budgets, key=lambda budget: seconds[budget])
        if seconds[fastest] > seconds[self._key] * (1 - WORTH_REBUILDING):
            return False
        self.budget = fastest
        return True


def _add_outer(matrix: list[list[float]], row: list[float], weight: float) -> None:
    for line, x in zip(matrix, row, strict=True):
        line[:] = [value + weight * x * y for value, y in zip(line, row, strict=True)]


def _solution(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Solves a positive definite system by elimination: a few numbers, for which no library need be loaded."""
    lines = [[*line, value] for line, value in zip(matrix, right, strict=True)]
    for at, pivot in enumerate(lines):
        pivot[:] = [value / pivot[at] for value in pivot]
        for line in lines:
            if line is not pivot:
                line[:] = [value - line[at] * of_pivot for value, of_pivot in zip(line, pivot, strict=True)]
    return [line[-1] for line in lines]


def _nearest(allowed: Sequence[int], wanted: int) -> int:
    return min(allowed, key=lambda value: abs(value - wanted))
