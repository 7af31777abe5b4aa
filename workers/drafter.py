"""Level 1: a small model on its StreamingLLM cache drafts for the level above."""

from __future__ import annotations

import logging

import torch

from workers.acceptance import NotFiniteError, add_runners_up, round_key
from workers.level import LevelCoupling, LogitsRules, ReadingLevel, ReadingModel
from workers.messages import DRAFTER, Draft

logger = logging.getLogger(__name__)


class Drafter(ReadingLevel[ReadingModel]):
    """Draws tokens one after another; `vocab_size` is the target's: ids beyond it are never drafted.

    With `names_runners_up` it names the runner-up of each token, for drafting ahead. `num_failures` counts the drafts
    that ended early because logits were not finite.
    """

    def __init__(
        self,
        model: ReadingModel,
        coupling: LevelCoupling,
        vocab_size: int,
        *,
        names_runners_up: bool = False,
        rules: LogitsRules | None = None,
    ):
        super().__init__(model, rules)
        self._coupling, self._vocab_size, self._names_runners_up = coupling, vocab_size, names_runners_up
        self.num_failures = 0

    def propose(self, after: list[int], count: int, branch: int = 0) -> Draft:
        """Drafts at most `count` tokens after the committed ones and `after`; `branch` keys their random numbers.

        A row of logits that is not finite ends the draft early: it costs speed only.
        """
        self._coupling.start_round(round_key(self.num_commits, branch))
        draft = Draft()
        distributions: list[torch.Tensor | None] = []
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
            if self._names_runners_up:
                add_runners_up(draft, *self._coupling.runners_up(logits[None], [token], first_position + index))
        draft.origins = [DRAFTER] * len(draft)
        if draft.tokens and distributions[0] is not None:  # some couplings need none
            draft.probs = distributions
        return draft
