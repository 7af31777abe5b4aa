"""What caches have in sight, against the whole matrix of attention weights of transformers' eager attention."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from conf.schema import SamplingConfig
from launch.analysis.attention_recovery import FactRecovery, Locality, Recovery, share_in_sight, top_shares
from launch.analysis.compared_rules import HEAVY_HITTER, TOP_K, sums_of_chunks
from launch.analysis.draft_comparison import ComparisonConfig, DraftCache, DraftComparison
from tests.support.tiny_models import random_prompt
from tiers.device_tier import DeviceTier
from workers.checkpoint.facts import describe
from workers.models.loading import load_model

CHUNK, BUDGET, EVERYTHING, ROUND = 4, 16, 512, 3
PROMPT, NEW, FACT = 90, 11, (8, 60)
WINDOW, MEAN_KEY, ATTENTION = "window", "mean_key", "attention"
DRAFTS = [
    DraftCache(name=name, budget=budget, rule=rule, newest_share=share)
    for budget in (BUDGET, EVERYTHING)
    for name, rule, share in (
        (TOP_K, TOP_K, 0.0),
        (MEAN_KEY, "mean_key", 0.5),
        (ATTENTION, "attention", 0.5),
        (HEAVY_HITTER, HEAVY_HITTER, 0.5),
        (WINDOW, "mean_key", 1.0),
    )
]
FAMILIES = ["llama", "gemma2", "gpt_oss"]
"""Grouped heads; a sliding window and capped scores; logits of sinks."""


def comparison_of(folder, drafts=DRAFTS) -> DraftComparison:
    cpu = torch.device("cpu")
    facts = describe("model.target", str(folder), torch.float32)
    config = ComparisonConfig(
        capacity=PROMPT + NEW + 8,
        new_tokens=NEW,
        chunk_size=CHUNK,
        rounds_of=ROUND,
        sampling=SamplingConfig(temperature=1.0, top_p=1.0),
    )
    return DraftComparison(load_model(facts, cpu, self_check=False), facts, DeviceTier(cpu), drafts, config)


def attention_of(folder, tokens: list[int], kv_heads: int = 2) -> torch.Tensor:
    """[layers, H, T, T]: means of the query heads of a kv head, over the keys alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        weights = torch.cat(model(torch.tensor([tokens]), output_attentions=True).attentions)
    weights = weights / weights.sum(-1, keepdim=True)
    return weights.unflatten(1, (kv_heads, -1)).mean(2)


class Run:
    """All tokens of a continuation that is told, watched."""

    def __init__(self, folder):
        self.tokens = random_prompt(PROMPT + NEW)
        self.wanted = attention_of(folder, self.tokens)
        comparison = comparison_of(folder)
        self.windows = describe("model.target", str(folder), torch.float32).windows
        self.locality = Locality(comparison, BUDGET)
        self.recovery = Recovery(comparison, [BUDGET, EVERYTHING])
        self.fact = FactRecovery(comparison, *FACT)
        comparison.read(self.tokens[: PROMPT - 1])
        comparison.watchers = [self.locality.see_last]
        comparison.start(self.tokens[PROMPT - 1])
        self.locality.keep_choice()
        self.held_first = {draft: list(held) for draft, held in comparison.held.items()}
        comparison.watchers = [self.recovery.see, self.fact.see, self.locality.see]
        told = iter([*self.tokens[PROMPT + 1 :], 0])
        self.rounds = list(comparison.rounds(self.tokens[PROMPT], NEW, lambda probs: next(told)))

    def held(self, name: str) -> list[torch.Tensor]:
        """At the start, by layer."""
        return self.held_first[next(draft for draft in DRAFTS if (draft.name, draft.budget) == (name, BUDGET))]


@pytest.fixture(scope="module", params=FAMILIES)
def run(request, checkpoints):
    return Run(checkpoints(request.param))


def test_the_best_tokens_recover_what_they_do_of_the_whole_matrix(run):
    best = run.wanted[:, :, PROMPT:].sort(descending=True).values[..., :BUDGET].sum(-1)
    assert torch.allclose(run.recovery.shares()[TOP_K, BUDGET], best.transpose(1, 2), atol=1e-5)
    assert 0.1 < best.mean() < 0.99


def test_a_window_recovers_the_first_chunk_and_the_newest_ones(run):
    shares, expected = run.recovery.shares()[WINDOW, BUDGET], []
    for token in range(PROMPT, PROMPT + NEW):
        base = PROMPT + (token - PROMPT) // ROUND * ROUND
        first_of_newest = base // CHUNK * CHUNK - (BUDGET - CHUNK)
        row = run.wanted[:, :, token]
        expected.append(row[..., :CHUNK].sum(-1) + row[..., first_of_newest:].sum(-1))
    assert torch.allclose(shares, torch.stack(expected, dim=1), atol=1e-5)


def test_chunks_by_attention_are_those_of_the_last_token_s_attention(run):
    for layer, held in enumerate(run.held(ATTENTION)):
        sums = sums_of_chunks(run.wanted[layer, :, PROMPT - 1, :PROMPT], CHUNK)[:, : PROMPT // CHUNK]
        newest = range(PROMPT // CHUNK - BUDGET // CHUNK // 2, PROMPT // CHUNK)
        for head, positions in enumerate(held.tolist()):
            kept = {0, *newest}
            others = sorted((float(s), c) for c, s in enumerate(sums[head]) if c not in kept)[::-1]
            least = others[BUDGET // CHUNK - len(kept) - 1][0]
            chosen = {position // CHUNK for position in positions if position < PROMPT // CHUNK * CHUNK}
            assert kept <= chosen and len(chosen) == BUDGET // CHUNK
            assert min(float(sums[head, chunk]) for chunk in chosen - kept) >= least - 1e-6


def test_heavy_hitters_are_those_of_all_queries_of_the_prompt(run):
    for layer, held in enumerate(run.held(HEAVY_HITTER)):
        sums = run.wanted[layer, :, :PROMPT, :PROMPT].sum(1)
        kept = {0, *range(PROMPT - BUDGET // 2, PROMPT)}
        if run.windows[layer] is not None:
            sums[:, : PROMPT - run.windows[layer] + 1] = 0  # no later token sees them
        for head, positions in enumerate(held.tolist()):
            others = sorted((float(s) for t, s in enumerate(sums[head]) if t not in kept), reverse=True)
            least = others[BUDGET - len(kept) - 1]
            assert kept <= set(positions) and len(set(positions)) == BUDGET
            assert min(float(sums[head, token]) for token in set(positions) - kept) >= least - 1e-4


def test_a_cache_of_everything_recovers_everything_and_is_accepted_always(run):
    for (name, budget), shares in run.recovery.shares().items():
        if budget == EVERYTHING:
            assert torch.allclose(shares, torch.ones_like(shares), atol=1e-5), name
    accepted = {}
    for round_ in run.rounds:
        for draft, rows in round_.draft_probs.items():
            shares = [float(p.minimum(q).sum()) for p, q in zip(round_.target_probs, rows, strict=True)]
            accepted.setdefault((draft.name, draft.budget), []).extend(shares)
    assert {key for key in accepted} == {(draft.name, draft.budget) for draft in DRAFTS}
    for (name, budget), shares in accepted.items():
        assert len(shares) == NEW
        assert (min(shares) > 1 - 1e-4) == (budget == EVERYTHING), name


def test_what_is_chosen_once_is_followed(run):
    result, newer = run.locality.result(), run.wanted[:, :, PROMPT:]
    best = run.wanted[:, :, PROMPT - 1, :PROMPT].topk(BUDGET).indices
    of_context = newer[..., :PROMPT].gather(3, best[:, :, None].expand(-1, -1, NEW, -1)).sum(-1)
    in_all = (of_context + newer[..., PROMPT:].sum(-1)).mean((0, 1))
    share = (of_context / newer[..., :PROMPT].sum(-1)).mean((0, 1))
    assert result[TOP_K].recovery == pytest.approx(in_all.tolist(), abs=1e-5)
    assert result[TOP_K].recovery_of_context == pytest.approx(share.tolist(), abs=1e-5)
    held = torch.stack(run.held(MEAN_KEY))[:, :, None].expand(-1, -1, NEW, -1)
    share = (newer.gather(3, held).sum(-1) / newer[..., :PROMPT].sum(-1)).mean((0, 1))
    assert result[MEAN_KEY].recovery_of_context == pytest.approx(share.tolist(), abs=1e-5)


def test_attention_to_a_fact_is_counted_where_it_is_in_sight(run):
    recovered, to_fact = run.fact.recovered(), run.wanted[:, :, PROMPT:, slice(*FACT)].sum(-1)
    assert run.fact.share_of_attention == pytest.approx(float(to_fact.mean()), abs=1e-5)
    assert recovered[WINDOW, BUDGET] == 0
    assert recovered[WINDOW, EVERYTHING] == pytest.approx(1, abs=1e-5)
    assert 0 < recovered[MEAN_KEY, BUDGET] < 1


def test_after_rewinding_a_question_is_answered_as_if_it_were_the_first(checkpoints):
    tokens = random_prompt(PROMPT + NEW)

    def ask(comparison, question: list[int]):
        recovery = Recovery(comparison, [BUDGET])
        comparison.watchers = []
        comparison.add(question[:-1])
        comparison.look(question[-1])
        comparison.watchers = [recovery.see]
        (round_,) = comparison.rounds(question[-1], 2, lambda probs: 7)
        assert round_.tokens == [question[-1], 7]
        return recovery.shares(), {draft: torch.stack(rows) for draft, rows in round_.draft_probs.items()}

    comparison = comparison_of(checkpoints("llama"))
    comparison.read(tokens[:PROMPT])
    ask(comparison, tokens[PROMPT : PROMPT + 6])
    comparison.rewind()
    shares, probs = ask(comparison, [5, 4, 3])
    fresh = comparison_of(checkpoints("llama"))
    fresh.read(tokens[:PROMPT])
    fresh_shares, fresh_probs = ask(fresh, [5, 4, 3])
    assert all(torch.equal(shares[key], fresh_shares[key]) for key in fresh_shares)
    assert all(torch.equal(probs[draft], fresh_probs[draft]) for draft in fresh_probs)


def test_shares_of_a_small_example():
    mass = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.7, 0.1, 0.1, 0.1]])
    one, three = top_shares(mass, [1, 9])
    assert one.tolist() == pytest.approx([0.4, 0.7]) and three.tolist() == pytest.approx([1, 1])
    sight = share_in_sight(mass, torch.tensor([[0], [1]]), base=3)
    assert sight.tolist() == pytest.approx([0.4, 0.2])
    assert sums_of_chunks(mass, 3).tolist() == [pytest.approx([0.7, 0.3]), pytest.approx([0.9, 0.1])]
