"""orchestrator/metrics.py: hand-counted rounds."""

import pytest

from orchestrator.ahead import AheadRecord
from orchestrator.metrics import LevelCounts, Metrics, percentile
from orchestrator.round import Round
from workers.messages import DRAFTER, RETRIEVAL

FIRST = Round(index=0, proposed=[], origins=[], num_accepted=0, tokens=[5], seconds={"verify": 0.2, "refresh": 0.3})


def triforce_rounds() -> list[Round]:
    return [
        Round(
            index=1,
            proposed=[1, 2, 3, 4],
            origins=[DRAFTER, RETRIEVAL, DRAFTER, RETRIEVAL],
            num_accepted=3,
            tokens=[1, 2, 3, 9],
            inner_steps=[(2, 1), (2, 1)],
            rebuilt=True,
            seconds={"draft": 0.1, "verify": 0.5},
        ),
        Round(
            index=2,
            proposed=[1, 2],
            origins=[RETRIEVAL, RETRIEVAL],
            num_accepted=0,
            tokens=[7],
            inner_steps=[(2, 0), (1, 0)],
            seconds={"draft": 0.2, "verify": 0.5},
        ),
    ]


def counted(*, uses_drafter: bool, uses_retrieval: bool, rounds: list[Round], seconds: list[float]) -> Metrics:
    metrics = Metrics(uses_drafter=uses_drafter, uses_retrieval=uses_retrieval)
    for round_, spent in zip([FIRST, *rounds], [2.0, *seconds], strict=True):
        metrics.add(round_, spent)
    return metrics


def test_timing_counts_tokens_after_the_first():
    metrics = counted(uses_drafter=True, uses_retrieval=True, rounds=triforce_rounds(), seconds=[0.8, 0.7])
    timing = metrics.timing()
    assert timing["ttft_s"] == 2.0
    assert timing["prefill_s"] == pytest.approx(1.5)
    assert timing["decode_s"] == pytest.approx(1.5)
    assert timing["tokens_per_s"] == pytest.approx(5 / 1.5)
    assert timing["tbt_ms"]["mean"] == pytest.approx(1500 / 5)
    # Four tokens of 200 ms and one of 700 ms.
    assert timing["tbt_ms"]["p50"] == pytest.approx(200)
    assert timing["tbt_ms"]["p95"] == pytest.approx(200 + 500 * 0.8)
    assert timing["phases_s"] == pytest.approx({"draft": 0.3, "verify": 1.0})


def test_speculation_counts_both_levels():
    metrics = counted(uses_drafter=True, uses_retrieval=True, rounds=triforce_rounds(), seconds=[1, 1])
    speculation = metrics.speculation()
    assert speculation["verifications"] == 2 and speculation["rebuilds"] == 1
    assert speculation["tokens_per_verification"] == 2.5
    assert speculation["levels"] == [
        {
            "name": DRAFTER,
            "proposed": 7,
            "accepted": 2,
            "acceptance_rate": pytest.approx(2 / 7),
            "accepted_per_position": [0.5, 0.0],
        },
        {
            "name": RETRIEVAL,
            "proposed": 6,
            "accepted": 3,
            "acceptance_rate": 0.5,
            "accepted_per_position": [0.5, 0.5, 1.0, 0.0],
        },
    ]


def test_without_a_drafter_its_empty_steps_are_no_level():
    rounds = [
        Round(index=1, proposed=[1], origins=[RETRIEVAL], num_accepted=1, tokens=[1, 2], inner_steps=[(0, 0)]),
    ]
    metrics = counted(uses_drafter=False, uses_retrieval=True, rounds=rounds, seconds=[1])
    assert [level["name"] for level in metrics.speculation()["levels"]] == [RETRIEVAL]
    assert metrics.levels[0].proposed == 1


def test_a_drafter_straight_to_the_target_is_the_one_level():
    rounds = [Round(index=1, proposed=[1, 2], origins=[DRAFTER] * 2, num_accepted=1, tokens=[1, 2])]
    metrics = counted(uses_drafter=True, uses_retrieval=False, rounds=rounds, seconds=[1])
    [level] = metrics.speculation()["levels"]
    assert (level["name"], level["proposed"], level["accepted"]) == (DRAFTER, 2, 1)


def test_autoregressive_decoding_has_no_levels_and_one_token_a_verification():
    rounds = [Round(index=i, proposed=[], origins=[], num_accepted=0, tokens=[i]) for i in (1, 2, 3)]
    speculation = counted(uses_drafter=False, uses_retrieval=False, rounds=rounds, seconds=[1, 1, 1]).speculation()
    assert speculation["levels"] == [] and speculation["tokens_per_verification"] == 1.0


def test_a_block_cut_by_the_end_counts_the_verdict_but_only_its_tokens():
    rounds = [Round(index=1, proposed=[1, 2, 3], origins=[DRAFTER] * 3, num_accepted=3, tokens=[1])]
    metrics = counted(uses_drafter=True, uses_retrieval=False, rounds=rounds, seconds=[1])
    assert metrics.num_decoded == 1 and metrics.levels[0].accepted == 3


@pytest.mark.parametrize("rounds", [[], [FIRST]], ids=["nothing", "one token"])
def test_what_was_not_measured_is_null(rounds):
    metrics = Metrics(uses_drafter=True, uses_retrieval=True)
    for round_ in rounds:
        metrics.add(round_, 1.0)
    timing, speculation = metrics.timing(), metrics.speculation()
    assert timing["tbt_ms"] == {"mean": None, "p50": None, "p95": None}
    assert timing["tokens_per_s"] is None and speculation["tokens_per_verification"] is None
    assert [level["acceptance_rate"] for level in speculation["levels"]] == [None, None]
    assert (timing["ttft_s"] is None) == (not rounds)


def test_positions_are_rates_of_those_proposed():
    counts = LevelCounts("x")
    counts.add(1, 1)
    counts.add(3, 1)
    counts.add(0, 0)
    assert counts.to_plain()["accepted_per_position"] == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [([], 50, None), ([3], 95, 3), ([1, 2], 50, 1.5), ([4, 1, 3, 2], 100, 4), ([4, 1, 3, 2], 0, 1)],
)
def test_percentile(values, percent, expected):
    assert percentile(values, percent) == expected


def test_drafting_ahead_is_counted_without_the_first_round():
    rounds = triforce_rounds()
    rounds[0].ahead = AheadRecord(num_steps=3, num_paths=2, is_hit=True, num_tokens=5)
    rounds[1].ahead = AheadRecord(num_steps=1, num_paths=1)
    metrics = counted(uses_drafter=True, uses_retrieval=True, rounds=rounds, seconds=[1, 1])
    assert metrics.speculation()["ahead"] == {
        "verifications": 2, "hits": 1, "hit_rate": 0.5, "tokens_per_hit": 5.0, "steps": 4, "paths": 3,
    }  # fmt: skip


def test_where_nothing_is_drafted_ahead_there_is_nothing_to_count():
    metrics = counted(uses_drafter=True, uses_retrieval=True, rounds=triforce_rounds(), seconds=[1, 1])
    assert metrics.speculation()["ahead"] is None


def test_restarted_metrics_count_from_the_next_round_on():
    rounds = [Round(index=1, proposed=[], origins=[], num_accepted=0, tokens=[1, 2], seconds={"verify": 2.0})]
    earlier = counted(uses_drafter=False, uses_retrieval=False, rounds=rounds, seconds=[3])
    metrics = earlier.restarted()
    assert (metrics.ttft_s, metrics.verifications, metrics.phase_seconds) == (earlier.ttft_s, 0, {})
    metrics.add(Round(index=2, proposed=[], origins=[], num_accepted=0, tokens=[1]), 5.0)
    assert (metrics.decode_s, metrics.num_decoded, earlier.decode_s) == (5.0, 1, 3.0)
