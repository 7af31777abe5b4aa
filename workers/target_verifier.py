"""Level 3: the target on its full cache verifies the block, losslessly."""

from __future__ import annotations

from typing import Protocol

from tiers.retrieval_cache import RetrievalUpdate
from workers.acceptance import readable_draft
from workers.level import LevelCoupling, LogitsRules, ReadingLevel, ReadingModel
from workers.messages import Draft, UpdateNotice, Verdict


class TargetCachedModel(ReadingModel, Protocol):
    """The target on its full cache."""

    def reread(self, tokens: list[int]) -> None:
        """Empties the cache and reads `tokens`, a part of the sequence that `prefill` began, again."""

    def retrieval_update(self, *, rebuild: bool, budget: int | None = None) -> RetrievalUpdate:
        """Keys and values that the retrieval cache needs to follow, or, for a rebuild, to start anew."""


class Publisher(Protocol):
    """Brings updates to a retriever that is called through another process; see workers.process.update_path."""

    def publish(self, update: RetrievalUpdate) -> UpdateNotice:
        """Sends `update` on its way; returns what the retriever is to be told of it."""


class TargetVerifier(ReadingLevel[TargetCachedModel]):
    """Keeps the part of a block that the target's distribution allows and adds one token.

    `publisher` may be replaced between calls; without one, updates are handed to the caller as they are.
    """

    def __init__(
        self,
        model: TargetCachedModel,
        coupling: LevelCoupling,
        publisher: Publisher | None = None,
        rules: LogitsRules | None = None,
    ):
        super().__init__(model, rules)
        self._coupling, self.publisher = coupling, publisher

    def verify(self, draft: Draft) -> Verdict:
        """Judges `draft`, which follows the committed tokens. Raises NotFiniteError if the target's logits are not."""
        self._coupling.start_round(self.num_commits)
        draft = readable_draft(draft, self.model.vocab_size)
        logits = self.logits_after([], draft.tokens)
        verdict, _ = self._coupling.verify(draft, logits, len(self.committed))
        return verdict

    def reread(self) -> None:
        """Reads the committed tokens again but for the last, into an emptied cache."""
        self._held = self.committed[:-1]
        self._num_agreed = len(self._held)
        self.model.reread(self._held)

    def retrieval_update(self, *, rebuild: bool, budget: int | None = None) -> RetrievalUpdate | UpdateNotice:
        """The update that the retriever's `refresh` takes, or the notice of it; call it after `commit`.

        `budget` is of the chunks to be chosen from now on, in tokens; None leaves it as it is.
        """
        update = self.model.retrieval_update(rebuild=rebuild, budget=budget)
        return update if self.publisher is None else self.publisher.publish(update)
