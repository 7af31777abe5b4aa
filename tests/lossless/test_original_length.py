"""Families that read a text in another way past their original length give the tokens of transformers' generate.

With longrope, phi3 and phimoe throw their cache away there and read everything again, by the long factors.
"""

from __future__ import annotations

from itertools import pairwise

import pytest

from conf.schema import LOOKUP_DRAFTER, NO_DRAFTER, ConfigError, Mode, Overlap
from launch.assembly.prepare import prepare
from launch.assembly.session_run import fit_to_model
from tests.support.tiny_models import greedy_tokens, random_prompt, save_checkpoint, tiny_config
from tests.support.tiny_runs import DEVICE, DISK, HOST, engine_for, generate, run_to_end, tiny_run

ORIGINAL, NUM_TOKENS = 64, 24
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": ORIGINAL,
}
MSCALES = {"short_mscale": 1.1, "long_mscale": 1.4}
REREADING = {
    "phi3": {"rope_parameters": LONGROPE, "original_max_position_embeddings": ORIGINAL},
    "phimoe": {"rope_parameters": LONGROPE | MSCALES, "num_local_experts": 2, "num_experts_per_tok": 2},
}
COMMON = {"max_position_embeddings": 256}
# (mode, tier, drafter: the target itself, another model, or none; overlap)
RUNS = {
    "autoregressive": (Mode.autoregressive, HOST, NO_DRAFTER, Overlap.off),
    "retrieval": (Mode.retrieval, DISK, NO_DRAFTER, Overlap.off),
    "streaming": (Mode.streaming, DEVICE, "same", Overlap.off),
    "triforce": (Mode.triforce, HOST, "same", Overlap.off),
    "triforce, another drafter": (Mode.triforce, DEVICE, "other", Overlap.off),
    "triforce, lookup": (Mode.triforce, DEVICE, LOOKUP_DRAFTER, Overlap.off),
    "triforce, drafting ahead": (Mode.triforce, DEVICE, "same", Overlap.outcomes),
}
CASES = [("phi3", 50, name) for name in RUNS] + [
    *(("phi3", length, "triforce") for length in (ORIGINAL - 1, ORIGINAL, ORIGINAL + 1)),
    *(("phimoe", length, "triforce") for length in (50, ORIGINAL)),
]


@pytest.mark.parametrize(("family", "num_prompt_tokens", "run"), CASES)
def test_past_the_original_length_the_tokens_are_those_of_generate(checkpoints, family, num_prompt_tokens, run):
    changes = COMMON | REREADING[family]
    target, other = checkpoints(family, **changes), checkpoints(family, seed=1, **changes)
    prompt = random_prompt(num_prompt_tokens)
    mode, tier, drafter, overlap = RUNS[run]
    config = tiny_run(target, {"same": target, "other": other}.get(drafter, drafter), mode, tier)
    config.decoding.overlap = overlap
    result = generate(config, prompt, NUM_TOKENS)
    assert result.tokens == greedy_tokens(target, prompt, NUM_TOKENS)
    passes = [record.index for record in result.rounds if record.passes_original_length]
    assert len(passes) == (num_prompt_tokens <= ORIGINAL)


def test_without_reading_again_the_tokens_differ(checkpoints, monkeypatch):
    """Negative control: the text does depend on it."""
    target, prompt = checkpoints("phi3", **COMMON, **REREADING["phi3"]), random_prompt(50)
    monkeypatch.setattr("workers.models.rotary.RotaryTable.read_again", lambda table, num_tokens: None)
    tokens = generate(tiny_run(target, mode=Mode.autoregressive), prompt, NUM_TOKENS).tokens
    wanted = greedy_tokens(target, prompt, NUM_TOKENS)
    assert tokens[:15] == wanted[:15] and tokens != wanted


def test_no_block_goes_past_the_original_length(checkpoints):
    target, prompt = checkpoints("phi3", **COMMON, **REREADING["phi3"]), random_prompt(50)
    with engine_for(tiny_run(target, target, Mode.triforce, gamma2=16), prompt, NUM_TOKENS) as built:
        rounds = run_to_end(built.hierarchy)
    ends = [len(prompt)]
    for record in rounds:
        ends.append(ends[-1] + len(record.tokens))
    assert ORIGINAL + 1 in ends
    for record, (start, _) in zip(rounds, pairwise(ends), strict=True):
        assert start > ORIGINAL or start + len(record.proposed) <= ORIGINAL
    assert any(record.proposed for record in rounds[1:])


def test_a_family_that_transformers_itself_reads_wrongly_there_is_served_up_to_its_original_length(tmp_path):
    """phi4_multimodal goes on from its last token alone: nobody wants that text."""
    changes = COMMON | {
        "rope_parameters": LONGROPE,
        "original_max_position_embeddings": ORIGINAL,
        "pad_token_id": 0,
        "vision_config": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        "audio_config": {"hidden_size": 32, "intermediate_size": 32, "num_blocks": 1, "num_attention_heads": 2},
    }
    changes["vision_config"]["crop_size"] = 28
    target, prompt = save_checkpoint(tmp_path / "m", tiny_config("phi4_multimodal", **changes)), random_prompt(50)
    config, notes = tiny_run(target, mode=Mode.retrieval), []
    config.generation.max_new_tokens = 40
    prepared = prepare(config)
    room = fit_to_model(config, len(prompt), prepared.max_positions, notes.append)
    assert room == ORIGINAL - len(prompt) + 1 and f"the model has {ORIGINAL} positions" in notes[0]
    assert generate(config, prompt, room, prepared=prepared).tokens == greedy_tokens(target, prompt, room)
    with pytest.raises(ConfigError, match=f"maximum context length is {ORIGINAL} tokens"):
        fit_to_model(config, ORIGINAL + 1, prepared.max_positions, notes.append)
