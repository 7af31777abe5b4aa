"""Keys of generation_config.json: which are applied, refused or left; rows and distributions are as in transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from conf.schema import ConfigError, SamplingConfig
from workers.acceptance import NO_WARPERS, distribution
from workers.models.model_rules import WARPERS, WARPERS_BEFORE_CUTS, ModelRules, make_rules
from workers.models.token_rules import Reads, TokenRules

V = 40
GREEDY, SAMPLED = SamplingConfig(temperature=0.0), SamplingConfig(temperature=0.7, top_p=0.9, top_k=12)
CPU = torch.device("cpu")
VALUES = {
    "sequence_bias": [[[3], 2.0], [[4, 5], 3.0]],
    "encoder_repetition_penalty": 1.2,
    "repetition_penalty": 1.3,
    "no_repeat_ngram_size": 2,
    "encoder_no_repeat_ngram_size": 3,
    "bad_words_ids": [[6], [7, 8], [2]],
    "min_new_tokens": 4,
    "forced_eos_token_id": 9,
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": [3, 1.4],
    "suppress_tokens": [10, 11],
    "begin_suppress_tokens": [12],
    "renormalize_logits": True,
}

OVERFLOWING = ("remove_invalid_values",)
"""Makes finite numbers of what others forbade, so large that a decay takes them to infinity: in transformers, too."""


def rules_for(values: dict, *, eos_ids=frozenset({2}), sampling=SAMPLED, are_wanted=True) -> ModelRules:
    return make_rules(values, name="M", vocab_size=V, eos_ids=eos_ids, sampling=sampling, are_wanted=are_wanted)


def random_logits(num_rows: int, seed: int = 0, width: int = V) -> torch.Tensor:
    return 3 * torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed))


# ---- Rows. ----


def row_by_row(rules: ModelRules, logits: torch.Tensor, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """As `generate` does it: each row alone, with all tokens before it."""
    processors = LogitsProcessorList(each for _, each in rules.processors(rules.setting(prompt, CPU)))
    ends = range(len(tokens) - len(logits) + 1, len(tokens) + 1)
    rows = [processors(torch.tensor([tokens[:end]]), row[None]) for end, row in zip(ends, logits, strict=True)]
    return torch.cat(rows)


@pytest.mark.parametrize("key", [*VALUES, None])
def test_rows_are_those_of_transformers_while_the_sequence_grows(key):
    """Blocks of all lengths, of which a part is kept; lengths beyond the first buffer."""
    values = {key: VALUES[key]} if key else {name: VALUES[name] for name in VALUES if name not in OVERFLOWING}
    prompt = torch.randint(V, (250,), generator=torch.Generator().manual_seed(1)).tolist()
    rules = rules_for(values).of_task(len(prompt), 20)
    level, committed = rules.for_level(), list(prompt)
    assert level is not None
    for step in range(8):
        draft = torch.randint(V, (step,), generator=torch.Generator().manual_seed(step)).tolist()
        for num_rows in {1, step + 1, (step + 1) // 2 or 1}:
            logits = random_logits(num_rows, step)
            wanted = row_by_row(rules, logits, prompt, committed + draft)
            assert torch.equal(level.apply(logits, committed, draft), wanted), step
        committed += draft[: step // 2] + [step]


def test_another_sequence_is_judged_by_itself_after_a_start():
    rules = rules_for({"repetition_penalty": 2.0, "no_repeat_ngram_size": 1}).of_task(3, 20)
    level, logits = rules.for_level(), random_logits(1)
    level.apply(logits, [1, 2, 3], [4])
    level.start()
    assert torch.equal(level.apply(logits, [5, 6, 7], []), row_by_row(rules, logits, [5, 6, 7], [5, 6, 7]))


def test_a_restarted_process_knows_the_prompt_from_what_followed():
    rules = rules_for({"min_new_tokens": 4, "begin_suppress_tokens": [12]}).of_task(3, 20)
    tokens = [1, 3, 4, 5, 6, 7]
    restarted = rules.for_level().apply(random_logits(1), tokens, [])
    assert torch.equal(restarted, row_by_row(rules, random_logits(1), tokens[:3], tokens))
    assert restarted[0, 2] == -torch.inf
    assert rules.for_level().apply(random_logits(1), [*tokens, 8], [])[0, 2] > -torch.inf


def test_a_level_with_another_padding_of_the_vocabulary_gets_its_own_width():
    rules = rules_for({"sequence_bias": [[[V - 1], 2.0]], "forced_eos_token_id": 9}).of_task(2, 20)
    narrow, wide = random_logits(2, width=V - 5), random_logits(2, width=V + 5)
    assert torch.equal(rules.for_level().apply(narrow, [1, 2], [3]), narrow)
    given = rules.for_level().apply(wide, [1, 2], [3])
    assert torch.equal(given[:, : V - 1], wide[:, : V - 1]) and torch.equal(given[:, V - 1], wide[:, V - 1] + 2)


def test_logits_stay_as_they_are_and_become_float32():
    level, logits = rules_for({"repetition_penalty": 1.5}).of_task(2, 9).for_level(), random_logits(2).bfloat16()
    before = logits.clone()
    given = level.apply(logits, [1, 2], [3])
    assert given.dtype == torch.float32 and torch.equal(logits, before)
    assert level.apply(logits.double(), [1, 2], [3]).dtype == torch.float64


def test_a_row_without_a_token_left_is_given_back_and_a_broken_one_stays_broken():
    everything = TokenRules(lambda tokens, device: [(Reads.nothing, lambda ids, rows: rows - torch.inf)], V)
    logits = random_logits(2)
    logits[1, 3] = torch.nan
    given = everything.apply(logits, [1], [2])
    assert torch.equal(given[0], logits[0]) and bool(given[1].isnan().any())


# ---- Distributions. ----


@pytest.mark.parametrize("values", [{key: 0.3} for key in WARPERS] + [dict.fromkeys(WARPERS, 0.4)], ids=str)
def test_distributions_are_those_of_transformers(values):
    """Temperature, top_h, top-k, top-p and the others in this order; by transformers' own warpers."""
    logits = random_logits(50).double()
    first = [kind(values[key]) for key, kind in WARPERS_BEFORE_CUTS.items() if key in values]
    last = [kind(values[key]) for key, kind in WARPERS.items() if key in values and key not in WARPERS_BEFORE_CUTS]
    cuts = [TopKLogitsWarper(SAMPLED.top_k), TopPLogitsWarper(SAMPLED.top_p)]
    warpers = LogitsProcessorList([TemperatureLogitsWarper(SAMPLED.temperature), *first, *cuts, *last])
    wanted = torch.softmax(warpers(None, logits), -1)
    given = distribution(logits, SAMPLED, rules_for(values).warpers())
    assert torch.allclose(given, wanted, atol=1e-12)
    assert not torch.allclose(given, distribution(logits, SAMPLED), atol=1e-3)


def test_greedy_decoding_has_no_warpers():
    rules = rules_for({"min_p": 0.5}, sampling=GREEDY)
    assert rules.warpers() is NO_WARPERS and rules.not_applied == {"min_p": 0.5} and not rules.notes


# ---- Which keys. ----


def test_a_file_that_says_nothing_costs_nothing():
    rules = rules_for({})
    assert rules.for_level() is None and rules.warpers() is NO_WARPERS and not rules.notes


def test_lines_tell_what_is_applied_and_what_the_run_decides():
    rules = rules_for({"repetition_penalty": 1.1, "temperature": 0.7, "top_p": 0.8, "stop_strings": ["x"]})
    assert rules.report() == {
        "applied": {"repetition_penalty": 1.1},
        "not_applied": {"temperature": 0.7, "top_p": 0.8, "stop_strings": ["x"]},
    }
    of_file, of_run = rules.notes
    assert "repetition_penalty=1.1" in of_file and "generation.use_model_rules=false" in of_file
    assert "top_p=0.8" in of_run and "stop_strings" in of_run
    assert "temperature" not in of_run, "it is what the run has anyway"


def test_greedy_runs_hear_nothing_of_sampling():
    assert not rules_for({"temperature": 0.2, "top_k": 5, "typical_p": 0.3}, sampling=GREEDY).notes


def test_rules_that_are_not_wanted_are_told_of():
    rules = rules_for({"repetition_penalty": 1.1, "num_beams": 4}, are_wanted=False)
    assert not rules.applied and rules.for_level() is None and "repetition_penalty=1.1, num_beams=4" in rules.notes[0]


@pytest.mark.parametrize("key", ["min_length", "min_new_tokens", "exponential_decay_length_penalty"])
def test_a_model_without_an_end_has_no_least_length(key):
    value = [3, 1.4] if key == "exponential_decay_length_penalty" else 9
    rules = rules_for({key: value}, eos_ids=frozenset())
    assert rules.not_applied == {key: value} and key in rules.notes[0]


def test_min_new_tokens_wins_over_min_length():
    assert rules_for({"min_length": 90, "min_new_tokens": 2}).applied == {"min_new_tokens": 2}


@pytest.mark.parametrize(
    "values",
    [
        {"num_beams": 4},
        {"guidance_scale": 1.5},
        {"watermarking_config": {"bias": 2.0}},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "high"},
        {"force_words_ids": [[1]]},
        {"token_healing": True},
    ],
    ids=str,
)
def test_what_makes_greedy_decoding_another_algorithm_is_refused(values):
    with pytest.raises(ConfigError, match=f"{next(iter(values))}=.*cannot be applied.*use_model_rules=false"):
        rules_for(values, sampling=GREEDY)


def test_contrastive_search_is_none_where_transformers_samples():
    assert rules_for({"penalty_alpha": 0.6, "top_k": 4}).not_applied == {"penalty_alpha": 0.6, "top_k": 4}


@pytest.mark.parametrize(
    "values",
    [
        {"repetition_penalty": -1.0},
        {"repetition_penalty": "much"},
        {"no_repeat_ngram_size": 2.5},
        {"bad_words_ids": [3]},
        {"bad_words_ids": [[V]]},
        {"sequence_bias": []},
        {"min_new_tokens": -4},
        {"forced_eos_token_id": V + 3},
        {"min_p": 3.0},
        {"suppress_tokens": "x"},
    ],
    ids=str,
)
def test_a_value_that_transformers_refuses_is_refused_before_weights_are_read(values):
    with pytest.raises(ConfigError, match=f"model.target is 'M'.*{next(iter(values))}=.*it must be a value"):
        rules_for(values)
