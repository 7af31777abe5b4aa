"""The policy of rebuilding the retrieval cache: never, every n verifications, or when the acceptance falls."""

from __future__ import annotations

from conf.schema import NEVER


class RebuildPolicy:
    """Decides after each verification; `rebuild` is `never`, `adaptive` or a number of verifications.

    Adaptive: the mean acceptance of the last `RECENT` verifications is held against the running mean since the
    build; a fall by more than `TOLERANCE` of it asks for a rebuild, at most one every `RECENT` verifications.
    A rebuild may also be forced by the cache, when its tail of new tokens is full.
    """

    RECENT = 4
    TOLERANCE = 0.05

    def __init__(self, rebuild: int | str):
        self._rebuild = rebuild
        self._rates: list[float] = []

    def is_due(self, num_proposed: int, num_accepted: int) -> bool:
        """Counts a verification, and tells whether a rebuild is due; called exactly once for each verification."""
        if not num_proposed or self._rebuild == NEVER:
            return False
        self._rates.append(num_accepted / num_proposed)
        if isinstance(self._rebuild, int):
            return len(self._rates) >= self._rebuild
        if len(self._rates) <= self.RECENT:
            return False
        recent = sum(self._rates[-self.RECENT :]) / self.RECENT
        running = sum(self._rates) / len(self._rates)
        return recent < running * (1 - self.TOLERANCE)

    def rebuilt(self) -> None:
        """The cache was built: measuring starts anew."""
        self._rates.clear()
