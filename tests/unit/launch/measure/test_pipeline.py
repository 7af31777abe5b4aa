"""launch/measure/pipeline.py: its tables, on a tiny model in one process."""

from __future__ import annotations

import re
from functools import partial

import pytest

from launch.measure import pipeline as measure_pipeline
from tests.support.tiny_models import random_prompt


@pytest.fixture
def overrides(checkpoints, tmp_path, monkeypatch) -> list[str]:
    target = checkpoints("llama")
    monkeypatch.chdir(tmp_path)
    return [
        f"model.target={target}",
        f"model.drafter={target}",
        "model.dtype=float32",
        "model.self_check=false",
        "cache.streaming.window=40",
        "cache.full.block_tokens=16",
        "generation.max_new_tokens=12",
        f'prompt.text="{" ".join(f"t{token}" for token in random_prompt(100))}"',
    ]


def rows(capsys) -> list[list[str]]:
    lines = capsys.readouterr().out.splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def test_verifications_by_ranks(overrides, capsys):
    assert measure_pipeline.main(["verification", *overrides]) == 0
    head, rule, *found = rows(capsys)
    assert all(len(row) == len(head) == len(rule) for row in found) and len(found) == 3
    assert all(row[:2] == ["inline", "1"] and re.fullmatch(r"\d+\.\d ms", row[2]) for row in found)


def test_what_overlap_brings_under_both_couplings(overrides, capsys):
    one_row = partial(measure_pipeline.overlap, links=(0.01,), acceptances=(["cache.retrieval.budget=32"],))
    measure_pipeline.measure(["overlap", *overrides], {"overlap": one_row})
    head, rule, *found = rows(capsys)
    assert all(len(row) == len(head) == len(rule) for row in found)
    assert [row[:2] for row in found] == [["maximal", "0.01 GB/s"], ["gumbel", "0.01 GB/s"]]
    for row in found:
        assert all(re.fullmatch(r"\d+\.\d ms, \d+\.\d\dx, \d+%", cell) for cell in row[5:])


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ([], "''"),
        (["speed"], "'speed'"),
        (["overlap", "gamma=1"], "gamma"),
        (["overlap", "decoding.mode=autoregressive"], "decoding.mode is 'autoregressive'; it must be triforce"),
    ],
)
def test_bad_input_is_refused(argv, named, capsys):
    assert measure_pipeline.main(argv) == 2
    assert named in capsys.readouterr().err
