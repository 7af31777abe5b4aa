"""The speculation hierarchy: one round drafts, drafts by retrieval, verifies. Read this first.

Three levels, each an exact sampler of its own model that takes the level below as its proposal:

    drafter (1)  --γ1 tokens-->  retrieval draft (2)  --γ2 tokens-->  target on the full cache (3)  -->  text

Without a retriever the drafter proposes to the target; without either, the target decodes alone. Every mode and
placement runs this loop. Roles are given by their methods: here they may be objects of this process or proxies.

With `ahead`, drafting goes on while the target verifies (orchestrator.ahead), and a block begins with what was drafted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from conf.schema import Overlap
from orchestrator.ahead import AheadRecord, DraftingAhead
from orchestrator.pace import AdaptivePace
from orchestrator.rebuild_policy import RebuildPolicy
from orchestrator.session import Session
from tiers.errors import DamagedBlockError
from workers.messages import Draft, InnerStep, Verdict

MAX_REREADS = 3
"""Of all tokens, in one phase of a round: a disk that goes on damaging blocks ends the run."""


class DrafterRole(Protocol):
    """Level 1."""

    def prefill(self, prompt: list[int]) -> None: ...
    def propose(self, after: list[int], count: int, branch: int = 0) -> Draft:
        """At most `count` tokens that may follow the committed tokens and `after`.

        Drafts ahead on different guesses are different branches, from 1 on: their random numbers differ.
        """

    def commit(self, tokens: list[int]) -> None:
        """These tokens are final; whatever else was drafted is rolled back."""


class RetrieverRole(Protocol):
    """Level 2."""

    def prefill(self, prompt: list[int]) -> None: ...
    def extend(self, after: list[int], draft: Draft, branch: int = 0) -> InnerStep:
        """Verifies `draft`, which follows the committed tokens and `after`; hands up what it keeps and one more token,
        or nothing at all where it cannot."""

    def commit(self, tokens: list[int]) -> None: ...
    def refresh(self, update: Any) -> None:
        """Takes true keys and values from the verifier: of the new tokens, or a whole new retrieval cache."""

    def needs_rebuild(self) -> bool:
        """The room for new tokens is used up."""


class VerifierRole(Protocol):
    """Level 3."""

    def prefill(self, prompt: list[int]) -> None: ...
    def verify(self, draft: Draft) -> Verdict: ...
    def begin_verify(self, draft: Draft) -> None:
        """The same in three parts, for drafting ahead: begin, look, finish."""

    def is_verifying(self) -> bool: ...
    def finish_verify(self) -> Verdict: ...
    def commit(self, tokens: list[int]) -> None: ...
    def retrieval_update(self, *, rebuild: bool, budget: int | None = None) -> Any:
        """What the retriever's `refresh` wants, which may be read from blocks only there.

        `budget`: of the chunks to be chosen from now on, in tokens; None: as before.
        """

    def reread(self) -> None:
        """Reads all committed tokens again: what it had stored of them is damaged."""


@dataclass(kw_only=True)
class Round:
    """One verification and the drafting before it."""

    index: int
    proposed: list[int]
    origins: list[str]
    num_accepted: int
    tokens: list[int]
    """Final tokens: the accepted ones and the target's own, up to the end of generation."""
    gamma1: int = 0
    gamma2: int = 0
    budget: int | None = None
    """What the round was to draft by, and, where it is chosen, the budget of the retrieval cache in tokens."""
    inner_steps: list[tuple[int, int]] = field(default_factory=list)
    """(proposed, accepted) of each step between drafter and retrieval draft..."""
    num_steps_ahead: int = 0
    """...so many of which were made ahead."""
    rebuilt: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    """Per phase: draft, retrieval, verify, refresh, reread; what was drafted ahead is in none of them."""
    ahead: AheadRecord | None = None


@dataclass(kw_only=True)
class Hierarchy:
    """Advances a session, one round at a time."""

    session: Session
    verifier: VerifierRole
    retriever: RetrieverRole | None = None
    drafter: DrafterRole | None = None
    gamma1: int = 0
    gamma2: int = 0
    rebuild_policy: RebuildPolicy = field(default_factory=lambda: RebuildPolicy("never"))
    overlap: Overlap = Overlap.off
    pace: AdaptivePace | None = None
    """Chooses `gamma1`, `gamma2` and the budget of each round, where they are not configured."""
    budget: int | None = None
    """Of the retrieval cache, where it is chosen."""
    num_rounds: int = 0
    num_rereads: int = 0
    """So many times a stored block was found damaged, and all tokens were read again."""
    _must_rebuild: bool = False
    _seconds: dict[str, float] = field(default_factory=dict)
    _ahead: DraftingAhead | None = None
    _num_steps_ahead: int = 0

    def __post_init__(self) -> None:
        if self.overlap is not Overlap.off and self._drafts and self.gamma2:
            step = partial(self._step, call=lambda phase, function, *args: function(*args))
            self._ahead = DraftingAhead(self.overlap, step)

    def start(self) -> Round:
        """Reads the prompt and generates the first token, by the target alone."""
        for role in reversed(self._roles()):  # the verifier takes longest, and is waited for
            role.prefill(self.session.prompt)
        return self._verify_and_commit(Draft(), [])

    def round(self) -> Round:
        """One round: at least one final token, at most γ2 + γ1 + 1."""
        if self.pace is not None:
            self.pace.choose()
            self.gamma1, self.gamma2, self.budget = self.pace.gamma1, self.pace.gamma2, self.pace.budget
        # The target adds a token to what it accepts, so the last token is never worth drafting.
        block, inner_steps = self._draft_block(min(self.gamma2, self.session.remaining - 1))
        return self._verify_and_commit(block, inner_steps)

    def _draft_block(self, count: int) -> tuple[Draft, list[tuple[int, int]]]:
        """`count` tokens for the target to verify; more if the last inner step brings more and there is use for it."""
        block, inner_steps = (Draft(), []) if self._ahead is None else self._ahead.take_next()
        self._num_steps_ahead = len(inner_steps)
        while len(block) < count and self._drafts:
            step = self._step(block.tokens, count - len(block), 0, self._timed)
            block.extend(step.draft)
            if self.retriever is None:
                break
            inner_steps.append((step.num_proposed, step.num_accepted))
            if not len(step.draft):
                break  # the level is out of order for now: the target goes on with what there is
        return block.cut(max(0, self.session.remaining - 1)), inner_steps

    @property
    def _drafts(self) -> bool:
        return self.retriever is not None or self.drafter is not None

    def _step(self, after: list[int], count: int, branch: int, call: Callable) -> InnerStep:
        """Up to `count` tokens of the drafter; or what the retrieval draft makes of up to γ1 of them, and one more.

        `call(phase, function, ...)` calls it.
        """
        if self.retriever is None:
            draft = call("draft", self.drafter.propose, after, count, branch)
            return InnerStep(draft=draft, num_proposed=0, num_accepted=0)
        # An inner step adds a token to what it verifies, the target another, and nothing goes past the last token.
        count = min(self.gamma1, self.session.remaining - 2 - len(after))
        draft = Draft()
        if self.drafter is not None and count > 0:
            draft = call("draft", self.drafter.propose, after, count, branch)
        return call("retrieval", self.retriever.extend, after, draft, branch)

    def _verify_and_commit(self, block: Draft, inner_steps: list[tuple[int, int]]) -> Round:
        verdict = self._undamaged("verify", self._verify, block)
        tokens = self.session.commit([*block.tokens[: verdict.num_accepted], verdict.next_token])
        for role in self._roles():
            role.commit(tokens)
        rebuilt = self.retriever is not None and not self.session.is_finished and self._refresh(block, verdict)
        record = Round(
            index=self.num_rounds,
            proposed=block.tokens,
            origins=block.origins,
            num_accepted=verdict.num_accepted,
            tokens=tokens,
            gamma1=self.gamma1,
            gamma2=self.gamma2,
            budget=self.budget,
            inner_steps=inner_steps,
            num_steps_ahead=self._num_steps_ahead,
            rebuilt=rebuilt,
            seconds=self._seconds,
            ahead=None if self._ahead is None else self._ahead.record,
        )
        self._seconds = {}
        self.num_rounds += 1
        if self.pace is not None:
            self.pace.learn(record)
        return record

    def _verify(self, block: Draft) -> Verdict:
        if self._ahead is None or not self.num_rounds:  # the first token follows nothing that could be drafted on
            return self.verifier.verify(block)
        self.verifier.begin_verify(block)
        self._ahead.draft_while(self.verifier.is_verifying, block, self.session.remaining, self.gamma2)
        verdict = self.verifier.finish_verify()
        self._ahead.take(verdict)
        return verdict

    def _refresh(self, block: Draft, verdict: Verdict) -> bool:
        """Gives the retriever the true keys and values of the new tokens; returns whether its cache was rebuilt."""
        is_first = self.num_rounds == 0
        due = self.rebuild_policy.is_due(len(block), verdict.num_accepted)
        self._must_rebuild |= is_first or due or self.retriever.needs_rebuild()
        self._must_rebuild |= self.pace is not None and self.pace.wants_rebuild()
        self._undamaged("refresh", self._pass_on_update)
        rebuilt, self._must_rebuild = self._must_rebuild, False
        if rebuilt:
            self.rebuild_policy.rebuilt()
        return rebuilt

    def _pass_on_update(self) -> None:
        budget = None if self.pace is None else self.pace.budget
        self.retriever.refresh(self.verifier.retrieval_update(rebuild=self._must_rebuild, budget=budget))

    def _undamaged(self, phase: str, call, *args, **kwargs):
        """The result of `call`, in which the verifier reads blocks, from blocks that are as they were written."""
        for _ in range(MAX_REREADS):
            try:
                return self._timed(phase, call, *args, **kwargs)
            except DamagedBlockError:
                self.num_rereads += 1
                self._timed("reread", self.verifier.reread)
                self._must_rebuild = True  # what the verifier remembers having sent is forgotten with the rest
        return self._timed(phase, call, *args, **kwargs)

    def _roles(self) -> list[Any]:
        return [role for role in (self.verifier, self.retriever, self.drafter) if role is not None]

    def _timed(self, phase: str, call, *args, **kwargs):
        began = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - began
