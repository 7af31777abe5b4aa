"""launch/plan.py: what it predicts for the published runs, what it refuses, and that it loads no model."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conf.model_shapes import PUBLISHED, model_shape
from conf.schema import ConfigError
from launch import plan
from launch.forecast.config import read_plan_config
from launch.forecast.forecast import Forecast
from launch.forecast.forecast import forecast as forecast_of
from launch.forecast.machine import measured

ROOT = Path(__file__).resolve().parents[3]
OFFLOADED = ["prompt.max_tokens=127000", "decoding.gamma1=1", "generation.max_new_tokens=256"]
STRETCHED = "model.max_positions=131072"
"""The demo pair has 32,768 positions."""


def forecast(*overrides: str) -> Forecast:
    config = read_plan_config([*OFFLOADED, *overrides])
    return forecast_of(config, measured(config.hardware, Path()))


def test_published_time_between_tokens_on_two_4090s_is_met_within_a_tenth():
    """Llama2-7B-128K: 108 ms against 840 with 9 and 12 layers on the device (arXiv 2404.11912, table 3)."""
    settings = ["model=llama2-7b-128k", "hardware=rtx4090x2", "cache.retrieval.budget=12288", "decoding.gamma2=16"]
    made = forecast(*settings)
    assert made.round.seconds_per_token == pytest.approx(0.108, rel=0.1)
    plain = forecast(*settings, "cache.full.device_layers=12", "decoding.mode=autoregressive")
    assert plain.autoregressive_seconds == pytest.approx(0.840, rel=0.1)


def test_quantised_chunks_let_a_budget_fit_and_drafting_takes_longer():
    settings = ["model=llama2-7b-128k", "hardware=rtx4090", "decoding.gamma2=16"]
    large = [*settings, "cache.retrieval.budget=12288"]
    with pytest.raises(ConfigError, match="a smaller cache.retrieval.budget"):
        forecast(*large)
    assert forecast(*large, "cache.retrieval.dtype=int8").plan.sizes.num_host_layers == 32
    exact, int4 = forecast(*settings), forecast(*settings, "cache.retrieval.dtype=int4")
    assert int4.plan.device_bytes["retrieval cache"] < exact.plan.device_bytes["retrieval cache"]
    assert int4.round.retrieval_seconds > exact.round.retrieval_seconds


def test_forecast_of_autoregressive_decoding_has_no_draft():
    made = forecast("model=llama3.1-8b", "hardware=h200", "decoding.mode=autoregressive")
    assert made.round.draft_seconds == made.round.retrieval_seconds == 0
    assert made.round.seconds_per_token == pytest.approx(made.autoregressive_seconds)


KNOWN = [
    "hardware.device_gb_per_s=10",
    "hardware.device_tflops=1",
    "hardware.link_gb_per_s=10",
    "hardware.disk_gb_per_s=1",
    "hardware.device_memory_gib=4",
    "hardware.host_memory_gib=4",
    "hardware.disk_gib=100",
]


@pytest.mark.parametrize("name", ["this", "rtx4090"])
def test_a_machine_that_is_renamed_has_the_same_plan(name):
    settings = [f"hardware={name}", STRETCHED, *KNOWN, "cache.full.tier=host"]
    plans = [forecast(*settings, *more).plan for more in ([], ["hardware.name=abacus"], ["hardware.name=this machine"])]
    assert plans[0] == plans[1] == plans[2]
    assert (plans[0].sizes.hidden_tier == "host") == (name == "rtx4090"), "beside a GPU, the host has the hidden states"


def test_device_and_host_are_one_memory_unless_the_machine_has_a_gpu():
    settings = ["hardware=this", STRETCHED, *KNOWN, "cache.full.tier=host"]
    alone, beside = forecast(*settings).plan, forecast(*settings, "hardware.has_gpu=true").plan
    assert (alone.sizes.hidden_tier, beside.sizes.hidden_tier) == ("device", "host")
    need = sum(alone.totals[tier] for tier in ("device", "host")) / 2**30
    tight = [f"hardware.{tier}_memory_gib={0.9 * need}" for tier in ("device", "host")]
    assert forecast(*settings, "hardware.has_gpu=true", *tight).plan.sizes == beside.sizes
    with pytest.raises(ConfigError, match="GiB on the host"):
        forecast(*settings, *tight)


def test_a_budget_of_more_than_the_prompt_is_cut_to_it_as_in_a_run():
    made = forecast("model=llama3.1-8b", "hardware=h200", "prompt.max_tokens=1000", "cache.retrieval.budget=4096")
    assert made.plan.sizes.retrieval.budget == 1000


def test_parameters_of_published_models_are_those_in_their_names():
    sizes = {
        "NousResearch/Yarn-Llama-2-7b-128k": 6.74e9,
        "NousResearch/Yarn-Llama-2-13b-128k": 13.0e9,
        "JackFram/llama-68m": 68e6,
        "meta-llama/Llama-3.1-8B": 8.03e9,
        "meta-llama/Llama-3.2-3B": 3.21e9,
        "meta-llama/Llama-3.2-1B": 1.24e9,
        "Qwen/Qwen2.5-7B": 7.62e9,
        "Qwen/Qwen2.5-0.5B": 0.49e9,
        "Qwen/Qwen3-8B": 8.19e9,
        "Qwen/Qwen3-0.6B": 0.6e9,
    }
    for name, size in sizes.items():
        assert PUBLISHED[name].num_parameters == pytest.approx(size, rel=0.02), name


def test_every_pair_of_the_configuration_can_be_planned():
    for path in (ROOT / "conf/model").glob("*.yaml"):
        if path.stem != "demo":
            for name in re.findall(r"^(?:target|drafter): (\S+)$", path.read_text(), re.MULTILINE):
                assert name in PUBLISHED, path


def test_a_folder_is_planned_from_its_config_json():
    shape = model_shape("model.target", "demo", str(ROOT / "assets/demo/target"))
    assert (shape.num_layers, shape.num_kv_heads, shape.head_dim, shape.ties_embeddings) == (6, 2, 128, True)
    assert shape.num_parameters == pytest.approx(5.64e6, rel=0.01)


def test_an_unknown_model_is_refused():
    with pytest.raises(ConfigError, match="model.target is 'nobody/nothing', whose sizes are not known"):
        forecast("model.target=nobody/nothing", "hardware=h200")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["prompt.max_tokens=100000"], ["32768 tokens", "100000", "prompt.max_tokens=32768", "model.max_positions"]),
        (["model=qwen3-8b", "prompt.max_tokens=100000"], ["40960 tokens", "100000"]),
        (["model=llama2-7b-128k", "prompt.max_tokens=131073"], ["131072 tokens", "131073"]),
        (["model.max_positions=65536", "prompt.max_tokens=65537"], ["65536 tokens", "65537"]),
        (["model.max_positions=32768", "prompt.max_tokens=100"], ["model.max_positions is 32768", "above the 32768"]),
        (
            ["model=llama2-7b-128k", "prompt.max_tokens=1000", "cache.streaming.window=2000"],
            ["cache.streaming.window is 2000", "2048 positions"],
        ),
    ],
)
def test_what_the_models_have_no_positions_for_is_not_planned(overrides, words):
    with pytest.raises(ConfigError) as refused:
        forecast("hardware=h200", *overrides)
    assert all(word in str(refused.value) for word in words), refused.value


def test_new_tokens_without_a_position_are_not_planned_and_that_is_said():
    made = forecast("hardware=h200", "prompt.max_tokens=32760", "generation.max_new_tokens=100")
    assert made.notes == [
        "generation.max_new_tokens=100 is cut to 9: the model has 32768 positions, the prompt takes 32760"
    ]
    assert forecast("hardware=h200", "prompt.max_tokens=32660", "generation.max_new_tokens=100").notes == []


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"max_position_embeddings": 8192}, 8192),
        ({"max_position_embeddings": 8192, "rope_scaling": {"type": "linear", "factor": 4.0}}, 32768),
        ({"max_position_embeddings": 8192, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, 16384),
        (
            {
                "max_position_embeddings": 4096,
                "rope_scaling": {"type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096},
            },
            131072,
        ),
        ({"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 131072),
        ({"text_config": {"max_position_embeddings": 4096}}, 4096),
    ],
)
def test_positions_of_a_folder_include_rope_scaling(tmp_path, fields, wanted):
    known = json.loads((ROOT / "assets/demo/target/config.json").read_text())
    known = {key: value for key, value in known.items() if not key.startswith(("rope", "max_position"))}
    if "text_config" in fields:
        known = {"text_config": known | fields["text_config"]}
    else:
        known |= fields
    (tmp_path / "config.json").write_text(json.dumps(known))
    assert model_shape("model.target", "m", str(tmp_path)).max_positions == wanted


def run(*overrides: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "launch/plan.py", *overrides]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_prints_bytes_and_times():
    result = run("model=llama2-7b-128k", "hardware=rtx4090x2", *OFFLOADED)
    assert result.returncode == 0, result.stderr
    for word in ("target weights", "retrieval cache", "TTFT", "TBT, triforce", "TBT, autoregressive", "on the host"):
        assert word in result.stdout


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model=llama2-13b-128k", "hardware=rtx4090", *OFFLOADED], ["needs", "GiB on the device", "smaller model"]),
        (["hardware=abacus"], ["hardware", "abacus"]),
        (["hardware.num_devices=0"], ["hardware.num_devices is 0", ">= 1"]),
        (["hardware=h200", "hardware.disk_gb_per_s=0"], ["hardware.disk_gb_per_s is 0", "above 0"]),
        (["hardware=h200", "prompt.max_tokens=100000"], ["100000", "32768", "model.max_positions"]),
        (["hardware=rtx4090", "hardware.num_devices=3"], ["hardware.num_devices is 3", "2 kv heads"]),
        (["expected.retrieval_acceptance=1.5"], ["expected.retrieval_acceptance is 1.5", "between 0 and 1"]),
        (["prompt.max_tokens=null"], ["prompt.max_tokens"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_what_cannot_be_planned_is_refused_in_one_message(capsys, overrides, words):
    assert plan.main(overrides) == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    assert all(word in errors for word in words), errors


def test_the_program_ends_with_the_code_of_its_refusal():
    result = run("hardware=abacus")
    assert result.returncode == 2
    assert result.stderr.startswith("tierforce: ") and "abacus" in result.stderr


@pytest.mark.parametrize("name", ["plan", "bench", "analyze", "widen", "measure.gpu"])
def test_help_shows_the_defaults(name, capsys):
    program = importlib.import_module(f"launch.{name}")
    with pytest.raises(SystemExit) as ended:
        program.main(["--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "output:" in out and "key=value" in out
