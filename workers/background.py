"""A verifier that verifies in a thread, so that its process can draft meanwhile."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from workers.messages import Draft, Verdict


class InBackground:
    """Wraps a role of this process; what else it is asked, it does in the caller's thread, with no verification on."""

    def __init__(self, verifier):
        self._verifier = verifier
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="verifier")
        self._verification: Future[Verdict] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._verifier, name)

    def begin_verify(self, draft: Draft) -> None:
        """See orchestrator.hierarchy.VerifierRole."""
        self._verification = self._thread.submit(self._verifier.verify, draft)

    def is_verifying(self) -> bool:
        return not self._verification.done()

    def finish_verify(self) -> Verdict:
        return self._verification.result()
