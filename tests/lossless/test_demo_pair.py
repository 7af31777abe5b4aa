"""The embedded demo pair gives transformers' own tokens; under the gumbel coupling, those of autoregressive decoding.

Trained models are tested beside random ones because they accept: most of their tokens were drafted, in long blocks.
"""

from __future__ import annotations

import sysconfig
from functools import cache
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from conf.schema import Coupling, Mode, SamplingConfig
from tests.support.tiny_models import greedy_tokens
from tests.support.tiny_runs import DEVICE, DISK, HOST, Generated, generate, tiny_run

ASSETS = Path(__file__).resolve().parents[2] / "assets/demo"
STDLIB = Path(sysconfig.get_paths()["stdlib"])
GUMBEL = SamplingConfig(temperature=0.8, top_p=0.9, coupling=Coupling.gumbel)
# Packages of the standard library, and how many tokens of their source are read.
LONG_PROMPTS = {"multiprocessing": 16640, "asyncio": 16384, "unittest": 8192, "importlib": 4096}
NUM_LONG_TOKENS = 256
NUM_PROMPT_TOKENS, NUM_TOKENS = 1500, 48


@cache
def prompt_of(package: str, num_tokens: int) -> list[int]:
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted((STDLIB / package).rglob("*.py")))
    ids = AutoTokenizer.from_pretrained(ASSETS / "target")(text[: 8 * num_tokens], verbose=False)["input_ids"]
    assert len(ids) > num_tokens
    return ids[:num_tokens]


@cache
def transformers_tokens(package: str, num_prompt_tokens: int, num_tokens: int) -> list[int]:
    return greedy_tokens(ASSETS / "target", prompt_of(package, num_prompt_tokens), num_tokens)


def run(package: str, num_prompt_tokens: int, num_tokens: int, mode: Mode, tier, **options) -> Generated:
    options = {"budget": 512, "gamma2": 8, "window": 508} | options
    config = tiny_run(ASSETS / "target", ASSETS / "drafter", mode, tier, **options)
    config.cache.full.block_tokens = "128"
    return generate(config, prompt_of(package, num_prompt_tokens), num_tokens)


@cache
def autoregressive_tokens(package: str, num_prompt_tokens: int, num_tokens: int) -> list[int]:
    return run(package, num_prompt_tokens, num_tokens, Mode.autoregressive, DEVICE, sampling=GUMBEL).tokens


@pytest.mark.parametrize("tier", [DEVICE, HOST, DISK])
@pytest.mark.parametrize("mode", list(Mode))
def test_greedy_tokens_are_those_of_transformers(mode, tier):
    prompt = ("email", NUM_PROMPT_TOKENS, NUM_TOKENS)
    assert run(*prompt, mode, tier).tokens == transformers_tokens(*prompt)


@pytest.mark.parametrize("mode", [Mode.triforce, Mode.retrieval, Mode.streaming])
def test_gumbel_tokens_are_those_of_autoregressive_decoding(mode):
    prompt = ("email", NUM_PROMPT_TOKENS, NUM_TOKENS)
    assert run(*prompt, mode, HOST, sampling=GUMBEL).tokens == autoregressive_tokens(*prompt)


def test_most_tokens_were_drafted():
    result = run("email", NUM_PROMPT_TOKENS, NUM_TOKENS, Mode.triforce, DEVICE)
    assert result.num_accepted > NUM_TOKENS / 2


@pytest.mark.slow
@pytest.mark.parametrize("tier", [DEVICE, HOST, DISK])
@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("package", LONG_PROMPTS)
def test_greedy_tokens_after_long_prompts_are_those_of_transformers(package, mode, tier):
    prompt = (package, LONG_PROMPTS[package], NUM_LONG_TOKENS)
    assert run(*prompt, mode, tier).tokens == transformers_tokens(*prompt)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [Mode.triforce, Mode.retrieval, Mode.streaming])
@pytest.mark.parametrize("package", LONG_PROMPTS)
def test_gumbel_tokens_after_long_prompts_are_those_of_autoregressive_decoding(package, mode):
    prompt = (package, LONG_PROMPTS[package], NUM_LONG_TOKENS)
    assert run(*prompt, mode, HOST, sampling=GUMBEL).tokens == autoregressive_tokens(*prompt)
