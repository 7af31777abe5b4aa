"""Predicted times: formulas on numbers that can be checked by hand, and the published figures of TriForce."""

from __future__ import annotations

import pytest

from tiers.planning.cost import (
    ModelCost,
    Speeds,
    Streamed,
    expected_tokens,
    forward_seconds,
    prefill_seconds,
    triforce_round,
)

SPEEDS = Speeds(
    num_devices=1, device_gb_per_s=1000, device_tflops=100, link_gb_per_s=25, disk_gb_per_s=5, layer_overhead_ms=0.0
)
MODEL = ModelCost(
    num_layers=10, weight_bytes=10**10, num_parameters=5 * 10**9, attention_width=4096, kv_bytes_per_token=10**5
)


def test_a_pass_takes_as_long_as_the_slowest_of_what_overlaps():
    def seconds(**streamed) -> float:
        return forward_seconds(SPEEDS, MODEL, 1, 10**5, Streamed(**streamed))

    assert seconds() == pytest.approx(0.02)  # 10 GB of weights and 10 GB of keys at 1000 GB/s
    assert seconds(host_bytes=10**8) == pytest.approx(0.02)
    assert seconds(host_bytes=10**10) == pytest.approx(0.4)
    assert seconds(disk_bytes=10**10) == pytest.approx(2.0)
    assert seconds(host_bytes=10**11, disk_bytes=10**10) == pytest.approx(4.4)


def test_many_rows_are_bound_by_operations():
    rows = 10_000
    products = 2 * rows * (5 * 10**9 + 2 * 10 * 4096 * 1000)
    assert forward_seconds(SPEEDS, MODEL, rows, 1000, Streamed()) == pytest.approx(products / 1e14)


def test_prefill_counts_half_of_all_pairs():
    products = 2 * 50_000 * 5 * 10**9 + 2 * 10 * 4096 * 50_000**2
    assert prefill_seconds(SPEEDS, MODEL, 50_000, Streamed()) == pytest.approx(products / 1e14)


@pytest.mark.parametrize(("acceptance", "count", "wanted"), [(0, 5, 1), (1, 5, 6), (0.5, 2, 1.75), (0.9, 0, 1)])
def test_expected_tokens_of_a_verification(acceptance, count, wanted):
    assert expected_tokens(acceptance, count) == pytest.approx(wanted)


def test_a_round_is_its_parts_over_its_tokens():
    round_ = triforce_round(
        draft_step=0.01,
        retrieval_step=0.1,
        verify=2.0,
        gamma1=2,
        gamma2=7,
        draft_acceptance=0.5,
        retrieval_acceptance=1.0,
    )
    assert (round_.draft_seconds, round_.retrieval_seconds) == (pytest.approx(0.08), pytest.approx(0.4))
    assert round_.seconds_per_token == pytest.approx(2.48 / 8)
