"""The README's commands are the ones that CI and the code know."""

import re
import subprocess
from dataclasses import fields, is_dataclass
from operator import attrgetter
from pathlib import Path

import yaml

from conf.schema import RunConfig
from launch.benchmark.config import BenchConfig
from launch.command_line.overrides import parse_override, read_config
from launch.forecast.config import PlanConfig
from launch.sweeps.config import SweepConfig

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_ci_runs_exactly_the_test_command_of_the_readme():
    ci_command = (ROOT / ".ci/run").read_text(encoding="utf-8").strip().splitlines()[-1]
    assert ci_command in README.splitlines()


def test_hooks_of_a_commit_are_part_of_the_test_command():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    commands = {hook["id"]: hook["entry"] for hook in hooks}
    tests = commands.pop("quick-tests")
    assert commands.keys() == {"ruff-check", "ruff-format", "mypy"}
    assert all(f" && {command} && " in README for command in commands.values())
    command, *paths = tests.removeprefix(".venv/bin/python -m ").split()
    assert command == "pytest" and len(paths) > 1
    assert all((ROOT / path).exists() for path in paths if not path.startswith("-"))


# What the commands of "Writing values" set, in their order.
WRITTEN = [
    {"prompt.text": "Hello, world (really): 1+1=2", "output": "1.10"},
    {"prompt.text": "one line\nanother", "tiers.disk.folder": "/home/me/cache"},
    {"prompt.text": "It costs ${5}"},
    {"prompt.text": "null"},
    {"generation.stop": ["END", "###", "a, b"]},
    {"generation.stop_strings": ["\n\n", "<|im_end|>"]},
    {"prompt.path": "-", "prompt.max_tokens": 32000},
]


def written() -> list[str]:
    """The commands of the section on values."""
    section = README[README.index("**Writing values.**") :]
    return section.partition("```bash\n")[2].partition("```")[0].splitlines()


def words_of(command: str) -> list[str]:
    """The words that a shell gives to the program."""
    show = command.replace("torchrun launch/run.py", "show").replace("python launch/sweep.py", "show")
    script = f"zcat() {{ :; }}; show() {{ printf '%s\\0' \"$@\"; }}; {show}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


def test_values_written_as_the_readme_does_are_what_it_says(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    commands = [command for command in written() if "launch/run.py" in command]
    for command, expected in zip(commands, WRITTEN, strict=True):
        config = read_config(words_of(command))
        values = {key: attrgetter(key)(config) for key in expected}
        assert values == expected, command


def test_values_of_a_sweep_written_as_the_readme_does_are_several():
    (command,) = [command for command in written() if "launch/sweep.py" in command]
    flag, override = words_of(command)
    assert flag == "-m"
    parsed = parse_override(override, SweepConfig, is_sweep=True)
    assert list(parsed.sweep_string_iterator()) == ["'2024.10'", "'2025.10'"]
    (one,) = re.findall(r"'(prompt.text=.*?)' is one", command)
    assert parse_override(one, SweepConfig, is_sweep=True).value() == "a, b"


def keys_of(config, prefix: str = "") -> set[str]:
    """All dotted keys of a configuration."""
    keys = set()
    for item in fields(config):
        value = getattr(config, item.name)
        keys |= {prefix + item.name}
        keys |= keys_of(value, f"{prefix}{item.name}.") if is_dataclass(value) else set()
    return keys


def test_every_override_in_the_readme_is_a_key_of_the_schema():
    overrides = set(re.findall(r"(?<=\s)([a-z_]+(?:\.[a-z0-9_]+)*)=(?!=)", README))
    assert overrides, "the README shows overrides"
    others = keys_of(PlanConfig()) | keys_of(BenchConfig()) | keys_of(SweepConfig()) | {"experiment"}
    assert overrides <= keys_of(RunConfig()) | others


def test_every_group_choice_in_the_readme_has_a_file():
    for group in ("model", "hardware", "experiment"):
        choices = re.findall(rf"\b{group}=([\w.-]+)", README)
        assert choices or group == "experiment"
        for choice in choices:
            assert (ROOT / "conf" / group / f"{choice}.yaml").is_file(), choice
