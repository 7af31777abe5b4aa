"""The verifier's logits are those of a plain forward pass: log-probabilities of generated tokens, scored again.

Also greedy decoding in bf16: where it leaves transformers' tokens, the two candidates are as good as tied.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from conf.schema import Dtype, Mode, SamplingConfig
from tests.support.tiny_models import greedy_tokens, random_prompt
from tests.support.tiny_runs import HOST, engine_for, generate, run_to_end, tiny_run

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
@pytest.mark.parametrize(
    ("family", "mode", "num_tokens"),
    [("llama", Mode.streaming, 512), ("llama", Mode.triforce, 64), ("gemma2", Mode.triforce, 64)],
)
def test_log_probabilities_are_those_of_a_plain_forward_pass(checkpoints, family, mode, num_tokens, dtype):
    target, prompt = checkpoints(family, max_position_embeddings=1024), random_prompt(150)
    # The target drafts for itself: most of its drafts are accepted, so that blocks of all lengths are judged.
    config = tiny_run(target, target, mode, HOST, sampling=TEMPERATURE_1, dtype=dtype, window=700)
    tokens, logits = generate_with_logits(config, prompt, num_tokens)
    with torch.inference_mode():
        plain = plain_model(target, dtype)(torch.tensor([prompt + tokens]), logits_to_keep=num_tokens + 1)
    chosen = torch.tensor(tokens)[:, None]
    ours, theirs = (rows.float().log_softmax(-1).gather(-1, chosen) for rows in (logits, plain.logits[0, :-1]))
    assert len(tokens) == num_tokens
    assert float((ours - theirs).abs().max()) < LARGEST_GAP[dtype]


def is_tie(model, exact_model, prompt: list[int], ours: list[int], theirs: list[int]) -> bool:
    """Whether the first tokens that differ are tied within the rounding of two passes in bf16.

    That rounding is measured on the same prefix: the largest difference of logits to those of the same weights in fp32.
    """
    at = next(index for index, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])
    prefix = torch.tensor([prompt + theirs[:at]])
    with torch.inference_mode():
        logits, exact = (one(prefix).logits[0, -1].float() for one in (model, exact_model))
    return abs(float(logits[ours[at]] - logits[theirs[at]])) <= 2 * float((logits - exact).abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_greedy_tokens_in_bf16_differ_in_ties_only(checkpoints, family):
    target, other = (checkpoints(family, seed, max_position_embeddings=1024) for seed in (0, 1))
    model, exact_model = plain_model(target, Dtype.bfloat16), plain_model(target, Dtype.bfloat16).float()
    num_matches = 0
    for seed in range(100):
        prompt = random_prompt(100 + seed, seed=seed)
        config = tiny_run(target, other, Mode.triforce, HOST, dtype=Dtype.bfloat16)
        ours, theirs = generate(config, prompt, 12).tokens, greedy_tokens(target, prompt, 12, torch.bfloat16)
        assert ours == theirs or is_tie(model, exact_model, prompt, ours, theirs), seed
        num_matches += ours == theirs
    assert num_matches >= 60
