"""tests/support/compare_checkouts.py sees each kind of difference, and none between runs that differ in time alone."""

from __future__ import annotations

from copy import deepcopy

import pytest

from conf.schema import RunConfig
from launch.command_line.overrides import read_config
from tests.support.compare_checkouts import CASES, COMMON, Left, differences, main

OUTPUT = "device cpu\nreading 600 tokens\ndef f\n\ntokens/s   9.3\ndevice memory   29.7 MiB planned, 900.0 KiB peak\n"
RESULT = {
    "token_ids": [1, 2],
    "text": "def f",
    "timing": {"ttft_s": 1.0},
    "speculation": {"verifications": 1, "levels": [{"name": "drafter", "proposed": 4, "accepted": 1}]},
    "memory": {"device": {"planned_bytes": 10, "peak_bytes": 9}, "process": {"planned_bytes": 7, "peak_bytes": 7}},
}


def left(**changes) -> Left:
    return Left(exit_code=0, output=OUTPUT, errors="", result=deepcopy(RESULT) | changes)


def test_time_and_measured_memory_make_no_difference():
    later = left(timing={"ttft_s": 2.0})
    later.output = OUTPUT.replace("9.3", "10,000.25").replace("900.0 KiB", "1.1 MiB")
    later.result["memory"]["process"]["planned_bytes"] = 8
    assert differences(left(), later) == []


@pytest.mark.parametrize(
    ("what", "other"),
    [
        ("tokens", left(token_ids=[1, 3])),
        ("text", left(text="def g")),
        ("keys", left(timing={"ttft": 1.0})),
        (
            "planned bytes",
            left(memory={"device": {"planned_bytes": 11, "peak_bytes": 9}, "process": {"planned_bytes": 7}}),
        ),
        ("drafts", left(speculation={"verifications": 2, "levels": []})),
        ("standard output", Left(exit_code=0, output=OUTPUT + "more\n", errors="", result=RESULT)),
        ("exit codes 0 here, 1 there", Left(exit_code=1, output="", errors="tierforce: failed")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_control_each_difference_is_seen(what, other):
    assert any(line.startswith(what) for line in differences(left(), other))


@pytest.mark.parametrize("name", CASES)
def test_every_case_is_a_legal_configuration(name):
    assert isinstance(read_config([*COMMON, *CASES[name].overrides]), RunConfig)


def test_without_another_checkout_it_tells_how_it_is_used(tmp_path, capsys):
    assert main([]) == main([str(tmp_path)]) == 2
    assert "OTHER_CHECKOUT" in capsys.readouterr().err
