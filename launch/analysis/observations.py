"""Measures what TriForce rests on: attention that is sparse and local, acceptance, facts at known depths."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from statistics import fmean

import torch

from conf.schema import NO_DRAFTER, DecodingConfig, Mode, PromptConfig, RetrievalRuleName, RunConfig, require
from launch.analysis.attention_recovery import FactRecovery, Locality, Recovery
from launch.analysis.compared_rules import HEAVY_HITTER, TOP_K
from launch.analysis.config import AnalyzeConfig, said_of_document
from launch.analysis.draft_comparison import ComparisonConfig, DraftCache, DraftComparison
from launch.analysis.needle_prompt import NeedlePrompt, Question, make_needle_prompt
from launch.analysis.summary import Tables
from launch.assembly.prepare import prepare
from launch.prompts.document import read_text
from launch.prompts.needle import NeedleForm, make_facts
from launch.prompts.prompt import read_prompt
from tiers.device_tier import DeviceTier
from workers.acceptance import KeyedRandom
from workers.models.loading import load_model

MEAN_KEY, ATTENTION, WINDOW = str(RetrievalRuleName.mean_key), str(RetrievalRuleName.attention), "recent_window"
CACHES = (TOP_K, ATTENTION, MEAN_KEY, HEAVY_HITTER, WINDOW)
"""Caches that are held against each other at every budget."""
CHARS_PER_TOKEN = 16
"""Characters of a filler that are read for each token that is wanted."""


def drafts_of(config: AnalyzeConfig) -> list[DraftCache]:
    """All caches that are compared, at every budget."""
    rules = {name: name for name in CACHES} | {WINDOW: MEAN_KEY}
    shares = dict.fromkeys(CACHES, config.newest_share) | {TOP_K: 0.0, WINDOW: 1.0}
    return [
        DraftCache(name=name, budget=budget, rule=rules[name], newest_share=shares[name])
        for budget in config.budgets
        for name in CACHES
    ]


class Observations:
    """A model that is loaded, and what was measured of it so far. Raises ConfigError when it is made."""

    def __init__(self, config: AnalyzeConfig):
        self._config = config
        self.rows: Tables = {"attention": [], "locality": [], "acceptance": [], "needle": []}
        run = RunConfig(
            model=replace(config.model, drafter=NO_DRAFTER),
            decoding=DecodingConfig(mode=Mode.autoregressive),
            placement=config.placement,
        )
        prepared = prepare(run)
        self.tokenizer, self._device = prepared.tokenizer, prepared.device
        wanted, most = config.context + config.new_tokens, prepared.max_positions
        rule = f"at most {most - config.new_tokens}: the model has {most} positions, new_tokens takes"
        require(wanted <= most, "context", config.context, f"{rule} {config.new_tokens}")
        self.prompts = {name: self._prompt(name, document) for name, document in config.named_documents.items()}
        self.needles = list(self._needles())
        self.notes = prepared.notes
        model = load_model(prepared.target, self._device, self_check=config.model.self_check)
        sizes = ComparisonConfig(
            # A needle's question and answer stay within the context.
            capacity=wanted + 8,
            new_tokens=config.new_tokens,
            chunk_size=config.chunk_size,
            rounds_of=config.rounds_of,
            sampling=config.sampling,
        )
        tier = DeviceTier(self._device)
        self._comparison = DraftComparison(model, prepared.target, tier, drafts_of(config), sizes)

    def _prompt(self, name: str, document: PromptConfig) -> list[int]:
        """The tokens of a document. Raises ConfigError where it is too short."""
        with said_of_document(name):
            tokens = read_prompt(document, self.tokenizer)
        short = f"at most {len(tokens)}: documents.{name} has no more tokens"
        require(len(tokens) == self._config.context, "context", self._config.context, short)
        return tokens

    def _needles(self) -> Iterator[NeedlePrompt]:
        """The texts with facts, and what is asked of each."""
        needle = self._config.needle
        if not needle.repeats:
            return
        default = [NeedleForm.question] if self.tokenizer.chat_template else [NeedleForm.assignment, NeedleForm.passage]
        name, document = next(iter(self._config.named_documents.items()))
        with said_of_document(name):
            filler = read_text(document, CHARS_PER_TOKEN * self._config.context)
        for form in needle.forms or default:
            for repeat in range(needle.repeats):
                facts = make_facts(form, len(needle.depths), seed=repeat)
                most = self._config.context
                yield make_needle_prompt(self.tokenizer, filler, form, facts, needle.depths, most)

    def measure_document(self, name: str) -> None:
        """Measures sparsity, locality and acceptance while the target goes on from a document."""
        config, comparison, prompt = self._config, self._comparison, self.prompts[name]
        random = KeyedRandom(config.sampling.seed or 0)

        def choose(probs: torch.Tensor) -> int:
            return random.choose(probs, comparison.length, 0)

        locality, recovery = Locality(comparison, config.shown_budget), Recovery(comparison, config.budgets)
        comparison.watchers = []
        comparison.read(prompt[:-1])
        comparison.watchers = [locality.see_last]
        token = choose(comparison.start(prompt[-1]))
        locality.keep_choice()
        comparison.watchers = [recovery.see, locality.see]
        accepted: dict[DraftCache, list[float]] = {}
        for round_ in comparison.rounds(token, config.new_tokens, choose):
            for draft, rows in round_.draft_probs.items():
                shares = accepted.setdefault(draft, [])
                shares += [acceptance(p, q) for p, q in zip(round_.target_probs, rows, strict=True)]
        self._take(name, recovery, locality)
        for draft, shares in accepted.items():
            row = {"document": name, "cache": draft.name, "budget": draft.budget, "acceptance": fmean(shares)}
            self.rows["acceptance"].append(row | {"tokens": len(shares)})

    def _take(self, name: str, recovery: Recovery, locality: Locality) -> None:
        """Adds the rows of a document to the tables attention and locality."""
        for (cache, budget), shares in recovery.shares().items():
            means, deviations = shares.mean(1), shares.std(1, correction=0)
            self.rows["attention"] += [
                {
                    "document": name,
                    "layer": layer,
                    "kv_head": head,
                    "cache": cache,
                    "budget": budget,
                    "recovery": float(means[layer, head]),
                    "deviation_over_tokens": float(deviations[layer, head]),
                }
                for layer in range(means.shape[0])
                for head in range(means.shape[1])
            ]
        for cache, distances in locality.result().items():
            pairs = zip(distances.recovery, distances.recovery_of_context, strict=True)
            self.rows["locality"] += [
                {
                    "document": name,
                    "cache": cache,
                    "budget": self._config.shown_budget,
                    "distance": distance,
                    "recovery": of_all,
                    "recovery_of_context": of_context,
                }
                for distance, (of_all, of_context) in enumerate(pairs, start=1)
            ]

    def measure_needle(self, prompt: NeedlePrompt) -> None:
        """Measures acceptance and recovery where each fact is to be told."""
        self._comparison.watchers = []
        self._comparison.read(prompt.tokens)
        for question, depth in zip(prompt.questions, self._config.needle.depths, strict=True):
            self._comparison.rewind()
            self._ask(prompt, question, depth)

    def _ask(self, prompt: NeedlePrompt, question: Question, depth: float) -> None:
        """Asks for one fact, and adds its rows to the table needle; `depth` is what was asked for."""
        comparison = self._comparison
        comparison.watchers = []
        comparison.add(question.tokens[:-1])
        comparison.look(question.tokens[-1])
        recovery = Recovery(comparison, self._config.budgets)
        of_fact = FactRecovery(comparison, question.fact_begin, question.fact_end)
        comparison.watchers = [recovery.see, of_fact.see]
        answer, told = question.answer, iter(question.answer)
        target_rows: list[torch.Tensor] = []
        draft_rows: dict[DraftCache, list[torch.Tensor]] = {}
        for round_ in comparison.rounds(question.tokens[-1], len(answer), lambda probs: next(told)):
            target_rows += round_.target_probs
            for draft, rows in round_.draft_probs.items():
                draft_rows.setdefault(draft, []).extend(rows)
        shares, fact_shares = recovery.shares(), of_fact.recovered()
        for draft, rows in draft_rows.items():
            key = draft.name, draft.budget
            self.rows["needle"].append(
                {
                    "form": str(prompt.form),
                    "asked_depth": depth,
                    "depth": question.depth,
                    "fact_begin": question.fact_begin,
                    "fact_end": question.fact_end,
                    "prompt_tokens": len(prompt.tokens),
                    "answer_tokens": len(answer),
                    "cache": draft.name,
                    "budget": draft.budget,
                    "acceptance": fmean(acceptance(p, q) for p, q in zip(target_rows, rows, strict=True)),
                    "target_probability": _mean_probability(target_rows, answer),
                    "draft_probability": _mean_probability(rows, answer),
                    "recovery": float(shares[key].mean()),
                    "attention_to_fact": of_fact.share_of_attention,
                    # The best tokens of each query are not chosen of the fact.
                    "recovery_of_fact": fact_shares.get(key, ""),
                }
            )


def acceptance(p: torch.Tensor, q: torch.Tensor) -> float:
    """The chance that a token drawn from q [V] is accepted for p."""
    return float(p.minimum(q).sum())


def _mean_probability(rows: list[torch.Tensor], tokens: list[int]) -> float:
    """The mean of what each distribution [V] gives to its token."""
    return fmean(float(row[token]) for row, token in zip(rows, tokens, strict=True))
