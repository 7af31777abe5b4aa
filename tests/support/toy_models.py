"""Toy language models: logits from a table, float64; and the real roles put together over them.

A toy's cache is the list of tokens it was made to hold, and its logits are computed from that list alone: whatever the
roles leave out, repeat or forget to roll back changes the output. V is the vocabulary, S the number of states.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from conf.schema import Mode, Overlap, SamplingConfig
from orchestrator.hierarchy import Hierarchy
from orchestrator.rebuild_policy import RebuildPolicy
from orchestrator.session import Session
from orchestrator.text_stream import TextStream
from workers.acceptance import GumbelCoupling, MaximalCoupling, RandomSource, distribution, make_coupling
from workers.drafter import Drafter
from workers.level import LogitsRules
from workers.lookup_drafter import LookupDrafter
from workers.messages import Draft, Verdict
from workers.retrieval_drafter import RetrievalDrafter
from workers.target_verifier import TargetVerifier

DRAFTER_LEVEL, RETRIEVAL_LEVEL, TARGET_LEVEL = 1, 2, 3
EXACT = SamplingConfig(temperature=1.0, top_p=1.0)


def random_table(num_states: int, vocab_size: int, seed: int, *, spread: float = 1.5) -> torch.Tensor:
    """Logits [S, V]."""
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(num_states, vocab_size, generator=generator, dtype=torch.float64)


def nearby_table(table: torch.Tensor, seed: int, *, distance: float = 1.0) -> torch.Tensor:
    """Logits [S, V] of a model that resembles the one of `table`."""
    return table + random_table(*table.shape, seed, spread=distance)


@dataclass(slots=True)
class ToyUpdate:
    """What a toy target tells a toy retrieval model: all tokens it holds, the drafted ones rolled back."""

    is_rebuild: bool
    tokens: list[int]


class MarkovModel:
    """A cached model whose next token depends on the last tokens held: as many as the table has room for.

    `tables` are logits [S, V] with S a power of `num_symbols`, the number of token ids it can read. The model uses
    the first table; after each rebuild the next one, in turn. `tail_tokens` makes it full, as a retrieval cache is.
    """

    def __init__(self, *tables: torch.Tensor, num_symbols: int | None = None, tail_tokens: int = 1000):
        self.tables, self.num_symbols = tables, num_symbols or tables[0].shape[1]
        self.vocab_size = tables[0].shape[1]
        self.order = 1
        while self.num_symbols**self.order < tables[0].shape[0]:
            self.order += 1
        assert self.num_symbols**self.order == tables[0].shape[0], "the table's rows are no power of the vocabulary"
        self.tokens: list[int] = []
        self.base = self.num_rebuilds = self.num_read = 0
        self._tail_tokens = tail_tokens

    @property
    def length(self) -> int:
        return len(self.tokens)

    def prefill(self, tokens: list[int]) -> None:
        self.tokens, self.base = list(tokens), 0

    def append(self, tokens: list[int], num_logits: int) -> torch.Tensor:
        assert 1 <= num_logits <= len(tokens), f"{num_logits} logits asked of {len(tokens)} tokens"
        if not all(0 <= token < self.num_symbols for token in tokens):
            raise IndexError(f"no embedding for one of {tokens}")
        self.num_read += len(tokens)
        self.tokens += tokens
        ends = range(len(self.tokens) - num_logits + 1, len(self.tokens) + 1)
        return self.tables[self.num_rebuilds % len(self.tables)][[self._state(self.tokens[:end]) for end in ends]]

    def truncate(self, length: int) -> None:
        assert self.base <= length <= self.length, f"truncate to {length}, held [{self.base}, {self.length}]"
        del self.tokens[length:]

    def _state(self, tokens: list[int]) -> int:
        state = 0
        for token in tokens[-self.order :]:
            state = state * self.num_symbols + token
        return state

    def logits_after(self, tokens: list[int]) -> torch.Tensor:
        """Logits [V], whatever the cache holds."""
        return self.tables[0][self._state(tokens)]

    def retrieval_update(self, *, rebuild: bool, budget: int | None = None) -> ToyUpdate:
        """As the target's model does it."""
        return ToyUpdate(rebuild, list(self.tokens))

    def load(self, update: ToyUpdate) -> None:
        """As the retrieval draft's model does it; only a rebuild may change what was held before the last one."""
        if update.is_rebuild:
            self.base = len(update.tokens)
            self.num_rebuilds += 1
        self.tokens[:] = update.tokens

    def start_sequence(self, num_prompt_tokens: int) -> None:
        """It has no positions."""

    @property
    def is_full(self) -> bool:
        return self.length - self.base > self._tail_tokens


class SlowVerifier:
    """A verifier in the background, for drafting ahead, that takes as long as `num_steps` steps of drafting."""

    def __init__(self, verifier: TargetVerifier, num_steps: int):
        self.verifier, self.model, self.num_steps = verifier, verifier.model, num_steps
        self._draft, self._steps_left = Draft(), 0

    def __getattr__(self, name: str):
        return getattr(self.verifier, name)

    def begin_verify(self, draft: Draft) -> None:
        self._draft, self._steps_left = draft, self.num_steps

    def is_verifying(self) -> bool:
        self._steps_left -= 1
        return self._steps_left >= 0

    def finish_verify(self) -> Verdict:
        return self.verifier.verify(self._draft)


LOOKUP = "lookup"


@dataclass(kw_only=True)
class Setup:
    """A session over toy models, ready to be made as often as wanted. Tables are logits [S, V]."""

    target: torch.Tensor
    retrieval: torch.Tensor | tuple[torch.Tensor, ...]
    drafter: torch.Tensor | str
    mode: Mode = Mode.triforce
    gamma1: int = 1
    gamma2: int = 1
    sampling: SamplingConfig = field(default_factory=lambda: EXACT)
    prompt: tuple[int, ...] = (0, 1, 0)
    max_new_tokens: int = 12
    rebuild: int | str = "never"
    overlap: Overlap = Overlap.off
    num_steps_ahead: int = 2
    """Of drafting ahead, during each verification."""
    tail_tokens: int = 1000
    """None: where block verification needs it."""
    make: Callable[..., MaximalCoupling | GumbelCoupling] = make_coupling
    """Makes each level's coupling."""
    wrap_drafter: Callable[[MarkovModel], MarkovModel] = lambda model: model
    wrap_target: Callable[[MarkovModel], MarkovModel] = lambda model: model
    make_pace: Callable[[], Any] = lambda: None
    make_rules: Callable[[], LogitsRules | None] = lambda: None
    """Makes each level's rules."""

    @property
    def vocab_size(self) -> int:
        return self.target.shape[1]

    def but(self, **changes) -> Setup:
        return replace(self, **changes)

    def build(self, random: RandomSource) -> Hierarchy:
        """The real roles and the real loop."""
        uses_retrieval = self.mode in (Mode.triforce, Mode.retrieval)
        uses_drafter = self.mode in (Mode.triforce, Mode.streaming)
        return Hierarchy(
            session=Session(prompt=list(self.prompt), max_new_tokens=self.max_new_tokens, text_stream=no_text()),
            verifier=SlowVerifier(
                TargetVerifier(
                    self.wrap_target(MarkovModel(self.target)),
                    self._coupling(random, TARGET_LEVEL, is_last=True),
                    rules=self.make_rules(),
                ),
                self.num_steps_ahead,
            ),
            retriever=self._retriever(random) if uses_retrieval else None,
            drafter=self._drafter(random) if uses_drafter else None,
            gamma1=self.gamma1,
            gamma2=0 if self.mode is Mode.autoregressive else self.gamma2,
            rebuild_policy=RebuildPolicy(self.rebuild),
            overlap=self.overlap,
            pace=self.make_pace(),
        )

    def _coupling(self, random: RandomSource, level: int, *, is_last: bool = False):
        return self.make(self.sampling, random, level, is_last=is_last)

    def _retriever(self, random: RandomSource) -> RetrievalDrafter:
        tables = self.retrieval if isinstance(self.retrieval, tuple) else (self.retrieval,)
        model = MarkovModel(*tables, num_symbols=self.vocab_size, tail_tokens=self.tail_tokens)
        names, rules = self.overlap is Overlap.outcomes, self.make_rules()
        return RetrievalDrafter(model, self._coupling(random, RETRIEVAL_LEVEL), names_runners_up=names, rules=rules)

    def _drafter(self, random: RandomSource) -> Drafter | LookupDrafter:
        coupling = self._coupling(random, DRAFTER_LEVEL)
        if isinstance(self.drafter, str):
            return LookupDrafter(self.vocab_size, one_hot=isinstance(coupling, MaximalCoupling))
        model = self.wrap_drafter(MarkovModel(self.drafter, num_symbols=self.vocab_size))
        names, rules = self.overlap is Overlap.outcomes, self.make_rules()
        return Drafter(model, coupling, self.vocab_size, names_runners_up=names, rules=rules)


def no_text() -> TextStream:
    return TextStream(lambda ids: "")


def make_setup(vocab_size: int = 3, *, order: int = 2, seed: int = 0, **changes) -> Setup:
    """Three unlike models: the retrieval model resembles the target, the drafter less so."""
    target = random_table(vocab_size**order, vocab_size, seed)
    models = {
        "target": target,
        "retrieval": nearby_table(target, seed + 1, distance=0.7),
        "drafter": nearby_table(target, seed + 2, distance=1.5),
    }
    return Setup(**models | changes)


def generate(hierarchy: Hierarchy) -> list[int]:
    """All tokens of the session."""
    hierarchy.start()
    while not hierarchy.session.is_finished:
        hierarchy.round()
    return hierarchy.session.generated


def target_law(
    setup: Setup,
    num_tokens: int,
    rule: Callable[[list[int], torch.Tensor], torch.Tensor] = lambda tokens, logits: logits,
) -> dict[tuple[int, ...], float]:
    """The probability of each sequence of the first `num_tokens` tokens, from the target's table alone.

    `rule(tokens before, logits [V])` gives the logits that count.
    """
    model, law = MarkovModel(setup.target), {(): 1.0}
    for _ in range(num_tokens):
        longer = {}
        for tokens, weight in law.items():
            before = [*setup.prompt, *tokens]
            probs = distribution(rule(before, model.logits_after(before))[None], setup.sampling)[0].tolist()
            longer |= {(*tokens, token): weight * prob for token, prob in enumerate(probs) if prob}
        law = longer
    return law


def total_variation(law: dict[tuple[int, ...], float], other: dict[tuple[int, ...], float]) -> float:
    return sum(abs(law.get(tokens, 0.0) - other.get(tokens, 0.0)) for tokens in law.keys() | other.keys()) / 2
