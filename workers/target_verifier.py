"""Level 3: the target on its full cache verifies the block, losslessly."""

from __future__ import annotations

from workers.acceptance import readable_draft
from workers.level import CachedModel, Level
from workers.messages import Draft, Verdict


class TargetVerifier(Level):
    """Keeps the part of a block that the target's distribution allows and adds one token."""

    def __init__(self, model: CachedModel, coupling):
        super().__init__(model)
        self._coupling = coupling

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

    def retrieval_update(self, *, rebuild: bool, budget: int | None = None):
        """What the retriever's `refresh` wants; call it after `commit`."""
        return self.model.retrieval_update(rebuild=rebuild, budget=budget)
