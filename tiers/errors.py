"""Errors of tiers. Loads without torch."""

from __future__ import annotations


class DamagedBlockError(RuntimeError):
    """A stored block is not what was written; what it held must be computed again."""


class OutOfTierMemoryError(MemoryError):
    """A tier has less memory than was asked for; the message names tier, need and have."""
