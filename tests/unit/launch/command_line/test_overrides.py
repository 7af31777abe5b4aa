"""launch/command_line/overrides.py: the configuration of a run, and of every program, has what was typed."""

from __future__ import annotations

from pathlib import Path

import pytest

from conf.schema import ConfigError
from launch.analysis.config import AnalyzeConfig, check_start
from launch.benchmark.config import read_bench_config
from launch.command_line.overrides import compose_program, read_config
from launch.demo_pair import checkpoint, training_config
from launch.forecast.config import read_plan_config
from launch.measure import acceptance, gpu_config, stream

SCHEMAS = (checkpoint.WidenConfig, training_config.TrainDemoConfig, AnalyzeConfig)
MEASURES = (acceptance.MeasureAcceptanceConfig, gpu_config.MeasureGpuConfig, stream.MeasureStreamConfig)
"""Their modules tell Hydra of them."""


def test_the_configuration_of_a_run_has_the_texts_that_were_typed():
    config = read_config(
        [
            "prompt.text=Hello, world (really): a=b",
            "output=1.10",
            "model.target=1e3",
            "model.drafter=007",
            "tiers.disk.folder=true",
            "generation.stop=[1.10,\\n]",
            "prompt.task=question",
            "prompt.question=Who is ${prompt.text}, for \\${5?",
        ]
    )
    assert config.prompt.text == "Hello, world (really): a=b"
    assert (config.output, config.model.target, config.model.drafter) == ("1.10", "1e3", "007")
    assert config.tiers.disk.folder == "true" and config.generation.stop == ["1.10", "\\n"]
    assert config.prompt.question == "Who is Hello, world (really): a=b, for ${5?"


# (program, overrides, the key whose text they set)
PROGRAMS = [
    ("widen", "source"),
    ("widen", "shape"),
    ("widen", "output"),
    ("train_demo", "work"),
    ("train_demo", "assets"),
    ("train_demo", "refine_pair"),
    ("analyze", "output"),
    ("analyze", "model.target"),
    ("measure_stream", "folder"),
    ("measure_gpu", "models"),
    ("measure_acceptance", "target"),
]
NEEDED = {"train_demo": ["books=texts"], "measure_acceptance": ["documents={a: b.txt}"]}


def value_at(config, key: str):
    for name in key.split("."):
        config = getattr(config, name)
    return config


@pytest.mark.parametrize(("name", "key"), PROGRAMS)
def test_every_program_takes_texts_as_typed_and_expands_the_home_directory(name, key, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for typed, expected in (("1.10", "1.10"), ("~/a (b), c", "/home/me/a (b), c")):
        config = compose_program(name, [*NEEDED.get(name, []), f"{key}={typed}"], "")
        assert value_at(config, key) == expected
    with pytest.raises(ConfigError, match=rf"{key} is '~nobody-here/x'; .*no user 'nobody-here'"):
        compose_program(name, [*NEEDED.get(name, []), f"{key}=~nobody-here/x"], "")


def test_bench_and_plan_take_texts_as_typed(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    bench = read_bench_config(["prompt.path=2024.10", "output=~/b", "only=[autoregressive]", "contenders.mine=a.b=c d"])
    assert (bench.prompt.path, bench.output) == ("2024.10", "/home/me/b")
    assert bench.only == ["autoregressive"] and bench.contenders["mine"] == "a.b=c d"
    plan = read_plan_config(["model.target=1e3", "tiers.disk.folder=~/d", "hardware=rtx4090"])
    assert (plan.model.target, plan.tiers.disk.folder) == ("1e3", "/home/me/d")


def test_documents_are_paths_as_typed(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("2024.10", "a b.txt"):
        Path(name).write_text("text")
    config = compose_program("analyze", ["documents={x: 2024.10, y: ~/a b.txt}"], "")
    check_start(config)
    paths = [prompt.path for prompt in config.named_documents.values()]
    assert paths == ["2024.10", str(tmp_path / "a b.txt")]


@pytest.mark.parametrize(
    ("path", "named"), [("~nobody-here/x", "documents.a is '~nobody-here/x'"), ("-", "documents is {'a': '-'}")]
)
def test_a_document_that_cannot_be_read_twice_or_is_nobodys_is_refused(path, named):
    with pytest.raises(ConfigError) as refusal:
        check_start(compose_program("analyze", [f"documents={{a: {path}}}"], ""))
    assert named in str(refusal.value)


def test_standard_input_is_refused_where_the_prompt_is_read_more_than_once():
    with pytest.raises(ConfigError, match="prompt.path is '-'; it must be a file, which each cell reads anew"):
        read_bench_config(["prompt.path=-"])
