"""Level 1: a small model on its StreamingLLM cache drafts for the level above."""

from __future__ import annotations

import logging

from workers.acceptance import NotFiniteError
from workers.level import CachedModel, Level
from workers.messages import DRAFTER, Draft

logger = logging.getLogger(__name__)


class Drafter(Level):
    """Draws tokens one after another; `vocab_size` is the target's: ids beyond it are never drafted."""

    def __init__(self, model: CachedModel, coupling, vocab_size: int):
        super().__init__(model)
        self._coupling, self._vocab_size = coupling, vocab_size
        self.num_failures = 0

    def propose(self, after: list[int], count: int) -> Draft:
        """See orchestrator.hierarchy.DrafterRole. A broken row of logits ends the draft early: it costs speed only."""
        self._coupling.start_round(self.num_commits)
        draft, distributions = Draft(), []
        first_position = len(self.committed) + len(after)
        for index in range(count):
            logits = self.logits_after(after + draft.tokens, [])[0, : self._vocab_size]
            try:
                token, probs = self._coupling.draw(logits, first_position + index)
            except NotFiniteError:
                self.num_failures += 1
                logger.warning("the drafter's logits are not finite; going on without this draft")
                break
            draft.tokens.append(token)
            distributions.append(probs)
        draft.origins = [DRAFTER] * len(draft)
        if draft.tokens and distributions[0] is not None:
            draft.probs = distributions
        return draft
