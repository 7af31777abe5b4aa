"""The record of one round, and the clock of its phases."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum

from orchestrator.ahead import AheadRecord


class Phase(StrEnum):
    """Part of a round whose time is taken; reports name it so."""

    draft = "draft"
    """The drafter drafts."""
    retrieval = "retrieval"
    """The retrieval draft verifies that, and adds a token."""
    verify = "verify"
    """The target verifies the block."""
    refresh = "refresh"
    """True keys and values go to the retrieval cache."""
    reread = "reread"
    """All tokens are read again: a stored block was damaged, or the text passed the target's original length."""


@dataclass(kw_only=True)
class Round:
    """One verification and the drafting before it."""

    index: int
    """0: the prompt and the first token."""
    proposed: list[int]
    """The block that the target verified, as token ids."""
    origins: list[str]
    """The level that first proposed each token of the block."""
    num_accepted: int
    """Tokens of the block that the target accepted."""
    tokens: list[int]
    """Final tokens: the accepted ones and the target's own, up to the end of generation."""
    gamma1: int = 0
    """γ1 that the round was to draft by."""
    gamma2: int = 0
    """γ2 that the round was to draft by."""
    budget: int | None = None
    """Budget of the retrieval cache in tokens, where it is chosen round by round."""
    inner_steps: list[tuple[int, int]] = field(default_factory=list)
    """(proposed, accepted) of each step between drafter and retrieval draft."""
    num_steps_ahead: int = 0
    """Number of inner steps, the first ones, that were made ahead."""
    rebuilt: bool = False
    """The retrieval cache was built anew at the round's end."""
    passes_original_length: bool = False
    """With its tokens the text passed the target's original length, and all tokens were read again."""
    seconds: dict[Phase, float] = field(default_factory=dict)
    """Seconds of each phase that there was; drafting ahead is in none of them."""
    ahead: AheadRecord | None = None
    """Counts of what was drafted during the verification; None without overlap."""


class PhaseClock:
    """Adds up the seconds of a round's phases: `with clock(Phase.verify): ...`.

    A phase within another is part of that one: what is drafted during a verification takes no time of its own.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self._now = now
        self._seconds: dict[Phase, float] = {}
        self._is_running = False

    @contextmanager
    def __call__(self, phase: Phase) -> Iterator[None]:
        if self._is_running:
            yield
            return
        self._is_running, began = True, self._now()
        try:
            yield
        finally:
            self._is_running = False
            self._seconds[phase] = self._seconds.get(phase, 0.0) + self._now() - began

    def take(self) -> dict[Phase, float]:
        """Seconds of each phase since this was called last."""
        seconds, self._seconds = self._seconds, {}
        return seconds
