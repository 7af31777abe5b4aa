"""Level 2: the target's weights on a retrieved part of its cache verify the drafter and draft for the target."""

from __future__ import annotations

import logging

from workers.acceptance import NotFiniteError, add_runners_up, readable_draft, round_key
from workers.level import CachedModel, Level
from workers.messages import RETRIEVAL, Draft, InnerStep

logger = logging.getLogger(__name__)


class RetrievalDrafter(Level):
    """Hands up tokens distributed exactly as the retrieval model samples: kept drafts, then a token of its own.

    `names_runners_up`: of each token, for drafting ahead.
    """

    def __init__(self, model: CachedModel, coupling, *, names_runners_up: bool = False):
        super().__init__(model)
        self._coupling, self._names_runners_up = coupling, names_runners_up
        self.num_failures = 0

    def prefill(self, prompt: list[int], num_commits: int = 0) -> None:
        """Reads nothing: its cache comes from the verifier, with the first `refresh`."""
        self._start(prompt, num_commits, [])

    def extend(self, after: list[int], draft: Draft, branch: int = 0) -> InnerStep:
        """See orchestrator.hierarchy.RetrieverRole. A broken row of logits hands up nothing: it costs speed only."""
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

    def refresh(self, update) -> None:
        """See orchestrator.hierarchy.RetrieverRole; the cache then holds what the verifier's does, or follows it."""
        self.model.load(update)
        length = self.model.length
        self._held[self._num_agreed :] = self.committed[self._num_agreed : length]
        del self._held[length:]
        self._num_agreed = length

    def needs_rebuild(self) -> bool:
        return self.model.is_full
