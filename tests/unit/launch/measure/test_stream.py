"""The program runs, and what it calls the stream's rate is that of the bytes it streamed."""

from __future__ import annotations

import json

import pytest

from launch.measure import stream as measure_stream


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_the_program_runs(tmp_path, capsys, tier):
    changes = {
        "tiers": f"[{tier}]",
        "folder": tmp_path,
        "mib": 4,
        "block_mib": "[1]",
        "readers": "[1,2]",
        "repetitions": 1,
    }
    assert measure_stream.main([f"{key}={value}" for key, value in changes.items()]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["readers"] for row in rows] == ([1] if tier == "host" else [1, 2])
    for row in rows:
        assert row["ratio"] == pytest.approx(row["stream_gb_per_s"] / row["plain_gb_per_s"])
        assert 0 <= row["overlap"] <= 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tiers=[tape]"], "tape"),
        (["mib=0"], "mib is 0; it must be >= 1"),
        (["block_mib=[8]", "mib=4"], "block_mib is [8]; it must be at most mib=4"),
        (["folder=/nowhere", "mib=1", "block_mib=[1]", "tiers=[disk]"], "mib is 1, for which there is no room"),
    ],
    ids=str,
)
def test_bad_input_is_refused_in_one_line(capsys, overrides, message):
    assert measure_stream.main(overrides) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
