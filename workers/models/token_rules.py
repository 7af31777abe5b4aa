"""Rules over the tokens of a sequence, each row of logits judged with the tokens before its own place.

These are the prompt's, those committed, and those drafted up to that place, whatever becomes of them: so each level
samples from what its model and the rules make of that prefix, and speculation stays exact.

Shapes: n rows, V vocabulary of the target, L tokens before a row.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

import torch

Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""A logits processor of transformers: tokens before [n, L] and logits [n, V] -> logits [n, V]."""


class Reads(StrEnum):
    """What a processor asks of the tokens before a row."""

    nothing = "nothing"
    occurrence = "occurrence"
    """Which tokens there are, in any order and however often."""
    sequence = "sequence"
    """All of them in order, or how many they are."""


class TokenRules:
    """The processors over the sequence of one level; see workers.level.LogitsRules.

    The sequence lies on the device of the logits and grows with what is committed, so that a long prompt is copied
    there once. `make(tokens, device)` makes the processors, with what they read, for a sequence that begins with
    `tokens`; `vocab_size` is V.
    """

    def __init__(self, make: Callable[[list[int], torch.device], list[tuple[Reads, Processor]]], vocab_size: int):
        self._make, self._vocab_size = make, vocab_size
        self.start()

    def start(self) -> None:
        """Forgets the sequence: another begins."""
        self._processors: list[tuple[Reads, Processor]] | None = None
        self._num_followed = 0
        self._seen: set[int] = set()

    def apply(self, logits: torch.Tensor, committed: list[int], tail: list[int]) -> torch.Tensor:
        """`logits` [n, any vocabulary] by the rules: the last row follows `committed` and all of `tail`, the one
        before it all but the last of them, and so on. float64 stays, all else becomes float32.

        A row in which the rules leave no token at all is given back as it was: none could be drawn, and behind drafted
        tokens that the rules forbid, which is where it comes, none will be.
        """
        num_rows, width = logits.shape
        self._follow(committed, logits.device)
        rows = logits if logits.dtype == torch.float64 else logits.float()
        # A drafter may have more ids than the target, or fewer: the rules are the target's.
        plain = rows = torch.nn.functional.pad(rows, (0, self._vocab_size - width), value=-torch.inf)
        num_before = [len(tail) - num_rows + 1 + row for row in range(num_rows)]  # of `tail`, for each row
        sequence = self._ids.followed_by(tail)
        assert self._processors is not None
        for reads, processor in self._processors:
            match reads:
                case Reads.nothing:
                    rows = processor(sequence, rows)
                case Reads.occurrence:
                    rows = processor(self._occurring(tail, num_before, committed[0]), rows)
                case Reads.sequence:
                    ends = [len(committed) + num for num in num_before]
                    each = [processor(sequence[:, :end], rows[row : row + 1]) for row, end in enumerate(ends)]
                    rows = torch.cat(each)
        return torch.where(rows.amax(-1, keepdim=True).isneginf(), plain, rows)[:, :width]

    def _follow(self, committed: list[int], device: torch.device) -> None:
        """Takes in what was committed since."""
        if self._processors is None:
            self._ids, self._distinct = GrowingIds(device), GrowingIds(device)
            self._processors = self._make(committed, device)
        new = committed[self._num_followed :]
        self._num_followed = len(committed)
        self._ids.add(new)
        unseen = [token for token in dict.fromkeys(new) if token not in self._seen]
        self._seen.update(unseen)
        self._distinct.add(unseen)

    def _occurring(self, tail: list[int], num_before: list[int], fill: int) -> torch.Tensor:
        """The tokens [n, any number] before each row, committed ones once; `fill`, one of these, fills rows up."""
        committed = self._distinct.followed_by([]).expand(len(num_before), -1)
        if not tail:
            return committed
        drafted = [tail[:num] + [fill] * (len(tail) - num) for num in num_before]
        return torch.cat([committed, torch.tensor(drafted, device=committed.device)], dim=1)


class GrowingIds:
    """Token ids on a device, to which more are added at the end."""

    def __init__(self, device: torch.device):
        self._buffer, self._num = torch.empty(1, 256, dtype=torch.long, device=device), 0

    def add(self, tokens: list[int]) -> None:
        """Adds `tokens`."""
        self.followed_by(tokens)
        self._num += len(tokens)

    def followed_by(self, tail: list[int]) -> torch.Tensor:
        """The ids and then `tail`, [1, their number]; of use until the next call."""
        end = self._num + len(tail)
        if end > self._buffer.shape[1]:
            self._buffer = torch.cat([self._buffer, self._buffer.new_empty(1, end)], dim=1)
        if tail:
            self._buffer[0, self._num : end] = torch.tensor(tail, device=self._buffer.device)
        return self._buffer[:, :end]
