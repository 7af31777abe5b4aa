"""A checkpoint's generation_config.json, obeyed exactly at every level, with the tokens before each place.

By enumeration: the law under rules that depend on drafted tokens, with drafts that break them; rules that look at the
wrong tokens are seen to fail. On checkpoints: the tokens of transformers' `generate`, which reads the same file.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
from transformers import AutoModelForCausalLM, LogitsProcessorList

from conf.schema import LOOKUP_DRAFTER, Coupling, Mode, Overlap, SamplingConfig
from tests.lossless.wrong_rules import BlindToDrafts, OneTokenLate, SeeingTheWholeDraft
from tests.support.enumeration import joint_law
from tests.support.tiny_models import random_prompt
from tests.support.tiny_runs import DEVICE, DISK, GREEDY, HOST, generate, task_for, tiny_run
from tests.support.toy_models import EXACT, LOOKUP, Setup, make_setup, target_law, total_variation
from workers.models.model_rules import ModelRules
from workers.models.token_rules import TokenRules

EXACTLY, CLEARLY = 1e-12, 1e-3
PROMPT = (0, 1, 0)

# ---- By enumeration, three symbols, of which 2 ends a text. ----

RULES = {
    "penalty": {"repetition_penalty": 1.7},
    "ngrams": {"no_repeat_ngram_size": 2},
    "words": {"bad_words_ids": [[1, 2], [2, 2]]},
    "bias": {"sequence_bias": [[[0, 1], 1.5], [[1], -0.5]]},
    "least": {"min_new_tokens": 2},
    "favoured_end": {"exponential_decay_length_penalty": [1, 1.5]},
    "all": {
        "repetition_penalty": 0.6,
        "bad_words_ids": [[1, 1]],
        "sequence_bias": [[[0, 2], 0.7]],
        "min_new_tokens": 1,
        "begin_suppress_tokens": [0],
    },
}
WAYS = {
    "triforce_1_1": {"mode": Mode.triforce, "gamma1": 1, "gamma2": 1},
    "triforce_1_2": {"mode": Mode.triforce, "gamma1": 1, "gamma2": 2},
    "retrieval_2": {"mode": Mode.retrieval, "gamma2": 2},
    "streaming_3": {"mode": Mode.streaming, "gamma2": 3},
    "streaming_lookup": {
        "mode": Mode.streaming,
        "gamma2": 2,
        "drafter": LOOKUP,
        "prompt": (0, 1, 0, 0, 1, 1, 0, 1, 0, 0),
    },
    "autoregressive": {"mode": Mode.autoregressive},
}
SAMPLINGS = {
    "T1": EXACT,
    "top_p": SamplingConfig(temperature=0.7, top_p=0.85),
    "block": SamplingConfig(temperature=1.0, top_p=1.0, block_verification=True),
}


def rules_of(values: dict, setup: Setup) -> ModelRules:
    rules = ModelRules(applied=values, not_applied={}, vocab_size=setup.vocab_size, eos_ids=frozenset({2}))
    return rules.of_task(len(setup.prompt), setup.max_new_tokens)


class Remembering:
    """Rules that apply each of the few questions of a small enumeration once."""

    def __init__(self, make: Callable[[], TokenRules]):
        self._make, self._known = make, {}

    def start(self) -> None:
        pass

    def apply(self, logits: torch.Tensor, committed: list[int], tail: list[int]) -> torch.Tensor:
        key = (logits.numpy().tobytes(), *committed, None, *tail)
        if key not in self._known:
            self._known[key] = self._make().apply(logits, committed, tail)
        return self._known[key]


def ruled(setup: Setup, values: dict, kind: type[TokenRules] = TokenRules) -> Setup:
    """The setup under the rules; `kind` is what applies them."""

    def make() -> TokenRules:
        rules = rules_of(values, setup).for_level()
        assert rules is not None
        return kind(rules._make, rules._vocab_size)

    remembering = Remembering(make)
    return setup.but(make_rules=lambda: remembering)


def law_under(setup: Setup, values: dict, num_tokens: int) -> dict[tuple[int, ...], float]:
    """The target's law, by the processors as transformers' `generate` calls them: on one row, with all before it."""
    rules = rules_of(values, setup)
    made = rules.processors(rules.setting(list(setup.prompt), torch.device("cpu")))
    processors = LogitsProcessorList([processor for _, processor in made])

    def rule(tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
        ruled_logits = processors(torch.tensor([tokens]), logits[None])[0]
        return logits if ruled_logits.isneginf().all() else ruled_logits

    return target_law(setup, num_tokens, rule)


def error(setup: Setup, values: dict, num_tokens: int = 3) -> float:
    law = joint_law(setup, num_tokens)
    return max(total_variation(law, law_under(setup, values, num_tokens)), abs(sum(law.values()) - 1))


EVERY_RULE = [(way, rule, "T1") for way in ("triforce_1_1", "retrieval_2", "streaming_3") for rule in RULES]
EVERY_WAY = [(way, "all", sampling) for way in WAYS for sampling in SAMPLINGS]


@pytest.mark.parametrize(("way", "rule", "sampling"), EVERY_RULE + EVERY_WAY)
def test_three_tokens_have_exactly_the_law_under_the_rule(way, rule, sampling):
    setup = make_setup(3, **{"prompt": PROMPT, "sampling": SAMPLINGS[sampling], **WAYS[way]})
    assert error(ruled(setup, RULES[rule]), RULES[rule]) < EXACTLY


@pytest.mark.parametrize("overlap", [Overlap.ahead, Overlap.outcomes])
def test_the_law_is_exact_with_drafts_made_ahead(overlap):
    setup = make_setup(2, prompt=PROMPT, gamma2=2, overlap=overlap, num_steps_ahead=1)
    values = {"repetition_penalty": 1.7, "no_repeat_ngram_size": 3}
    assert error(ruled(setup, values), values, 4) < EXACTLY


@pytest.mark.parametrize("wrong", [BlindToDrafts, SeeingTheWholeDraft, OneTokenLate])
def test_control_rules_with_the_wrong_tokens_are_seen(wrong):
    values = {"no_repeat_ngram_size": 2, "repetition_penalty": 1.7}
    setup = make_setup(3, prompt=(2,), mode=Mode.streaming, gamma2=2)
    assert error(ruled(setup, values), values) < EXACTLY
    assert error(ruled(setup, values, wrong), values) > CLEARLY


@pytest.mark.parametrize("rule", RULES)
def test_control_each_rule_changes_the_law(rule):
    setup = make_setup(3, prompt=PROMPT, mode=Mode.autoregressive)
    assert error(setup, RULES[rule]) > CLEARLY


# ---- On checkpoints. ----

NUM_TOKENS = 24
FILES = {
    "penalty": {"repetition_penalty": 1.3},
    "reward": {"repetition_penalty": 0.8},
    "ngrams": {"no_repeat_ngram_size": 3},
    "suppressed": {"suppress_tokens": list(range(0, 96, 2))},
    "begin": {"begin_suppress_tokens": list(range(48))},
    "bias": {"sequence_bias": [[[5], 4.0], [[5, 7], 9.0], [[7, 5, 9], 9.0]]},
    "of_prompt": {"encoder_repetition_penalty": 1.4, "encoder_no_repeat_ngram_size": 2},
    "forced_end": {"forced_eos_token_id": 11, "eos_token_id": 11},
    "several": {
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 2,
        "bad_words_ids": [[3], [8, 9], [20, 21]],
        "min_new_tokens": 12,
        "suppress_tokens": [1, 30],
        "renormalize_logits": True,
        "remove_invalid_values": True,
        "eos_token_id": list(range(40, 96)),
    },
    "least": {"min_length": 120, "eos_token_id": list(range(60, 96))},
    "decay": {"exponential_decay_length_penalty": [2, 1.6], "eos_token_id": [50, 70]},
    "sampling_keys": {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.1, "do_sample": True},
}


IN_EVERY_WAY = ("penalty", "several")
"""Files that every mode is tried with; the others meet all modes between them."""


@pytest.fixture(scope="module")
def ruled_checkpoint(checkpoints, tmp_path_factory):
    """Makes the folder of a target whose generation_config.json has a FILES entry."""

    @cache
    def make(name: str):
        folder = tmp_path_factory.mktemp(name) / "target"
        shutil.copytree(checkpoints("llama"), folder)
        (folder / "generation_config.json").write_text(json.dumps({"pad_token_id": 0, **FILES[name]}))
        return folder

    return make


def tokens_of_transformers(folder, prompt: list[int]) -> list[int]:
    """What `generate` gives, which takes its defaults from the file."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NUM_TOKENS)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", FILES)
def test_greedy_tokens_are_those_of_transformers_in_every_mode(checkpoints, ruled_checkpoint, name):
    folder, prompt = ruled_checkpoint(name), random_prompt(100)
    wanted = tokens_of_transformers(folder, prompt)
    run = partial(tiny_run, folder, ignore_eos=False)
    runs = {
        "autoregressive": run(mode=Mode.autoregressive),
        "triforce": run(checkpoints("llama", seed=1), Mode.triforce, HOST),
        "triforce, its own drafter": run(checkpoints("llama"), Mode.triforce, DISK, gamma1=3, window=300),
        "retrieval": run(mode=Mode.retrieval, gamma2=4),
        "streaming": run(checkpoints("llama"), Mode.streaming, DEVICE, window=300),
        "lookup": run(LOOKUP_DRAFTER, Mode.streaming, gamma2=5),
    }
    at = list(FILES).index(name)
    ways = list(runs) if name in IN_EVERY_WAY else ["triforce", list(runs)[at % len(runs)]]
    for way, config in ((way, runs[way]) for way in ways):
        assert generate(config, prompt, NUM_TOKENS).tokens == wanted, way


def test_control_the_files_change_the_tokens(ruled_checkpoint):
    plain = tokens_of_transformers(ruled_checkpoint("sampling_keys"), random_prompt(100))
    same = [name for name in FILES if tokens_of_transformers(ruled_checkpoint(name), random_prompt(100)) == plain]
    assert same == ["sampling_keys"]


def test_without_the_rules_the_tokens_are_the_models_own(ruled_checkpoint):
    config = tiny_run(ruled_checkpoint("penalty"), mode=Mode.retrieval)
    config.generation.use_model_rules = False
    plain = tokens_of_transformers(ruled_checkpoint("sampling_keys"), random_prompt(100))
    assert generate(config, random_prompt(100), NUM_TOKENS).tokens == plain


def test_a_drafter_with_another_padding_of_the_vocabulary_obeys_the_same_rules(checkpoints, ruled_checkpoint):
    folder, prompt = ruled_checkpoint("several"), random_prompt(100)
    wanted = tokens_of_transformers(folder, prompt)
    for vocab_size in (90, 112):
        config = tiny_run(folder, checkpoints("llama", vocab_size=vocab_size), Mode.streaming, ignore_eos=False)
        assert generate(config, prompt, NUM_TOKENS).tokens == wanted


@pytest.mark.parametrize("name", ["several", "sampling_keys"])
def test_with_gumbel_coupling_every_mode_gives_the_same_tokens_under_the_rules(checkpoints, ruled_checkpoint, name):
    sampling = SamplingConfig(temperature=0.8, top_p=0.9, coupling=Coupling.gumbel)
    run = partial(tiny_run, ruled_checkpoint(name), sampling=sampling)
    wanted = generate(run(mode=Mode.autoregressive), random_prompt(80), NUM_TOKENS).tokens
    for mode in (Mode.triforce, Mode.retrieval, Mode.streaming):
        config = run(checkpoints("llama", seed=1), mode, HOST)
        assert generate(config, random_prompt(80), NUM_TOKENS).tokens == wanted, mode


def test_a_run_without_rules_makes_no_use_of_them(checkpoints):
    prepared = task_for(tiny_run(checkpoints("llama"), sampling=GREEDY), [1, 2], 4).prepared
    assert prepared.rules.for_level() is None and not prepared.rules.notes
