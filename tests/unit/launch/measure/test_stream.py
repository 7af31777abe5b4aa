"""The program runs, and what it calls the stream's rate is that of the bytes it streamed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from launch.measure import stream as measure_stream

ROOT = Path(__file__).resolve().parents[4]


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_the_program_runs(tmp_path, capsys, tier):
    cfg = OmegaConf.load(ROOT / "conf/measure_stream.yaml")
    changes = {
        "tiers": [tier],
        "folder": str(tmp_path),
        "mib": 4,
        "block_mib": [1],
        "readers": [1, 2],
        "repetitions": 1,
    }
    measure_stream.main.__wrapped__(OmegaConf.merge(cfg, changes))
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["readers"] for row in rows] == ([1] if tier == "host" else [1, 2])
    for row in rows:
        assert row["ratio"] == pytest.approx(row["stream_gb_per_s"] / row["plain_gb_per_s"])
        assert 0 <= row["overlap"] <= 1
    assert not list(tmp_path.iterdir())
