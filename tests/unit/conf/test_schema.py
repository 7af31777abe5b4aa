"""conf/schema.py: defaults are legal, bad values are refused with key, value and a legal value."""

import ast
import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from conf import generation, resources, schema, values
from conf.schema import (
    CacheConfig,
    ConfigError,
    Coupling,
    DecodingConfig,
    FullCacheConfig,
    GenerationConfig,
    Mode,
    ModelConfig,
    PlacementConfig,
    PromptConfig,
    RetrievalCacheConfig,
    RunConfig,
    SamplingConfig,
    StreamingCacheConfig,
    parse_auto_count,
    to_plain,
)

GROUPS = ("CacheConfig", "TiersConfig")
"""Sections whose keys are sections."""
NAN, INF = float("nan"), float("inf")

# (class, arguments, what the message must name: full key, value, legal value)
REFUSED = [
    (ModelConfig, {"target": ""}, ["model.target", "''", "hub id"]),
    (ModelConfig, {"drafter": ""}, ["model.drafter", "lookup", "none"]),
    (DecodingConfig, {"gamma1": -1}, ["decoding.gamma1", "-1", "between 0 and 64"]),
    (DecodingConfig, {"gamma1": 65}, ["decoding.gamma1", "65", "between 0 and 64"]),
    (DecodingConfig, {"gamma2": 257}, ["decoding.gamma2", "257", "between 0 and 256"]),
    (RetrievalCacheConfig, {"chunk_size": 0}, ["cache.retrieval.chunk_size", "0", ">= 1"]),
    (RetrievalCacheConfig, {"budget": -8}, ["cache.retrieval.budget", "-8", ">= 0"]),
    (RetrievalCacheConfig, {"budget": 1001}, ["cache.retrieval.budget", "1001", "multiple", "1000"]),
    (RetrievalCacheConfig, {"budget": 3}, ["cache.retrieval.budget", "3", "for example 8"]),
    (RetrievalCacheConfig, {"rebuild": "often"}, ["cache.retrieval.rebuild", "often", "never, adaptive"]),
    (RetrievalCacheConfig, {"rebuild": "0"}, ["cache.retrieval.rebuild", "0", ">= 1"]),
    (StreamingCacheConfig, {"sinks": -1}, ["cache.streaming.sinks", "-1", ">= 0"]),
    (StreamingCacheConfig, {"window": 0}, ["cache.streaming.window", "0", ">= 1"]),
    (FullCacheConfig, {"device_layers": "-1"}, ["cache.full.device_layers", "-1", "auto"]),
    (FullCacheConfig, {"block_tokens": "0"}, ["cache.full.block_tokens", "0", "auto"]),
    (FullCacheConfig, {"stream_buffers": 1}, ["cache.full.stream_buffers", "1", "between 2 and 64"]),
    (SamplingConfig, {"temperature": -1.0}, ["sampling.temperature", "-1", "0 (greedy)"]),
    (SamplingConfig, {"temperature": NAN}, ["sampling.temperature", "nan", "0 (greedy)"]),
    (SamplingConfig, {"temperature": INF}, ["sampling.temperature", "inf", "0 (greedy)"]),
    (SamplingConfig, {"temperature": 101.0}, ["sampling.temperature", "101", "100"]),
    (SamplingConfig, {"top_p": 0.0}, ["sampling.top_p", "0.0", "at most 1"]),
    (SamplingConfig, {"top_p": -0.1}, ["sampling.top_p", "-0.1", "at most 1"]),
    (SamplingConfig, {"top_p": 1.1}, ["sampling.top_p", "1.1", "at most 1"]),
    (SamplingConfig, {"top_p": NAN}, ["sampling.top_p", "nan", "at most 1"]),
    (SamplingConfig, {"top_k": -2}, ["sampling.top_k", "-2", ">= 0"]),
    (SamplingConfig, {"seed": -1}, ["sampling.seed", "-1", "null"]),
    (SamplingConfig, {"seed": 2**64}, ["sampling.seed", str(2**64), "null"]),
    (
        SamplingConfig,
        {"block_verification": True, "coupling": Coupling.gumbel},
        ["sampling.block_verification", "True", "false"],
    ),
    (GenerationConfig, {"max_new_tokens": 0}, ["generation.max_new_tokens", "0", ">= 1"]),
    (GenerationConfig, {"max_new_tokens": -1}, ["generation.max_new_tokens", "-1", ">= 1"]),
    (GenerationConfig, {"stop": [""]}, ["generation.stop", "['']", "non-empty"]),
    (GenerationConfig, {"stop": ["x"] * 100_000}, ["generation.stop", "100000 strings", "at most 64"]),
    (PromptConfig, {"max_tokens": 0}, ["prompt.max_tokens", "0", "null"]),
    (PromptConfig, {"text": ""}, ["prompt.text", "''", "at least one character"]),
    (PromptConfig, {"text": "a", "path": "b"}, ["prompt.text", "'a'", "prompt.path"]),
    (PlacementConfig, {"device": "tpu"}, ["placement.device", "tpu", "cuda:N"]),
    (PlacementConfig, {"device": "cuda:x"}, ["placement.device", "cuda:x", "cpu"]),
    (PlacementConfig, {"threads": "0"}, ["placement.threads", "0", "auto"]),
    (PlacementConfig, {"device_memory_gib": 0.0}, ["placement.device_memory_gib", "0.0", "above 0"]),
    (PlacementConfig, {"host_memory_gib": NAN}, ["placement.host_memory_gib", "nan", "above 0"]),
]


@pytest.mark.parametrize(("kind", "arguments", "named"), REFUSED)
def test_a_bad_value_is_refused_with_key_value_and_a_legal_value(kind, arguments, named):
    with pytest.raises(ConfigError) as caught:
        kind(**arguments)
    message = str(caught.value)
    assert all(part in message for part in named), message
    assert "\n" not in message and len(message) < 300


LEGAL = [
    (DecodingConfig, {"gamma1": 0, "gamma2": 0}),
    (DecodingConfig, {"gamma1": 64, "gamma2": 256}),
    (RetrievalCacheConfig, {"budget": 0}),
    (RetrievalCacheConfig, {"budget": 8}),
    (RetrievalCacheConfig, {"budget": 10**9, "chunk_size": 1}),
    (RetrievalCacheConfig, {"rebuild": "16"}),
    (SamplingConfig, {"temperature": 0.0}),
    (SamplingConfig, {"temperature": 1e-9}),
    (SamplingConfig, {"temperature": 100.0}),
    (SamplingConfig, {"top_p": 1.0, "top_k": 10**9}),
    (SamplingConfig, {"seed": None}),
    (SamplingConfig, {"seed": 2**63}),
    (GenerationConfig, {"max_new_tokens": 1}),
    (PromptConfig, {"max_tokens": None}),
    (PlacementConfig, {"device": "cuda:1", "threads": "2"}),
]


@pytest.mark.parametrize(("kind", "arguments"), LEGAL)
def test_the_ends_of_the_legal_range_are_legal(kind, arguments):
    kind(**arguments)


def test_a_tiny_temperature_is_greedy():
    assert SamplingConfig(temperature=1e-9).is_greedy
    assert not SamplingConfig(temperature=0.01).is_greedy


@pytest.mark.parametrize(
    ("mode", "drafter", "budget", "gamma1", "gamma2", "uses_drafter", "uses_retrieval"),
    [
        (Mode.triforce, "x", 64, 2, 8, True, True),
        (Mode.triforce, "none", 64, 2, 8, False, True),
        (Mode.triforce, "lookup", 0, 2, 8, True, False),
        (Mode.triforce, "x", 64, 0, 8, False, True),
        (Mode.triforce, "x", 64, 2, 0, False, False),
        (Mode.retrieval, "x", 64, 2, 8, False, True),
        (Mode.streaming, "x", 64, 2, 8, True, False),
        (Mode.autoregressive, "x", 64, 2, 8, False, False),
    ],
)
def test_mode_and_zeros_decide_which_levels_take_part(
    mode, drafter, budget, gamma1, gamma2, uses_drafter, uses_retrieval
):
    config = RunConfig(
        model=ModelConfig(drafter=drafter),
        decoding=DecodingConfig(mode=mode, gamma1=gamma1, gamma2=gamma2),
        cache=CacheConfig(retrieval=RetrievalCacheConfig(budget=budget)),
    )
    assert (config.uses_drafter, config.uses_retrieval) == (uses_drafter, uses_retrieval)


@pytest.mark.parametrize("text", ["²", "٣", "1.5", " 1", "", "1e3"])
def test_a_count_is_ascii_digits(text):
    with pytest.raises(ConfigError, match="some.key"):
        parse_auto_count("some.key", text, ("auto",))


@pytest.mark.parametrize(
    ("typed", "text"),
    [
        (r"\n", "\n"), (r"\n\n", "\n\n"), (r"a\tb\r", "a\tb\r"), ("\n", "\n"), (r"\\n", r"\n"), ("\\\\\\n", "\\\n"),
        (r"\"\'", "\"'"), (r"\u00e9\u00E8", "éè"), (r"\ud83d\ude00", "😀"), (r"a\end{x}", r"a\end{x}"),
        (r"\usepackage", r"\usepackage"), (r"\u12", r"\u12"), ("\\", "\\"), ("###", "###"),
    ],
)  # fmt: skip
def test_escapes_in_stop_strings_are_read_and_the_key_keeps_what_was_typed(typed, text):
    config = GenerationConfig(stop=[typed])
    assert config.stop_strings == [text] and config.stop == [typed]
    assert GenerationConfig(**to_plain(config)).stop_strings == [text]


def test_an_escape_that_is_half_a_character_is_refused():
    with pytest.raises(ConfigError, match=r"generation.stop has '\\\\ud83d'; it must be a character"):
        GenerationConfig(stop=[r"\ud83d"])


def test_the_whole_configuration_becomes_json():
    plain = to_plain(RunConfig())
    assert json.loads(json.dumps(plain)) == plain
    assert plain["decoding"]["mode"] == "triforce" and plain["generation"]["stop"] == []


@pytest.mark.parametrize("module", [schema, generation, resources, values], ids=lambda module: module.__name__)
def test_the_schema_needs_the_standard_library_only(module):
    tree = ast.parse(Path(module.__file__).read_text())
    imported = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported - {"conf"} <= sys.stdlib_module_names


@pytest.mark.parametrize("module", [generation, resources], ids=lambda module: module.__name__)
def test_every_key_is_documented(module):
    for section in ast.parse(Path(module.__file__).read_text()).body:
        if isinstance(section, ast.ClassDef) and section.name not in GROUPS:
            for key, below in pairwise(section.body):
                if isinstance(key, ast.AnnAssign):
                    documented = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
                    assert documented, f"{section.name}.{ast.unparse(key)} has no docstring"


def test_the_schema_is_the_door_to_all_of_the_configuration():
    defined = {name for module in (generation, resources) for name in vars(module) if name.endswith("Config")}
    words = {name for name, value in vars(values).items() if getattr(value, "__module__", "") == values.__name__}
    assert defined | words <= set(schema.__all__)
