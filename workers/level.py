"""A level: a model with a cache that follows the session's tokens; and what it asks of its model and its coupling."""

from __future__ import annotations

import hashlib
from array import array
from typing import Generic, Protocol, TypeVar

import torch

from workers.messages import Draft, Verdict


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


class LogitsRules(Protocol):
    """Rules that change logits by the tokens before them, the same at every level."""

    def start(self) -> None:
        """Begins a sequence."""

    def apply(self, logits: torch.Tensor, committed: list[int], tail: list[int]) -> torch.Tensor:
        """`logits` [n, V] by the rules; the last row follows `committed` and all of `tail`, each row before it one
        token fewer. `committed` is what it was in the call before, and perhaps more behind it."""


class LevelCoupling(Protocol):
    """How one level draws tokens and judges drafts; V is the vocabulary, n the number of drafted tokens."""

    def start_round(self, index: int) -> None:
        """Begins a verification; see acceptance.round_key for its index."""

    def draw(self, logits: torch.Tensor, position: int) -> tuple[int, torch.Tensor | None]:
        """A token for `position` by logits [V], and its distribution [V] where the level above needs it."""

    def verify(self, draft: Draft, logits: torch.Tensor, position: int) -> tuple[Verdict, list[torch.Tensor] | None]:
        """Judges `draft`, whose first token is for `position`, by logits [n + 1, V].

        Returns the verdict, and the distributions [V] of the num_accepted + 1 tokens handed up, where they are needed.
        """

    def runners_up(self, logits: torch.Tensor, tokens: list[int], position: int) -> tuple[list[int], list[float]]:
        """For each of `tokens`, from `position` on: the next best token, and how close it comes, between 0 and 1."""


ModelT = TypeVar("ModelT", bound=CachedModel)
ReadingModelT = TypeVar("ReadingModelT", bound=ReadingModel)


class Level(Generic[ModelT]):
    """Feeds a cached model what it has not seen yet, and rolls it back where the sequence took another way.

    A call names the tokens it means: the committed ones, then `after` (tentative), then the draft. Whatever the
    cache holds beyond their common prefix is dropped, so that no separate roll back is ever needed.

    `rules` are of the target, whose drafts and verdicts they change alike.
    """

    def __init__(self, model: ModelT, rules: LogitsRules | None = None):
        self.model, self._rules = model, rules
        self._start([], 0, [])

    def _start(self, prompt: list[int], num_commits: int, held: list[int]) -> None:
        """Begins a sequence, of which the cache holds the tokens `held`, a prefix of `prompt`."""
        self.committed, self.num_commits = list(prompt), num_commits
        self._held = list(held)  # the tokens in the cache
        self._num_agreed = len(held)  # so many of them are known to equal the committed ones
        if self._rules is not None:
            self._rules.start()
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
        """Logits [len(draft) + 1, V]: for each drafted token's place, and for the one after the last.

        The rules, where there are any, are applied to each row with the tokens before its place.
        """
        num_committed = len(self.committed)
        # The token before the draft is read in any case: its logits judge the first drafted token.
        common = self._roll_back(after + draft, num_committed + len(after) - 1)
        unseen = self.committed[common:] + (after + draft)[max(0, common - num_committed) :]
        logits = self.model.append(unseen, len(draft) + 1)
        self._held += unseen
        return logits if self._rules is None else self._rules.apply(logits, self.committed, after + draft)

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
