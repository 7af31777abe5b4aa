"""What the three levels share: a model with a cache that follows the session's tokens."""

from __future__ import annotations

import hashlib
from array import array
from typing import Generic, Protocol, TypeVar

import torch


class CachedModel(Protocol):
    """A language model with its cache: it holds the first `length` tokens of a sequence."""

    vocab_size: int

    @property
    def length(self) -> int:
        """Number of tokens of the sequence that the cache holds."""

    def append(self, tokens: list[int], num_logits: int) -> torch.Tensor:
        """Reads `tokens` after those held; the logits [num_logits, V] that follow the last `num_logits` of them."""

    def truncate(self, length: int) -> None:
        """Forgets all but the first `length` tokens."""


class ReadingModel(CachedModel, Protocol):
    """A cached model that reads prompts itself; the retrieval draft's does not, it is given its cache."""

    def prefill(self, tokens: list[int]) -> None:
        """Empties the cache and reads `tokens`."""


ModelT = TypeVar("ModelT", bound=CachedModel)
ReadingModelT = TypeVar("ReadingModelT", bound=ReadingModel)


class Level(Generic[ModelT]):
    """Feeds a cached model what it has not seen yet, and rolls it back where the sequence took another way.

    A call names the tokens it means: the committed ones, then `after` (tentative), then the draft. Whatever the
    cache holds beyond their common prefix is dropped, so that no separate roll back is ever needed.
    """

    def __init__(self, model: ModelT):
        self.model = model
        self._start([], 0, [])

    def _start(self, prompt: list[int], num_commits: int, held: list[int]) -> None:
        """Begins a sequence, of which the cache holds the tokens `held`, a prefix of `prompt`."""
        self.committed, self.num_commits = list(prompt), num_commits
        self._held = list(held)  # the tokens in the cache
        self._num_agreed = len(held)  # so many of them are known to equal the committed ones
        self._digest, self._num_digested = hashlib.blake2b(digest_size=8), 0

    def commit(self, tokens: list[int]) -> None:
        """Makes `tokens` final, and rolls the cache back to its common prefix with them."""
        self.committed += tokens
        self.num_commits += 1
        self._roll_back([], len(self.committed))

    def state(self) -> str:
        """Digest of what ranks that do the same must agree on.

        It has the committed tokens, the number of commits, which keys random numbers (see KeyedRandom), and the
        cache's length.
        """
        self._digest.update(array("q", self.committed[self._num_digested :]).tobytes())
        self._num_digested = len(self.committed)
        tokens = f"{self._num_digested} tokens {self._digest.hexdigest()}"
        return f"{tokens}, {self.num_commits} commits, {self.model.length} tokens cached"

    def logits_after(self, after: list[int], draft: list[int]) -> torch.Tensor:
        """Logits [len(draft) + 1, V]: for each drafted token's place, and for the one after the last."""
        num_committed = len(self.committed)
        # The token before the draft is read in any case: its logits judge the first drafted token.
        common = self._roll_back(after + draft, num_committed + len(after) - 1)
        unseen = self.committed[common:] + (after + draft)[max(0, common - num_committed) :]
        logits = self.model.append(unseen, len(draft) + 1)
        self._held += unseen
        return logits

    def _roll_back(self, tail: list[int], limit: int) -> int:
        """Truncates to the common prefix with committed + tail, at most `limit` tokens; returns its length."""
        num_committed = len(self.committed)
        wanted_end = min(limit, len(self._held), num_committed + len(tail))
        common = min(self._num_agreed, wanted_end)
        while common < wanted_end:
            wanted = self.committed[common] if common < num_committed else tail[common - num_committed]
            if self._held[common] != wanted:
                break
            common += 1
        if common < len(self._held):
            self.model.truncate(common)
            del self._held[common:]
        self._num_agreed = min(common, num_committed)
        return common


class ReadingLevel(Level[ReadingModelT]):
    """A level whose model reads the prompt itself."""

    def prefill(self, prompt: list[int], num_commits: int = 0) -> None:
        """Reads the prompt but for its last token, whose logits the first verification asks for.

        `num_commits` is not 0 in a process that was restarted: its prompt has what so many commits added to it.
        """
        self._start(prompt, num_commits, prompt[:-1])
        self.model.prefill(self._held)
