"""A session: the prompt, the tokens accepted so far and how it ends; all that must survive a worker's death."""

from __future__ import annotations

from dataclasses import dataclass, field

from orchestrator.text_stream import TextStream

EOS, STOP, LENGTH = "eos", "stop", "length"
INTERRUPTED, FAILED = "interrupted", "failed"
"""Reasons that a run has, not its session: it ended before its text did."""


@dataclass(kw_only=True)
class Session:
    """Grows by accepted tokens only."""

    prompt: list[int]
    max_new_tokens: int
    text_stream: TextStream
    eos_ids: frozenset[int] = frozenset()
    generated: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    """eos, stop or length, once it is finished."""

    @property
    def remaining(self) -> int:
        """Tokens that may still be generated."""
        return self.max_new_tokens - len(self.generated)

    @property
    def length(self) -> int:
        """Tokens of the prompt and those generated."""
        return len(self.prompt) + len(self.generated)

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def text(self) -> str:
        return self.text_stream.text

    def commit(self, tokens: list[int]) -> list[int]:
        """Takes accepted tokens up to the one that ends generation (it included); returns those taken."""
        assert not self.is_finished, f"commit({tokens}) after the end ({self.finish_reason})"
        for count, token in enumerate(tokens, start=1):
            self.generated.append(token)
            self.text_stream.push(token)
            self.finish_reason = self._reason_to_end(token)
            if self.is_finished:
                self.text_stream.close()
                # What was held back, such as a character that stays unfinished, may complete a stop string.
                self.finish_reason = STOP if self.text_stream.is_stopped else self.finish_reason
                return tokens[:count]
        return tokens

    def _reason_to_end(self, token: int) -> str | None:
        if self.text_stream.is_stopped:
            return STOP
        if token in self.eos_ids:
            return EOS
        return None if self.remaining else LENGTH
