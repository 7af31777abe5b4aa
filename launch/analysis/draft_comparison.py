"""The target goes on from a prompt, and draft caches are held against it, token by token.

For every token the distributions of all drafts meet the target's on the same text, so that acceptance is known itself,
not by the count of a few lucky draws. One prompt is read once for all drafts. The target's attention is watched token
by token (`watchers`): it tells rules that live of it, and whoever measures it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from conf.schema import ChunkDtype, SamplingConfig
from launch.analysis.compared_rules import (
    FORESEEING,
    HEAVY_HITTER,
    AttentionListener,
    TotalMass,
    make_rule,
    sums_of_chunks,
)
from launch.assembly.sizing import PIECE_TOKENS
from tiers.base import Tier
from tiers.device_layer import DeviceLayer
from tiers.full_cache import FullCache
from tiers.quantised_retrieval_cache import make_retrieval_cache
from tiers.retrieval.context_summary import ContextSummary
from tiers.retrieval.rule import MassObserver
from tiers.retrieval.selection import RetrievalSelection
from tiers.retrieval_cache import LayerUpdate
from workers.acceptance import distribution
from workers.checkpoint.facts import ModelFacts
from workers.models.causal_model import CausalModel
from workers.models.retrieval_model import RetrievalModel
from workers.models.target_model import TargetModel

WATCHED_MAX_BYTES = 256 << 20
"""Attention weights at once, all heads over all keys, while a prompt is read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DraftCache:
    """A retrieval cache, and how it is filled."""

    name: str
    budget: int
    """Tokens of each layer and kv head."""
    rule: str
    """One of those in launch/analysis/compared_rules.py."""
    newest_share: float = 0.5
    """Share of the budget that the newest tokens get."""
    summarises: bool = False
    """It has means of the tokens that were not chosen, too."""
    dtype: ChunkDtype = ChunkDtype.auto


@dataclass(kw_only=True, slots=True)
class ComparisonConfig:
    """Settings of a comparison: how the target goes on, and how often drafts are refreshed."""

    capacity: int
    """Tokens of prompt and continuation."""
    new_tokens: int
    """Tokens by which the target goes on, at most."""
    chunk_size: int
    rounds_of: int
    """Tokens of a verification, after which drafted keys and values are replaced by true ones."""
    rebuilds: bool = True
    """Chunks are chosen anew after each verification; otherwise only once, at the start."""
    summary_tokens: int = 64
    """Tokens of a group whose mean a cache that summarises has."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


@dataclass(slots=True)
class DraftedRound:
    """Tokens that were read, and the distributions [V] behind each: the target's and each draft's."""

    tokens: list[int] = field(default_factory=list)
    target_probs: list[torch.Tensor] = field(default_factory=list)
    draft_probs: dict[DraftCache, list[torch.Tensor]] = field(default_factory=dict)


class DraftComparison:
    """The target on its full cache, and all draft caches, over one prompt at a time.

    Each of the `watchers` is told (layer, mass): how the attention of each token that the target reads in `start`,
    `look` and `rounds` is spread over the tokens so far, [H, N], the mean of a kv head's query heads, adding up to 1.
    """

    def __init__(
        self, model: CausalModel, facts: ModelFacts, tier: Tier, drafts: list[DraftCache], config: ComparisonConfig
    ):
        self._config = config
        shape, capacity = facts.cache_shape, config.capacity
        self._cache = FullCache([DeviceLayer(shape, capacity, tier) for _ in facts.windows], facts.windows, None)
        self._rules = {
            name: make_rule(name, shape, capacity, config.chunk_size, tier, config.rounds_of)
            for name in dict.fromkeys(draft.rule for draft in drafts)
        }
        heavy_hitter = self._rules.get(HEAVY_HITTER)
        assert heavy_hitter is None or isinstance(heavy_hitter, TotalMass)
        self._heavy_hitter = heavy_hitter
        """The one rule that has to hear the whole prompt."""
        self._summary: ContextSummary | None = None
        num_groups = 0
        if any(draft.summarises for draft in drafts):
            self._summary = ContextSummary(shape, capacity, config.summary_tokens, tier)
            num_groups = self._summary.num_groups
        self._selections: dict[DraftCache, RetrievalSelection] = {}
        self._models: dict[DraftCache, RetrievalModel] = {}
        for draft in drafts:
            rule, summary = self._rules[draft.rule], self._summary if draft.summarises else None
            self._selections[draft] = RetrievalSelection(
                self._cache, rule, facts.windows, draft.budget, draft.newest_share, summary
            )
            tail = max(config.new_tokens, config.rounds_of) + 64
            sizes = (shape, draft.budget, tail, 8, tier, num_groups if draft.summarises else 0)
            self._models[draft] = RetrievalModel(model, make_retrieval_cache(draft.dtype.bits, *sizes))
        self._listen: MassObserver = self._hear_token
        ear = AttentionListener(shape, capacity, tier, lambda layer, mass: self._listen(layer, mass))
        self._target = TargetModel(
            model,
            self._cache,
            piece_tokens=self._piece_tokens(facts),
            hidden_tier=tier,
            selection=RetrievalSelection(self._cache, ear, facts.windows, 0, 0.0, self._summary),
        )
        if self._heavy_hitter is not None:
            self._target.prompt_observers = replace(self._target.prompt_observers, on_mass=self._hear_prompt)
        self._queries: dict[int, list[torch.Tensor]] = {}
        self._num_read = 0
        self.watchers: list[MassObserver] = []
        self.held: dict[DraftCache, list[torch.Tensor]] = {}
        """Positions [H, n] of what each draft held at its last choice, by layer; drafts that foresee have none."""
        self.base = 0
        """Tokens that there were at the last choice; drafts see all later ones too."""

    @property
    def length(self) -> int:
        """Tokens that the target has read."""
        return self._target.length

    def read(self, tokens: list[int]) -> None:
        """Reads a new prompt, from its first token."""
        for rule in self._rules.values():
            rule.reset()
        self._target.prefill(tokens)
        self._num_read = len(tokens)
        if self._heavy_hitter is not None:
            self._heavy_hitter.remember()

    def rewind(self) -> None:
        """Makes everything as it was after `read`: whatever came then is forgotten."""
        self._target.truncate(self._num_read)
        for rule in self._rules.values():
            rule.reset()
        if self._summary is not None:
            self._summary.reset()
        if self._heavy_hitter is not None:
            self._heavy_hitter.recall()
        self._queries.clear()

    def add(self, tokens: list[int]) -> None:
        """Reads more of the prompt, a few tokens."""
        if tokens:
            self._append_hearing(partial(self._hear_prompt, num_queries=len(tokens)), tokens)

    def start(self, token: int) -> torch.Tensor:
        """Reads the prompt's last token, for which drafts choose; returns the target's distribution [V] behind it."""
        probs = self._probs(self._target.append([token], 1)[0])
        self._choose(dict(self._target.queries))
        return probs

    def look(self, token: int) -> None:
        """Has the drafts choose for the prompt's last token, as `start` does, which is then still to be read."""
        self._target.append([token], 1)
        self._target.truncate(self._target.length - 1)
        self._choose(dict(self._target.queries))

    def rounds(self, token: int, count: int, choose: Callable[[torch.Tensor], int]) -> Iterator[DraftedRound]:
        """Reads `token`, and so on what `choose` makes of the target's distribution [V]: `count` tokens."""
        while count:
            now = DraftedRound()
            for _ in range(min(count, self._config.rounds_of)):
                now.tokens.append(token)
                now.target_probs.append(self._probs(self._target.append([token], 1)[0]))
                for layer, q in self._target.queries.items():
                    self._queries.setdefault(layer, []).append(q)
                for draft, model in self._models.items():
                    if draft.rule not in FORESEEING:
                        rows = now.draft_probs.setdefault(draft, [])
                        rows.append(self._probs(model.append([token], 1)[0]))
                token = choose(now.target_probs[-1])
            count -= len(now.tokens)
            self._ask_those_who_foresee(now)
            self._refresh()
            yield now

    def _ask_those_who_foresee(self, now: DraftedRound) -> None:
        """Adds what a draft makes of the round's tokens that has chosen by their own attention."""
        asked = [draft for draft in self._models if draft.rule in FORESEEING]
        if asked:
            self._target.truncate(self._target.length - len(now.tokens))
            for draft in asked:
                self._models[draft].load(self._selections[draft].rebuild(dict(self._target.queries)))
                logits = self._models[draft].append(now.tokens, len(now.tokens))
                now.draft_probs[draft] = [self._probs(row) for row in logits]
            self._append_hearing(lambda layer, mass: None, now.tokens)
        self._forget_foreseen()

    def _forget_foreseen(self) -> None:
        """Empties the rules that foresee, which learn from one round alone."""
        for name in FORESEEING:
            if name in self._rules:
                self._rules[name].reset()

    def _refresh(self) -> None:
        """Does what a verification brings: true keys and values, or chunks chosen anew for the round's queries."""
        queries = {layer: torch.cat(parts, dim=2) for layer, parts in self._queries.items()}
        self._queries.clear()
        if self._config.rebuilds:
            self._choose(queries)
            return
        for draft, selection in self._selections.items():
            if draft.rule not in FORESEEING:
                self._models[draft].load(selection.follow(queries))

    def _choose(self, queries: dict[int, torch.Tensor]) -> None:
        """Has all drafts that do not foresee choose anew for these queries, [H, G, T, D] by layer."""
        for draft, selection in self._selections.items():
            if draft.rule not in FORESEEING:
                update, self.held[draft] = selection.rebuild(queries), []
                self._models[draft].load(replace(update, layers=_noting(self.held[draft], update.layers)))
        self.base = self._cache.length
        self._forget_foreseen()

    def _append_hearing(self, listen: MassObserver, tokens: list[int]) -> None:
        """Has the target read tokens, their attention going to `listen` instead of rules and watchers."""
        self._listen = listen
        self._target.append(tokens, 1)
        self._listen = self._hear_token

    def _hear_token(self, layer: int, mass: torch.Tensor) -> None:
        """Tells the attention [H, >= N] of a token that the target reads to rules and watchers."""
        mass = mass[:, : self._cache.length + 1]
        for rule in self._rules.values():
            if (observe_mass := rule.mass_observer) is not None:
                observe_mass(layer, sums_of_chunks(mass, rule.chunk_size))
        for watcher in self.watchers:
            watcher(layer, mass)

    def _hear_prompt(self, layer: int, mass: torch.Tensor, num_queries: int) -> None:
        """Takes the mean attention of some of the prompt's tokens, which heavy hitters alone want to know."""
        if self._heavy_hitter is not None:
            self._heavy_hitter.add(layer, num_queries * mass)

    def _piece_tokens(self, facts: ModelFacts) -> int:
        """Tokens of the prompt that are read together: fewer where their attention is watched, which takes memory."""
        if self._heavy_hitter is None:
            return PIECE_TOKENS
        row_bytes: int = 4 * facts.config.get_text_config().num_attention_heads * self._config.capacity
        return max(16, min(PIECE_TOKENS, WATCHED_MAX_BYTES // row_bytes))

    def _probs(self, logits: torch.Tensor) -> torch.Tensor:
        """The distribution [V] that logits [V] stand for."""
        return distribution(logits[None], self._config.sampling)[0]


def _noting(positions: list[torch.Tensor], layers: Iterable[LayerUpdate]) -> Iterator[LayerUpdate]:
    """Passes the layers of a rebuild on as they are made, so that only one needs memory; notes their positions."""
    for layer in layers:
        assert layer.positions is not None, "a rebuild says where its tokens are"
        positions.append(layer.positions)
        yield layer
