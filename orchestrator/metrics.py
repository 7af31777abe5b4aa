"""Rounds and their seconds in; the `timing` and `speculation` fields of result.json out. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from orchestrator.ahead import AheadRecord
from orchestrator.round import Phase, Round
from workers.messages import DRAFTER, RETRIEVAL


class LevelCounts:
    """Counts of one level's proposals, and of those that the level above accepted."""

    def __init__(self, name: str):
        self.name = name
        self.proposed = self.accepted = 0
        self._proposed_at: list[int] = []
        self._accepted_at: list[int] = []

    def add(self, num_proposed: int, num_accepted: int) -> None:
        """One verification: of `num_proposed` tokens in order the first `num_accepted` were accepted."""
        self.proposed += num_proposed
        self.accepted += num_accepted
        missing = num_proposed - len(self._proposed_at)
        self._proposed_at += [0] * missing
        self._accepted_at += [0] * missing
        for position in range(num_proposed):
            self._proposed_at[position] += 1
            self._accepted_at[position] += position < num_accepted

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted over proposed tokens; None before the first proposal."""
        return self.accepted / self.proposed if self.proposed else None

    def to_plain(self) -> dict[str, Any]:
        """`accepted_per_position[i]`: how often the proposal's token i was accepted, of the times there was one."""
        pairs = zip(self._accepted_at, self._proposed_at, strict=True)
        return {
            "name": self.name,
            "proposed": self.proposed,
            "accepted": self.accepted,
            "acceptance_rate": self.acceptance_rate,
            "accepted_per_position": [accepted / proposed for accepted, proposed in pairs],
        }


class AheadCounts:
    """Counts of what drafting during verifications brought."""

    def __init__(self) -> None:
        self.verifications = self.hits = self.steps = self.paths = self.tokens = 0

    def add(self, record: AheadRecord) -> None:
        self.verifications += 1
        self.hits += record.is_hit
        self.steps += record.num_steps
        self.paths += record.num_paths
        self.tokens += record.num_tokens

    def to_plain(self) -> dict[str, Any]:
        """`hit_rate`: of verifications in which something was drafted or could have been, those whose outcome was; per
        hit, `tokens_per_hit` of the next block were there."""
        return {
            "verifications": self.verifications,
            "hits": self.hits,
            "hit_rate": self.hits / self.verifications if self.verifications else None,
            "tokens_per_hit": self.tokens / self.hits if self.hits else None,
            "steps": self.steps,
            "paths": self.paths,
        }


class Metrics:
    """Counts rounds as they come. The first one is the prompt and the first token: it counts for no rate.

    A verification's tokens arrive together, so each is given an equal share of the round's seconds. Time between
    tokens (TBT) is decode seconds over tokens after the first; the percentiles are over those tokens.
    """

    def __init__(self, *, uses_drafter: bool, uses_retrieval: bool):
        used = ((DRAFTER, uses_drafter), (RETRIEVAL, uses_retrieval))
        self.levels = [LevelCounts(name) for name, is_used in used if is_used]
        self._uses_drafter, self._uses_retrieval = uses_drafter, uses_retrieval
        self.ahead: AheadCounts | None = None
        self.num_tokens = self.verifications = self.rebuilds = self.rereads = self.num_inner_steps = 0
        self.prefill_s: float | None = None
        self.ttft_s: float | None = None
        self.decode_s = 0.0
        self.phase_seconds: dict[Phase, float] = {}
        self._token_seconds: list[float] = []

    def restarted(self) -> Metrics:
        """New counts, for the rounds to come of the same session: the prompt has been read."""
        restarted = Metrics(uses_drafter=self._uses_drafter, uses_retrieval=self._uses_retrieval)
        restarted.prefill_s, restarted.ttft_s = self.prefill_s, self.ttft_s
        return restarted

    def add(self, round_: Round, seconds: float) -> None:
        """Counts a round that took `seconds`; the first is the prefill and the first token."""
        self.num_tokens += len(round_.tokens)
        self.rereads += "reread" in round_.seconds
        if self.ttft_s is None:
            self.ttft_s = seconds
            self.prefill_s = seconds - sum(round_.seconds.values())
            return
        self.verifications += 1
        self.rebuilds += round_.rebuilt
        self.num_inner_steps += len(round_.inner_steps)
        self.decode_s += seconds
        self._token_seconds += [seconds / len(round_.tokens)] * len(round_.tokens)
        for phase, spent in round_.seconds.items():
            self.phase_seconds[phase] = self.phase_seconds.get(phase, 0.0) + spent
        self._count_proposals(round_)
        if round_.ahead is not None:
            self.ahead = self.ahead or AheadCounts()
            self.ahead.add(round_.ahead)

    def _count_proposals(self, round_: Round) -> None:
        if not self.levels:
            return
        if self._uses_drafter and self._uses_retrieval:
            for num_proposed, num_accepted in round_.inner_steps:
                self.levels[0].add(num_proposed, num_accepted)
        self.levels[-1].add(len(round_.proposed), round_.num_accepted)

    @property
    def num_decoded(self) -> int:
        """Tokens after the first."""
        return len(self._token_seconds)

    @property
    def tokens_per_s(self) -> float | None:
        return self.num_decoded / self.decode_s if self.decode_s else None

    @property
    def tbt_mean_s(self) -> float | None:
        return self.decode_s / self.num_decoded if self.num_decoded else None

    @property
    def tokens_per_verification(self) -> float | None:
        return self.num_decoded / self.verifications if self.verifications else None

    def timing(self) -> dict[str, Any]:
        """The field `timing` of result.json; None for what was not measured, as TBT of a single token."""
        tbt_s = {
            "mean": self.tbt_mean_s,
            "p50": percentile(self._token_seconds, 50),
            "p95": percentile(self._token_seconds, 95),
        }
        return {
            "prefill_s": self.prefill_s,
            "ttft_s": self.ttft_s,
            "decode_s": self.decode_s,
            "tbt_ms": {name: None if value is None else 1000 * value for name, value in tbt_s.items()},
            "tokens_per_s": self.tokens_per_s,
            "phases_s": dict(self.phase_seconds),
        }

    def speculation(self) -> dict[str, Any]:
        """The field `speculation` of result.json."""
        return {
            "verifications": self.verifications,
            "tokens_per_verification": self.tokens_per_verification,
            "rebuilds": self.rebuilds,
            "rereads": self.rereads,
            "levels": [level.to_plain() for level in self.levels],
            "ahead": None if self.ahead is None else self.ahead.to_plain(),
        }


def percentile(values: Iterable[float], percent: float) -> float | None:
    """The `percent`-th percentile, with linear interpolation between the two nearest values; None if there are none."""
    ordered: Sequence[float] = sorted(values)
    if not ordered:
        return None
    rank = (len(ordered) - 1) * percent / 100
    low = int(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)
