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

from conf.schema import ChunkDtype, RetrievalRuleName, SamplingConfig
from launch.assembly.sizing import PIECE_TOKENS
from tiers.base import Tier
from tiers.full_cache import DeviceLayer, FullCache
from tiers.quantised_retrieval_cache import make_retrieval_cache
from tiers.retrieval.attention_rule import DECAY, AttentionRule
from tiers.retrieval.context_summary import ContextSummary
from tiers.retrieval.mean_key_rule import MeanKeyRule
from tiers.retrieval.rule import MassObserver, rule_class
from tiers.retrieval.selection import RetrievalSelection
from tiers.retrieval_cache import LayerUpdate
from workers.acceptance import distribution
from workers.models.causal_model import CausalModel
from workers.models.facts import ModelFacts
from workers.models.retrieval_model import RetrievalModel
from workers.models.target_model import TargetModel

PAGE_BOUND, ORACLE, TOP_K, HEAVY_HITTER = "page_bound", "oracle", "top_k", "heavy_hitter"
FORESEEING = (ORACLE, TOP_K)
"""Rules that know what the tokens of a round will attend to."""
WATCHED_MAX_BYTES = 256 << 20
"""Of attention weights at once, all heads over all keys, while a prompt is read."""


class PageBound(MeanKeyRule):
    """Quest's rule (arXiv 2406.10774, section 3.3): of a chunk, the highest score that a key within the bounds of its
    keys could have."""

    def catch_up(self, cache: FullCache) -> None:
        super().catch_up(cache)
        num_tokens = cache.length // self.chunk_size * self.chunk_size
        chunks = [
            cache.read(layer, 0, num_tokens)[0].unflatten(1, (-1, self.chunk_size)) for layer in range(self._num_layers)
        ]
        self._bounds = [(k.amin(2).float(), k.amax(2).float()) for k in chunks]

    def scores(self, layer: int, q: torch.Tensor, num_chunks: int) -> torch.Tensor:
        """See RetrievalRule."""
        low, high = (bound[:, :num_chunks].transpose(1, 2) for bound in self._bounds[layer])
        q = q.flatten(1, 2).float()
        scores = (q.clamp_min(0) @ high + q.clamp_max(0) @ low) * q.shape[-1] ** -0.5
        return torch.softmax(scores, -1).mean(1)


class TotalMass(AttentionRule):
    """The attention of all queries since the last reset, none forgotten.

    Over a whole sequence these are the heavy hitters of H2O (arXiv 2306.14048), here from the full attention of every
    query, where H2O knows only what it has not yet dropped.
    """

    def __init__(self, *args):
        super().__init__(*args, decay=1.0)

    def scores(self, layer: int, q: torch.Tensor, num_chunks: int) -> torch.Tensor:
        """See RetrievalRule."""
        mass = self._mass[layer, :, :num_chunks]
        return mass / mass.sum(1, keepdim=True).clamp_min(1e-9)

    def remember(self) -> None:
        self._remembered = self._mass.clone()

    def recall(self) -> None:
        self._mass.copy_(self._remembered)


class WatchedMass(AttentionRule):
    """Not a rule but an ear: the target tells it each token's attention, and it tells `listen(layer, mass)`."""

    def __init__(self, *args, listen: Callable[[int, torch.Tensor], None]):
        super().__init__(*args)
        self._listen = listen

    @property
    def mass_observer(self) -> MassObserver:
        return self._listen


@dataclass(frozen=True, kw_only=True, slots=True)
class DraftCache:
    """A retrieval cache of `budget` tokens, and how it is filled."""

    name: str
    budget: int
    rule: str
    """A RetrievalRuleName, page_bound, heavy_hitter, or one that foresees: oracle (chunks) or top_k (tokens)."""
    newest_share: float = 0.5
    summarises: bool = False
    dtype: ChunkDtype = ChunkDtype.auto


@dataclass(kw_only=True, slots=True)
class ComparisonConfig:
    """How the target goes on, and how often drafts are refreshed."""

    capacity: int
    """Tokens of prompt and continuation."""
    new_tokens: int
    chunk_size: int
    rounds_of: int
    """Tokens of a verification: then drafted keys and values are replaced by true ones"""
    rebuilds: bool = True
    """and chunks are chosen anew; otherwise only once, at the start."""
    summary_tokens: int = 64
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


@dataclass(slots=True)
class DraftedRound:
    """Tokens that were read, and the distributions [V] behind each: the target's and each draft's."""

    tokens: list[int] = field(default_factory=list)
    target_probs: list[torch.Tensor] = field(default_factory=list)
    draft_probs: dict[DraftCache, list[torch.Tensor]] = field(default_factory=dict)


class DraftComparison:
    """The target on its full cache, and all draft caches, over one prompt at a time.

    Each `watcher(layer, mass)` sees how the attention of each token that the target reads in `start`, `look` and
    `rounds` is spread over the tokens so far: [H, N], the mean of a kv head's query heads, adding up to 1.
    """

    def __init__(
        self, model: CausalModel, facts: ModelFacts, tier: Tier, drafts: list[DraftCache], config: ComparisonConfig
    ):
        self._config = config
        shape, capacity = facts.cache_shape, config.capacity
        self._cache = FullCache([DeviceLayer(shape, capacity, tier) for _ in facts.windows], facts.windows, None)
        of_chunks, of_tokens = (shape, capacity, config.chunk_size, tier), (shape, capacity, 1, tier)
        make_rule = {name: partial(rule_class(name), *of_chunks) for name in RetrievalRuleName} | {
            # Here tokens come one by one: an older token counts for as much less as it does in whole rounds.
            RetrievalRuleName.attention: lambda: AttentionRule(*of_chunks, decay=DECAY ** (1 / config.rounds_of)),
            PAGE_BOUND: lambda: PageBound(*of_chunks),
            ORACLE: lambda: TotalMass(*of_chunks),
            TOP_K: lambda: TotalMass(*of_tokens),
            HEAVY_HITTER: lambda: TotalMass(*of_tokens),
        }
        self._rules = {name: make_rule[name]() for name in dict.fromkeys(draft.rule for draft in drafts)}
        self._summary, num_groups = None, 0
        if any(draft.summarises for draft in drafts):
            self._summary = ContextSummary(shape, capacity, config.summary_tokens, tier)
            num_groups = capacity // config.summary_tokens
        self._selections, self._models = {}, {}
        for draft in drafts:
            rule, summary = self._rules[draft.rule], self._summary if draft.summarises else None
            self._selections[draft] = RetrievalSelection(
                self._cache, rule, facts.windows, draft.budget, draft.newest_share, summary
            )
            tail = max(config.new_tokens, config.rounds_of) + 64
            sizes = (shape, draft.budget, tail, 8, tier, num_groups if draft.summarises else 0)
            self._models[draft] = RetrievalModel(model, make_retrieval_cache(draft.dtype.bits, *sizes))
        ear = WatchedMass(*of_tokens, listen=lambda layer, mass: self._listen(layer, mass))
        self._target = TargetModel(
            model,
            self._cache,
            piece_tokens=self._piece_tokens(facts),
            hidden_tier=tier,
            selection=RetrievalSelection(self._cache, ear, facts.windows, 0, 0.0, self._summary),
        )
        if HEAVY_HITTER in self._rules:
            self._target.prompt_observers = replace(self._target.prompt_observers, on_mass=self._hear_prompt)
        self._queries: dict[int, list[torch.Tensor]] = {}
        self._listen, self._num_read = self._hear_token, 0
        self.watchers: list[Callable[[int, torch.Tensor], None]] = []
        self.held: dict[DraftCache, list[torch.Tensor]] = {}
        """Of each draft, by layer: positions [H, n] of what it held at its last choice, when there were `base` tokens;
        it sees all later ones too. Not of drafts that foresee."""
        self.base = 0

    @property
    def length(self) -> int:
        """Tokens that the target has read."""
        return self._target.length

    def read(self, tokens: list[int]) -> None:
        """A new prompt, from its first token."""
        for rule in self._rules.values():
            rule.reset()
        self._target.prefill(tokens)
        self._num_read = len(tokens)
        if HEAVY_HITTER in self._rules:
            self._rules[HEAVY_HITTER].remember()

    def rewind(self) -> None:
        """As after `read`: whatever came then is forgotten."""
        self._target.truncate(self._num_read)
        for rule in self._rules.values():
            rule.reset()
        if self._summary is not None:
            self._summary.reset()
        if HEAVY_HITTER in self._rules:
            self._rules[HEAVY_HITTER].recall()
        self._queries.clear()

    def add(self, tokens: list[int]) -> None:
        """More of the prompt, a few tokens."""
        if tokens:
            self._append_hearing(partial(self._hear_prompt, num_queries=len(tokens)), tokens)

    def start(self, token: int) -> torch.Tensor:
        """Reads the prompt's last token, for which the drafts choose; the target's distribution [V] behind it."""
        probs = self._probs(self._target.append([token], 1)[0])
        self._choose(dict(self._target.queries))
        return probs

    def look(self, token: int) -> None:
        """The drafts choose for the prompt's last token, as in `start`, which is then still to be read."""
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
        """What a draft would have made of the round's tokens whose choice was made by their own attention."""
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
        for name in FORESEEING:
            if name in self._rules:
                self._rules[name].reset()

    def _refresh(self) -> None:
        """As after a verification: true keys and values, or chunks chosen anew for the queries of these tokens."""
        queries = {layer: torch.cat(parts, dim=2) for layer, parts in self._queries.items()}
        self._queries.clear()
        if self._config.rebuilds:
            self._choose(queries)
            return
        for draft, selection in self._selections.items():
            if draft.rule not in FORESEEING:
                self._models[draft].load(selection.follow(queries))

    def _choose(self, queries: dict[int, torch.Tensor]) -> None:
        for draft, selection in self._selections.items():
            if draft.rule not in FORESEEING:
                update, self.held[draft] = selection.rebuild(queries), []
                self._models[draft].load(replace(update, layers=_noting(self.held[draft], update.layers)))
        self.base = self._cache.length
        self._forget_foreseen()

    def _append_hearing(self, listen: Callable[[int, torch.Tensor], None], tokens: list[int]) -> None:
        self._listen = listen
        self._target.append(tokens, 1)
        self._listen = self._hear_token

    def _hear_token(self, layer: int, mass: torch.Tensor) -> None:
        """The attention [H, >= N] of a token that the target reads."""
        mass = mass[:, : self._cache.length + 1]
        for rule in self._rules.values():
            if (observe_mass := rule.mass_observer) is not None:
                observe_mass(layer, sums_of_chunks(mass, rule.chunk_size))
        for watcher in self.watchers:
            watcher(layer, mass)

    def _hear_prompt(self, layer: int, mass: torch.Tensor, num_queries: int) -> None:
        """Their mean attention; of a prompt but its last token, heavy hitters alone want to know it."""
        if HEAVY_HITTER in self._rules:
            self._rules[HEAVY_HITTER].add(layer, num_queries * mass)

    def _piece_tokens(self, facts: ModelFacts) -> int:
        """Of the prompt, read together: fewer where their attention is watched, whose weights take memory."""
        if HEAVY_HITTER not in self._rules:
            return PIECE_TOKENS
        row_bytes = 4 * facts.config.get_text_config().num_attention_heads * self._config.capacity
        return max(16, min(PIECE_TOKENS, WATCHED_MAX_BYTES // row_bytes))

    def _probs(self, logits: torch.Tensor) -> torch.Tensor:
        return distribution(logits[None], self._config.sampling)[0]


def _noting(positions: list[torch.Tensor], layers: Iterable[LayerUpdate]) -> Iterator[LayerUpdate]:
    """The layers as they are made, so that only one of them needs memory, and where their tokens are."""
    for layer in layers:
        positions.append(layer.positions)
        yield layer


def sums_of_chunks(mass: torch.Tensor, size: int) -> torch.Tensor:
    """Of each `size` consecutive tokens of `mass` [H, N]: [H, chunks], the last of them perhaps of fewer."""
    if size == 1:
        return mass
    return torch.nn.functional.pad(mass, (0, -mass.shape[1] % size)).unflatten(1, (-1, size)).sum(2)
