"""launch/command_line/as_typed.py: what Hydra reads of a text key is what was typed."""

from __future__ import annotations

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from conf.schema import RunConfig
from launch.analysis.config import AnalyzeConfig
from launch.benchmark.config import BenchConfig
from launch.command_line.as_typed import as_typed, is_in_quotes

PARSER = OverridesParser.create()


def read(override: str, schema: type = RunConfig):
    """The value that Hydra reads."""
    value = PARSER.parse_override(as_typed(override, schema)).value()
    config = OmegaConf.create()
    OmegaConf.update(config, "value", value)
    return OmegaConf.to_container(config, resolve=True)["value"]


def values_of(override: str, schema: type = RunConfig) -> list:
    """The values that Hydra sweeps over."""
    parsed = PARSER.parse_override(as_typed(override, schema, is_sweep=True))
    assert parsed.is_sweep_override(), override
    return [PARSER.parse_override(f"k={text}").value() for text in parsed.sweep_string_iterator()]


NUMBERS = ["1.10", "2024.10", "1e3", "007", "0x1F", "1_000", "-1", "+5", ".5", "5.", "nan", "inf", "-inf", "1e400"]
WORDS = ["true", "False", "off", "yes", "NULL", "None", "none", "~", "-", "--", "", " ", "???x"]
TEXTS = [
    "Hello, world (really): a=b", "a (b", "a) b", "'tis", "don't", '"a" and "b"', '"Hello," she said', "[a, b]",
    "{a: b}", "a b ", " a", "a\nb", "a\tb", "\\", "a\\", "a\\n", "C:\\x\\", "\\\\", "$HOME", "$", "100 %", "a#b",
    "a@b", "!x", "a|b", "*", "choice(a,b)", "range(1,3)", "int(3)", "héllo wörld", "日本語。", "\xa0x", "=", "a==b",
    "~/x y", "~", "x,", ",", "a;b", "'", '"', "\u2028", "(" * 2000,
]  # fmt: skip


@pytest.mark.parametrize("text", [*NUMBERS, *WORDS, *TEXTS], ids=lambda text: ascii(text)[:20])
@pytest.mark.parametrize("key", ["prompt.text", "+output", "++tiers.disk.folder"])
def test_a_text_key_has_the_text_that_was_typed(key, text):
    assert read(f"{key}={text}") == text


ANY_TEXT = st.text(st.sampled_from("ab1. '\"\\$}[]()=,:\n\t#é~@!|&*?/-"), max_size=12)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(text=ANY_TEXT.filter(lambda text: not is_in_quotes(text) and text != "???"))
def test_any_text_that_is_not_in_quotes_is_what_was_typed(text):
    assert read(f"prompt.text={text}") == text
    assert as_typed(as_typed(f"prompt.text={text}", RunConfig), RunConfig) == as_typed(f"prompt.text={text}", RunConfig)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("null", None),
        ('"null"', "null"),
        ("'null'", "null"),
        ('"Hello, world"', "Hello, world"),
        ("'it\\'s'", "it's"),
        ("'\"a\"'", '"a"'),
        ("\\${x}", "${x}"),
        ("cost: \\${5", "cost: ${5"),
        ("'\\${x}'", "${x}"),
    ],
)
def test_null_quotes_and_references_keep_their_meaning(value, expected):
    assert read(f"prompt.text={value}") == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("[1.10,007,true,a b]", ["1.10", "007", "true", "a b"]),
        ('["x, y", END]', ["x, y", "END"]),
        (r"[\n\n,\t]", [r"\n\n", r"\t"]),
        (r'["\n"]', [r"\n"]),
        ("[[TOOL_CALLS],f(x),don't]", ["[TOOL_CALLS]", "f(x)", "don't"]),
        ("[</s>,###,#]", ["</s>", "###", "#"]),
        ("['[',\"it's\"]", ["[", "it's"]),
        ("[]", []),
    ],
)
def test_texts_in_a_list_are_as_typed(value, expected):
    assert read(f"generation.stop={value}") == expected


def test_texts_in_a_dictionary_are_as_typed():
    assert read("prompt={path: 2024.10, max_tokens: 5}") == {"path": "2024.10", "max_tokens": 5}
    assert read("cache={full: {device_layers: 03}, retrieval: {budget: 8}}") == {
        "full": {"device_layers": "03"},
        "retrieval": {"budget": 8},
    }
    assert read("documents={a: 1.10, b: ~/b c.txt}", AnalyzeConfig) == {"a": "1.10", "b": "~/b c.txt"}
    assert read("++documents.a=1.10", AnalyzeConfig) == "1.10"
    assert read("++contenders.mine=decoding.gamma1=4 x", BenchConfig) == "decoding.gamma1=4 x"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("decoding.gamma1=3", 3),
        ("decoding.gamma1=auto", "auto"),
        ("sampling.temperature=1e-1", 0.1),
        ("cache.retrieval.rebuild=4", "4"),
        ("prompt.max_tokens=null", None),
        ("grid.contexts=[16384]", [16384]),
        ("nowhere.at.all=1.10", 1.1),
        ("prompt.text.more=1.10", 1.1),
        ("model=llama3.1-8b", "llama3.1-8b"),
    ],
)
def test_other_keys_have_the_value_that_hydra_reads(override, expected):
    assert read(override, BenchConfig) == expected


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("prompt.path=2024.10,2025.10", ["2024.10", "2025.10"]),
        ("prompt.path=null, 007", [None, "007"]),
        ('prompt.text="Hello, world",true', ["Hello, world", "true"]),
        ("prompt.text=choice(1.10,a b)", ["1.10", "a b"]),
        ("generation.stop=[1.10],[a,b]", [["1.10"], ["a", "b"]]),
        ("model=demo,llama3.1-8b", ["demo", "llama3.1-8b"]),
        ("sampling.seed=1,2", [1, 2]),
        ("sampling.seed=range(1,3)", [1, 2]),
    ],
)
def test_commas_separate_the_values_of_a_sweep(override, expected):
    assert values_of(override) == expected


def test_one_value_of_a_sweep_is_as_typed():
    for text in ["1.10", '"Hello, world"', "a (b", " x"]:
        assert not PARSER.parse_override(as_typed(f"prompt.text={text}", RunConfig, is_sweep=True)).is_sweep_override()
