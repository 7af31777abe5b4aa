"""The speculation hierarchy: one round drafts, drafts by retrieval, verifies. Read this first.

Three levels, each an exact sampler of its own model that takes the level below as its proposal:

    drafter (1)  --γ1 tokens-->  retrieval draft (2)  --γ2 tokens-->  target on the full cache (3)  -->  text

Without a retriever the drafter proposes to the target; without either, the target decodes alone. Every mode and
placement runs this loop; orchestrator.roles says what it asks of each level.

With `overlap`, drafting goes on while the target verifies (orchestrator.ahead), and a block begins with what was
drafted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar, cast

from conf.schema import NEVER, Overlap
from orchestrator.ahead import DraftingAhead
from orchestrator.pace import AdaptivePace
from orchestrator.rebuild_policy import RebuildPolicy
from orchestrator.roles import BackgroundVerifierRole, DrafterRole, RetrieverRole, Role, VerifierRole
from orchestrator.round import Phase, PhaseClock, Round
from orchestrator.session import Session
from tiers.errors import DamagedBlockError
from workers.messages import Draft, InnerStep, Verdict

MAX_REREADS = 3
"""Rereads of all tokens in one phase of a round: a disk that goes on damaging blocks ends the run."""
Result = TypeVar("Result")


@dataclass(kw_only=True)
class Hierarchy:
    """Advances a session, one round at a time."""

    session: Session
    verifier: VerifierRole
    """The target's role; with `overlap` a BackgroundVerifierRole."""
    retriever: RetrieverRole | None = None
    drafter: DrafterRole | None = None
    gamma1: int = 0
    gamma2: int = 0
    rebuild_policy: RebuildPolicy = field(default_factory=lambda: RebuildPolicy(NEVER))
    overlap: Overlap = Overlap.off
    pace: AdaptivePace | None = None
    """Chooses `gamma1`, `gamma2` and the budget of each round, where they are not configured."""
    budget: int | None = None
    """Budget of the retrieval cache in tokens, where it is chosen."""
    num_rounds: int = 0
    num_rereads: int = 0
    """Times that a stored block was found damaged, and all tokens were read again."""
    original_length: int | None = None
    """Tokens up to which the target reads a text in one way, and beyond which it reads all of it in another; None:
    always in one. See workers.checkpoint.families."""

    def __post_init__(self) -> None:
        self._clock, self._must_rebuild = PhaseClock(), False
        drafts_ahead = self.overlap is not Overlap.off and self._drafts and self.gamma2 > 0
        self._ahead = DraftingAhead(self.overlap, self._step) if drafts_ahead else None

    def start(self) -> Round:
        """Reads the prompt and generates the first token, by the target alone."""
        for role in reversed(self._roles):  # the verifier takes longest, and is waited for
            role.prefill(self.session.prompt)
        return self._verify_and_commit(Draft(), [], num_steps_ahead=0)

    def round(self) -> Round:
        """Drafts and verifies: at least one final token, at most γ2 + γ1 + 1."""
        if self.pace is not None:
            self.pace.choose()
            self.gamma1, self.gamma2, self.budget = self.pace.gamma1, self.pace.gamma2, self.pace.budget
        # The target adds a token to what it accepts, so the last token is never worth drafting.
        most = self.session.remaining - 1
        if self.original_length is not None and self.session.length <= self.original_length:
            most = min(most, self.original_length - self.session.length)  # a block is read in one way
        return self._verify_and_commit(*self._draft_block(most))

    def _draft_block(self, most: int) -> tuple[Draft, list[tuple[int, int]], int]:
        """At least γ2 tokens for the target to verify, `most` at the most; their inner steps, and how many of these
        were made ahead."""
        block, inner_steps = (Draft(), []) if self._ahead is None else self._ahead.take_next()
        num_steps_ahead, count = len(inner_steps), min(self.gamma2, most)
        while self._drafts and len(block) < count:
            step = self._step(block.tokens, count - len(block))
            block.extend(step.draft)
            if self.retriever is None:
                break
            inner_steps.append((step.num_proposed, step.num_accepted))
            if not len(step.draft):
                break  # the level is out of order for now: the target goes on with what there is
        return block.cut(max(0, most)), inner_steps, num_steps_ahead

    def _step(self, after: list[int], count: int, branch: int = 0) -> InnerStep:
        """Up to `count` tokens of the drafter; or what the retrieval draft makes of up to γ1 of them, and one more."""
        if self.retriever is not None:
            # An inner step adds a token to what it verifies, the target another, and nothing goes past the last token.
            count = min(self.gamma1, self.session.remaining - 2 - len(after))
        draft = Draft()
        if self.drafter is not None and count > 0:
            with self._clock(Phase.draft):
                draft = self.drafter.propose(after, count, branch)
        if self.retriever is None:
            return InnerStep(draft=draft, num_proposed=0, num_accepted=0)
        with self._clock(Phase.retrieval):
            return self.retriever.extend(after, draft, branch)

    def _verify_and_commit(self, block: Draft, inner_steps: list[tuple[int, int]], num_steps_ahead: int) -> Round:
        """The target judges `block`; what it accepts is final in all levels, and the retrieval cache follows."""
        verdict = self._undamaged(Phase.verify, lambda: self._verify(block))
        length_before = self.session.length
        tokens = self.session.commit([*block.tokens[: verdict.num_accepted], verdict.next_token])
        for role in self._roles:
            role.commit(tokens)
        passes_original_length = not self.session.is_finished and self._passes_original_length(length_before)
        if passes_original_length:
            self._reread()
        rebuilt = not self.session.is_finished and self._refresh(block, verdict)
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
            num_steps_ahead=num_steps_ahead,
            rebuilt=rebuilt,
            passes_original_length=passes_original_length,
            seconds=self._clock.take(),
            ahead=None if self._ahead is None else self._ahead.record,
        )
        self.num_rounds += 1
        if self.pace is not None:
            self.pace.learn(record)
        return record

    def _verify(self, block: Draft) -> Verdict:
        """The target's verdict; with `overlap` the levels below draft on until it is there."""
        if self._ahead is None or not self.num_rounds:  # the first token follows nothing that could be drafted on
            return self.verifier.verify(block)
        verifier = cast(BackgroundVerifierRole, self.verifier)
        verifier.begin_verify(block)
        self._ahead.draft_while(verifier.is_verifying, block, self.session.remaining, self.gamma2)
        verdict = verifier.finish_verify()
        self._ahead.take(verdict)
        return verdict

    def _refresh(self, block: Draft, verdict: Verdict) -> bool:
        """Gives the retriever the true keys and values of the new tokens; returns whether its cache was rebuilt."""
        retriever = self.retriever
        if retriever is None:
            return False
        due = self.rebuild_policy.is_due(len(block), verdict.num_accepted)
        self._must_rebuild |= self.num_rounds == 0 or due or retriever.needs_rebuild()
        if self.pace is not None:
            self._must_rebuild |= self.pace.wants_rebuild()  # which may choose another budget
        budget = None if self.pace is None else self.pace.budget
        self._undamaged(
            Phase.refresh,
            lambda: retriever.refresh(self.verifier.retrieval_update(rebuild=self._must_rebuild, budget=budget)),
        )
        rebuilt, self._must_rebuild = self._must_rebuild, False
        if rebuilt:
            self.rebuild_policy.rebuilt()
        return rebuilt

    def _undamaged(self, phase: Phase, act: Callable[[], Result]) -> Result:
        """The result of `act`, in which the verifier reads blocks, from blocks that are as they were written."""
        for _ in range(MAX_REREADS):
            try:
                with self._clock(phase):
                    return act()
            except DamagedBlockError:
                self.num_rereads += 1
                self._reread()
        with self._clock(phase):
            return act()

    def _passes_original_length(self, length_before: int) -> bool:
        """Whether the text has done so since it had `length_before` tokens."""
        return self.original_length is not None and length_before <= self.original_length < self.session.length

    def _reread(self) -> None:
        """Has the verifier read all tokens again."""
        with self._clock(Phase.reread):
            self.verifier.reread()
        self._must_rebuild = True  # what the verifier remembers having sent is forgotten with the rest

    @property
    def _drafts(self) -> bool:
        return self.retriever is not None or self.drafter is not None

    @property
    def _roles(self) -> list[Role]:
        return [role for role in (self.verifier, self.retriever, self.drafter) if role is not None]
