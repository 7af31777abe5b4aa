"""The verifier's logits are those of a plain forward pass: log-probabilities of generated tokens, scored again.

Also greedy decoding in bf16: where it leaves transformers' tokens, the two candidates are as good as tied.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from conf.schema import Dtype, Mode, SamplingConfig
from tests.tiny_models import greedy_tokens, random_prompt
from tests.tiny_runs import HOST, engine_for, generate, run_to_end, tiny_run

TEMPERATURE_1 = SamplingConfig(temperature=1.0, top_p=1.0)
LARGEST_GAP = {Dtype.float32: 1e-3, Dtype.bfloat16: 0.5}


def plain_model(folder, dtype: Dtype):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="eager").eval()


def generate_with_logits(config, prompt: list[int], num_tokens: int) -> tuple[list[int], torch.Tensor]:
    """Tokens and the verifier's logits [n, V] that judged or gave them."""
    with engine_for(config, prompt, num_tokens) as engine:
        hierarchy, seen = engine.hierarchy, []
        logits_after = hierarchy.verifier.logits_after

        def record(after, draft):
            seen.append(logits_after(after, draft))
            return seen[-1]

        hierarchy.verifier.logits_after = record
        rounds = run_to_end(hierarchy)
        rows = [logits[: len(one.tokens)] for logits, one in zip(seen, rounds, strict=True)]
        return hierarchy.session.generated, torch.cat(rows)


@pytest.mark.parametrize("dtype", LARGEST_GAP)
@pytest.mark.parametrize(("family", "num_tokens"), [("llama", 512), ("gemma2", 96)])
def test_log_probabilities_are_those_of_a_plain_forward_pass(checkpoints, family, num_tokens, dtype):
    target = checkpoints(family, max_position_embeddings=1024)
    prompt = random_prompt(150)
    # The target drafts for itself, or few drafts would be accepted and their places judged once.
    config = tiny_run(target, target, Mode.triforce, HOST, sampling=TEMPERATURE_1, dtype=dtype, window=200)
    tokens, logits = generate_with_logits(config, prompt, num_tokens)
    with torch.inference_mode():
        plain = plain_model(target, dtype)(torch.tensor([prompt + tokens]), logits_to_keep=num_tokens + 1)
    chosen = torch.tensor(tokens)[:, None]
    ours, theirs = (rows.float().log_softmax(-1).gather(-1, chosen) for rows in (logits, plain.logits[0, :-1]))
    assert len(tokens) == num_tokens
    print(float((ours - theirs).abs().max()))
    assert float((ours - theirs).abs().max()) < LARGEST_GAP[dtype]


def largest_difference_between_passes(model, prefix: list[int], num_rows: int) -> float:
    """Between the logits of a token read alone and read as the last of `num_rows`, after the same tokens."""
    ids = torch.tensor([prefix])
    with torch.inference_mode():
        alone = model(ids[:, -1:], past_key_values=model(ids[:, :-1], use_cache=True).past_key_values).logits[0, -1]
        before = model(ids[:, :-num_rows], use_cache=True).past_key_values
        together = model(ids[:, -num_rows:], past_key_values=before).logits[0, -1]
    return float((alone.float() - together.float()).abs().max())


def explained(model, prompt: list[int], ours: list[int], theirs: list[int], num_rows: int) -> bool:
    """Whether the first tokens that differ are tied within twice the rounding between passes of unlike lengths."""
    at = next(index for index, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])
    prefix = prompt + theirs[:at]
    with torch.inference_mode():
        logits = model(torch.tensor([prefix])).logits[0, -1].float()
    gap = abs(float(logits[ours[at]] - logits[theirs[at]]))
    return gap <= 2 * largest_difference_between_passes(model, prefix, num_rows)


def matches_and_explanations(checkpoints, family: str, seeds: range, num_tokens: int) -> list[tuple[bool, bool]]:
    """For each prompt: whether all tokens are transformers' own, and if not, whether a tie explains it."""
    gamma2 = 6
    target, other = (checkpoints(family, seed, max_position_embeddings=1024) for seed in (0, 1))
    model, results = plain_model(target, Dtype.bfloat16), []
    for seed in seeds:
        prompt = random_prompt(100 + seed, seed=seed)
        config = tiny_run(target, other, Mode.triforce, HOST, gamma2=gamma2, dtype=Dtype.bfloat16)
        ours = generate(config, prompt, num_tokens).tokens
        theirs = greedy_tokens(target, prompt, num_tokens, torch.bfloat16)
        results.append((ours == theirs, ours == theirs or explained(model, prompt, ours, theirs, gamma2 + 1)))
    return results


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_greedy_tokens_in_bf16_differ_in_ties_only(checkpoints, family):
    results = matches_and_explanations(checkpoints, family, range(100), 32)
    assert all(is_explained for _, is_explained in results)
    assert sum(is_match for is_match, _ in results) >= 60
