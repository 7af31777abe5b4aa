"""What crosses between levels: a draft going up, a verdict coming back. Loads without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DRAFTER, RETRIEVAL, TARGET = "drafter", "retrieval", "target"


@dataclass(kw_only=True, slots=True)
class Draft:
    """Proposed tokens, in order, each with the distribution it was drawn from."""

    tokens: list[int] = field(default_factory=list)
    origins: list[str] = field(default_factory=list)
    """The level that first proposed each token."""
    probs: list[torch.Tensor] | None = None
    """One distribution [vocabulary] for each token; None where acceptance is by equality (gumbel, greedy)."""

    def __len__(self) -> int:
        return len(self.tokens)

    def extend(self, other: Draft) -> None:
        """Appends `other`, which continues this draft."""
        self.tokens += other.tokens
        self.origins += other.origins
        if other.probs is not None:
            self.probs = (self.probs or []) + other.probs

    def cut(self, count: int) -> Draft:
        """The first `count` tokens."""
        probs = None if self.probs is None else self.probs[:count]
        return Draft(tokens=self.tokens[:count], origins=self.origins[:count], probs=probs)


@dataclass(kw_only=True, slots=True)
class Verdict:
    """What the verifying level makes of a draft: it keeps a prefix and adds one token of its own."""

    num_accepted: int
    next_token: int


@dataclass(kw_only=True, slots=True)
class InnerStep:
    """One verification by the retrieval draft: the tokens it hands up and how the drafter fared."""

    draft: Draft
    num_proposed: int
    num_accepted: int
