"""Level 2: the target's weights on a retrieved part of its cache verify the drafter and draft for the target."""

from __future__ import annotations

import logging
from typing import Generic, Protocol, TypeVar

from workers.acceptance import NotFiniteError, add_runners_up, readable_draft, round_key
from workers.level import CachedModel, Level, LevelCoupling, LogitsRules
from workers.messages import RETRIEVAL, Draft, InnerStep

logger = logging.getLogger(__name__)

UpdateT = TypeVar("UpdateT")
LoadedT = TypeVar("LoadedT", contravariant=True)


class RetrievalCachedModel(CachedModel, Protocol[LoadedT]):
    """The target's weights on the retrieval cache, which is filled by updates of one kind."""

    @property
    def is_full(self) -> bool:
        """True where the tail has no room for another round: the cache must be rebuilt."""

    def start_sequence(self, num_prompt_tokens: int) -> None:
        """A prompt of so many tokens comes, which may fix the rotation of each position."""

    def load(self, update: LoadedT) -> None:
        """Takes the verifier's keys and values; the cache then holds the verifier's tokens."""


class RetrievalDrafter(Level[RetrievalCachedModel[UpdateT]], Generic[UpdateT]):
    """Hands up tokens distributed exactly as the retrieval model samples: kept drafts, then a token of its own.

    With `names_runners_up` it names the runner-up of each token, for drafting ahead. `num_failures` counts the steps
    in which logits were not finite and nothing was handed up.
    """

    def __init__(
        self,
        model: RetrievalCachedModel[UpdateT],
        coupling: LevelCoupling,
        *,
        names_runners_up: bool = False,
        rules: LogitsRules | None = None,
    ):
        super().__init__(model, rules)
        self._coupling, self._names_runners_up = coupling, names_runners_up
        self.num_failures = 0

    def prefill(self, prompt: list[int], num_commits: int = 0) -> None:
        """Begins a sequence and reads nothing: the cache comes from the verifier, with the first `refresh`."""
        self.model.start_sequence(len(prompt))
        self._start(prompt, num_commits, [])

    def extend(self, after: list[int], draft: Draft, branch: int = 0) -> InnerStep:
        """Verifies `draft`, which follows the committed tokens and `after`, and adds a token of its own.

        A row of logits that is not finite hands up nothing: it costs speed only.
        """
        self._coupling.start_round(round_key(self.num_commits, branch))
        num_proposed, draft = len(draft), readable_draft(draft, self.model.vocab_size)
        logits = self.logits_after(after, draft.tokens)
        try:
            verdict, probs = self._coupling.verify(draft, logits, len(self.committed) + len(after))
        except NotFiniteError:
            self.num_failures += 1
            logger.warning("the retrieval draft's logits are not finite; going on without this draft")
            return InnerStep(draft=Draft(), num_proposed=num_proposed, num_accepted=0)
        kept = draft.cut(verdict.num_accepted)
        tokens, origins = [*kept.tokens, verdict.next_token], [*kept.origins, RETRIEVAL]
        handed_up = Draft(tokens=tokens, origins=origins, probs=probs)
        if self._names_runners_up:
            first_position = len(self.committed) + len(after)
            add_runners_up(handed_up, *self._coupling.runners_up(logits, handed_up.tokens, first_position))
        return InnerStep(draft=handed_up, num_proposed=num_proposed, num_accepted=verdict.num_accepted)

    def refresh(self, update: UpdateT) -> None:
        """Takes an update from the verifier, after which the cache holds what the verifier's does."""
        self.model.load(update)
        length = self.model.length
        self._held[self._num_agreed :] = self.committed[self._num_agreed : length]
        del self._held[length:]
        self._num_agreed = length

    def needs_rebuild(self) -> bool:
        """True where the cache has no room for another round."""
        return self.model.is_full
