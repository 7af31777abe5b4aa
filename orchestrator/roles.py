"""The methods that the hierarchy asks of each level. Whoever has them plays the role: an object here, or a proxy."""

from __future__ import annotations

from typing import Any, Protocol

from workers.messages import Draft, InnerStep, Verdict


class Role(Protocol):
    """A level that follows the committed tokens of a session."""

    def prefill(self, prompt: list[int]) -> None:
        """Starts a session: reads `prompt`."""

    def commit(self, tokens: list[int]) -> None:
        """Takes `tokens` as final; whatever else was drafted is rolled back."""


class DrafterRole(Role, Protocol):
    """Level 1: a small model that drafts."""

    def propose(self, after: list[int], count: int, branch: int = 0) -> Draft:
        """Drafts at most `count` tokens that may follow the committed tokens and `after`.

        Drafts ahead on different guesses are different branches, from 1 on: their random numbers differ.
        """


class RetrieverRole(Role, Protocol):
    """Level 2: the target's weights on the retrieval cache."""

    def extend(self, after: list[int], draft: Draft, branch: int = 0) -> InnerStep:
        """Verifies `draft`, which follows the committed tokens and `after`; hands up what it keeps and one more token,
        or nothing at all where it cannot."""

    def refresh(self, update: Any) -> None:
        """Takes true keys and values from the verifier: of the new tokens, or a whole new retrieval cache."""

    def needs_rebuild(self) -> bool:
        """Tells whether the room for new tokens is used up."""


class VerifierRole(Role, Protocol):
    """Level 3: the target on the full cache."""

    def verify(self, draft: Draft) -> Verdict:
        """Judges `draft`, which follows the committed tokens. Raises DamagedBlockError."""

    def retrieval_update(self, *, rebuild: bool, budget: int | None = None) -> Any:
        """Makes what the retriever's `refresh` takes, which may read blocks only there. Raises DamagedBlockError.

        `budget`: of the chunks to be chosen from now on, in tokens; None: as before.
        """

    def reread(self) -> None:
        """Reads all committed tokens again: what it had stored of them is damaged."""


class BackgroundVerifierRole(VerifierRole, Protocol):
    """A verifier whose `verify` also comes in three parts, between which others draft ahead."""

    def begin_verify(self, draft: Draft) -> None:
        """Begins what `verify` does, and returns at once."""

    def is_verifying(self) -> bool:
        """Tells whether `finish_verify` would have to wait."""

    def finish_verify(self) -> Verdict:
        """Waits for the verdict. Raises DamagedBlockError."""
