"""The measurement on a GPU, as far as a machine without one can run it: the whole program on tiny shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from launch.assembly.prepare import prepare
from launch.measure.gpu import main
from launch.measure.gpu_config import GpuPart
from launch.measure.gpu_copies import Copies
from launch.measure.gpu_decoding import AUTOREGRESSIVE, Speculating, decoding_rows
from launch.measure.gpu_setting import SAMPLE_SECONDS
from launch.measure.levels_in_turns import LevelsInTurns, Sample
from tests.support.tiny_models import greedy_tokens, random_prompt
from tests.support.tiny_runs import DEVICE, HOST, tiny_run

ROOT = Path(__file__).resolve().parents[4]


@pytest.mark.parametrize(("tier", "rebuild"), [(DEVICE, "adaptive"), (HOST, "adaptive"), (HOST, "1")])
def test_ways_in_turns_write_one_text_the_target_s_greedy_one(checkpoints, tier, rebuild):
    folder, drafter, prompt = checkpoints("llama"), checkpoints("llama", seed=3), random_prompt(150)
    config = tiny_run(folder, drafter, tier=tier, rebuild=rebuild)
    levels = LevelsInTurns(config, prepare(config), None, prompt, 250)
    levels.start()
    samples = []
    for _ in range(2):
        samples.append(levels.autoregressive(4))
        samples += [levels.triforce(9, gamma2=gamma2, graphs=graphs) for gamma2 in (3, 6) for graphs in (False, True)]
    tokens = levels._hierarchy.session.generated
    levels.close()
    assert len(tokens) > 2 * (4 + 4 * 9)
    assert tokens == greedy_tokens(folder, prompt, len(tokens))
    assert [sample.num_tokens for sample in samples[::5]] == [4, 4]
    assert all(sample.num_tokens >= 9 for sample in samples if sample.num_proposed)
    assert all((sample.gb_per_s is not None) == (tier is HOST) for sample in samples)


def test_weights_that_are_loaded_are_used_again(checkpoints):
    config = tiny_run(checkpoints("llama"), checkpoints("llama", seed=3))
    prepared = prepare(config)
    first = LevelsInTurns(config, prepared, None, random_prompt(60), 60)
    second = LevelsInTurns(config, prepared, first.target, random_prompt(60), 60)
    assert second.target is first.target
    for levels in (first, second):
        levels.start()
        levels.close()


def test_table_has_medians_and_ratios_to_autoregressive_decoding():
    plain = [Sample(num_tokens=4, num_rounds=4, seconds=seconds, phases={"verify": seconds}) for seconds in (4, 8, 40)]
    faster = Sample(
        num_tokens=10, num_rounds=2, seconds=5.0, phases={"draft": 1.0, "verify": 2.0}, num_proposed=16, num_accepted=8
    )
    first, second = decoding_rows({AUTOREGRESSIVE: plain, Speculating(8, True): [faster]})
    assert first["TBT, ms"] == 2000 and first["least"] == 1000 and first["most"] == 10_000
    assert second["TBT, ms"] == 500 and second["against autoregressive"] == 4
    assert second["tokens per verification"] == 5 and second["acceptance"] == 0.5
    assert second["draft, ms a round"] == 500 and second["retrieval, ms a round"] is None
    assert decoding_rows({AUTOREGRESSIVE: [], Speculating(8, True): []}) == []


def test_the_whole_program_runs_on_tiny_shapes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert main(["smoke=true", f"output={tmp_path / 'out'}", f"models={tmp_path / 'pair'}"]) == 0
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert len(results["tables"]) == 6
    (offloaded,) = (rows for title, rows in results["tables"].items() if "offloaded, budget" in title)
    assert [row["way"] for row in offloaded] == [
        "autoregressive",
        "triforce, gamma2=4, graphs off",
        "triforce, gamma2=4, graphs on",
    ]
    assert all(row["TBT, ms"] > 0 and row["streamed, GB/s"] > 0 for row in offloaded)
    page = (tmp_path / "out/results.md").read_text()
    assert page in capsys.readouterr().out
    for cell in GpuPart:
        assert f"- {cell}: " in page


def test_a_part_that_fails_or_has_no_time_leaves_the_others(tmp_path, monkeypatch, capsys):
    def fail(self, block_bytes):
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(Copies, "measure_blocks", fail)
    assert main(["smoke=true", "cells=[attention,copies]", f"output={tmp_path}"]) == 1
    out = capsys.readouterr().out
    assert "copies: failed: RuntimeError: no such kernel (copies.log)" in out
    assert "no such kernel" in (tmp_path / "copies.log").read_text()
    assert "Attention of one layer" in out


def test_what_there_is_no_time_for_is_left_out_and_said_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    places = [f"output={tmp_path / 'out'}", f"models={tmp_path / 'pair'}"]
    assert main(["smoke=true", "cells=[attention]", "deadline_s=1e-9", *places]) == 0
    assert "attention: left out, there was no time" in capsys.readouterr().out
    assert main(["smoke=true", "cells=[on_chip]", f"deadline_s={SAMPLE_SECONDS - 1}", *places]) == 0
    assert "on_chip: out of time after 0 repetitions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "smoke is False; it must be true on a machine without a CUDA device"),
        (["cells=[everything]"], "cells is 'everything'; it must be of copies, offloaded"),
        (["smoke=true", "repetitions=0"], "repetitions is 0; it must be >= 1"),
        (["smoke=true", "depth=3"], "depth"),
    ],
    ids=str,
)
def test_a_bad_configuration_is_refused(tmp_path, capsys, monkeypatch, overrides, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([*overrides, f"output={tmp_path / 'out'}"]) == 2
    assert message in capsys.readouterr().err
