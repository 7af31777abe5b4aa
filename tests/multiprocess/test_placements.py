"""Every placement, over real processes, generates the tokens of one process; under torchrun: test_runs.py."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from conf.schema import Coupling, Mode, Overlap, PlacementKind, RetrievalRuleName, SamplingConfig
from tests.multiprocess.forked_runs import Case, run_many
from tests.support.tiny_models import greedy_tokens, random_prompt, save_checkpoint, tiny_config, tiny_tokenizer
from tests.support.tiny_runs import DEVICE, DISK, HOST, generate, tiny_run

NUM_TOKENS, PROMPT = 16, random_prompt(150)
GREEDY = SamplingConfig(temperature=0.0)
GUMBEL = SamplingConfig(temperature=1.0, top_p=0.9, coupling=Coupling.gumbel)
MAXIMAL = SamplingConfig(temperature=1.0, top_p=0.9)
UNEVEN = {"hidden_size": 80, "num_attention_heads": 10, "num_key_value_heads": 5}
"""On 2 ranks 3 and 2 kv heads, on 4 ranks 2 and three times 1."""
FOUR_KV_HEADS = {"num_key_value_heads": 4}
OF_SEVERAL_RANKS = ("greedy_uneven_heads", "maximal_shared_heads", "maximal_shared_keys")
OF_WHAT_EACH_PROCESS_BUILDS = ("greedy_other_words", "maximal_other_words", "ruled", "ruled_gumbel")
"""Cases of vocabularies and rules, which every process makes from the checkpoint: two placements have them all."""
OVERLAPPED = ("greedy_ahead", "greedy_outcomes", "gumbel_ahead", "gumbel_streaming", "gumbel_outcomes")
FLAT = 1.5
"""Of the logits' spread: so that a level below is neither always right nor never."""


RULES = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 9, "eos_token_id": [*range(48, 96)]}
"""In a generation_config.json: each process reads it, and knows how long the prompt was."""


@pytest.fixture(scope="module")
def cases(checkpoints, tmp_path_factory) -> dict[str, Case]:
    target, other = checkpoints("llama", logit_spread=FLAT, **FOUR_KV_HEADS), checkpoints("llama", seed=1)
    uneven, shared = checkpoints("llama", **UNEVEN), checkpoints("llama", logit_spread=FLAT)
    other_words = save_checkpoint(
        tmp_path_factory.mktemp("other_words"), tiny_config("llama", vocab_size=98), 3, tokenizer=tiny_tokenizer(98)
    )
    ruled = shutil.copytree(target, tmp_path_factory.mktemp("ruled") / "target")
    (ruled / "generation_config.json").write_text(json.dumps(RULES))
    # A drafter that is the target itself is right where its window suffices.
    configs = {
        "greedy": tiny_run(target, target),
        "greedy_host": tiny_run(target, other, tier=HOST, rebuild="2"),
        "greedy_disk": tiny_run(target, target, tier=DISK, rule=RetrievalRuleName.mean_key, rebuild="2"),
        "greedy_uneven_heads": tiny_run(uneven, uneven, tier=HOST, summary_tokens=0),
        "maximal_shared_heads": tiny_run(shared, shared, sampling=MAXIMAL),
        "maximal_shared_keys": tiny_run(shared, shared, sampling=MAXIMAL, rule=RetrievalRuleName.mean_key, rebuild="2"),
        "greedy_other_words": tiny_run(target, other_words),
        "maximal_other_words": tiny_run(target, other_words, Mode.streaming, sampling=MAXIMAL),
        "gumbel_lookup": tiny_run(target, "lookup", Mode.streaming, sampling=GUMBEL),
        "maximal": tiny_run(target, target, sampling=MAXIMAL),
        "maximal_retrieval": tiny_run(target, "none", Mode.retrieval, sampling=MAXIMAL, tier=HOST),
        "ruled": tiny_run(ruled, target, ignore_eos=False),
        "ruled_gumbel": overlapped(tiny_run(ruled, target, sampling=GUMBEL, ignore_eos=False), Overlap.outcomes),
        "greedy_ahead": overlapped(tiny_run(target, target, tier=HOST), Overlap.ahead),
        "greedy_outcomes": overlapped(tiny_run(target, target, Mode.retrieval), Overlap.outcomes),
        "gumbel_ahead": overlapped(tiny_run(target, target, sampling=GUMBEL), Overlap.ahead),
        "gumbel_streaming": overlapped(tiny_run(target, target, Mode.streaming, sampling=GUMBEL), Overlap.outcomes),
        "gumbel_outcomes": overlapped(tiny_run(target, target, sampling=GUMBEL, tier=DISK), Overlap.outcomes),
    }
    return {name: Case(config=config, prompt=PROMPT, num_tokens=NUM_TOKENS, seed=3) for name, config in configs.items()}


def overlapped(config, overlap: Overlap):
    return replace(config, decoding=replace(config.decoding, overlap=overlap))


@pytest.fixture(scope="module")
def wanted(cases) -> dict[str, list[int]]:
    """Of one process, drafting when nothing else is done."""
    return {
        name: generate(overlapped(case.config, Overlap.off), case.prompt, case.num_tokens, case.seed).tokens
        for name, case in cases.items()
    }


@cache
def of_transformers(target: str) -> list[int]:
    return greedy_tokens(Path(target), PROMPT, NUM_TOKENS)


@pytest.mark.parametrize(
    ("kind", "num_processes"),
    [
        (PlacementKind.colocated, 1),
        (PlacementKind.colocated, 2),
        (PlacementKind.colocated, 4),
        (PlacementKind.pipeline, 4),
        (PlacementKind.pipeline, 5),
    ],
    ids=["colocated-1", "colocated-2", "colocated-4", "pipeline-1", "pipeline-2"],
)
def test_tokens_are_those_of_one_process(tmp_path, cases, wanted, kind, num_processes):
    several_verify = num_processes > (1 if kind is PlacementKind.colocated else 4)
    left_out = () if several_verify else OF_SEVERAL_RANKS
    left_out += () if num_processes in (2, 5) else OF_WHAT_EACH_PROCESS_BUILDS
    cases = {name: case for name, case in cases.items() if name not in left_out}
    results = run_many(tmp_path, kind, num_processes, cases)
    assert {name: result["tokens"] for name, result in results.items()} == {name: wanted[name] for name in cases}
    for name, case in cases.items():
        result = results[name]
        if name.startswith("greedy"):
            assert result["tokens"] == of_transformers(case.config.model.target)
        assert (result["streaming"]["bytes"] > 0) == (case.config.cache.full.tier is not DEVICE), name
    assert 0 < results["maximal"]["num_accepted"] < results["maximal"]["num_proposed"]


@pytest.mark.parametrize("name", OVERLAPPED)
def test_drafting_ahead_in_one_process_changes_no_token(cases, wanted, name):
    case = cases[name]
    assert generate(case.config, case.prompt, case.num_tokens, case.seed).tokens == wanted[name]
