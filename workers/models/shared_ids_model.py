"""Level 1 with a few other words: a drafter that reads and drafts only the ids that it shares with the target."""

from __future__ import annotations

import torch

from workers.checkpoint.shared_vocabulary import SharedVocabulary
from workers.level import ReadingModel


class SharedIdsModel:
    """`model` as one that knows the target's ids; see workers.level.ReadingModel.

    It reads a stand-in for a token that is not shared. Logits of such ids are -inf before anything is made of them, so
    that what is drawn from and what a draft is judged by are the same distribution, in which they have no part.
    """

    def __init__(self, model: ReadingModel, vocabulary: SharedVocabulary):
        self._model, self.vocab_size = model, model.vocab_size
        self._stand_ins = vocabulary.stand_ins
        self._not_drafted = torch.tensor(vocabulary.not_drafted, dtype=torch.long)

    @property
    def length(self) -> int:
        """Number of tokens of the sequence that the cache holds."""
        return self._model.length

    def prefill(self, tokens: list[int]) -> None:
        """Empties the cache and reads `tokens`."""
        self._model.prefill(self._readable(tokens))

    def append(self, tokens: list[int], num_logits: int) -> torch.Tensor:
        """Reads `tokens` after those held; the logits [num_logits, V] that follow the last `num_logits` of them."""
        logits = self._model.append(self._readable(tokens), num_logits)
        self._not_drafted = self._not_drafted.to(logits.device)
        return logits.index_fill(-1, self._not_drafted, -torch.inf)

    def truncate(self, length: int) -> None:
        """Forgets all but the first `length` tokens."""
        self._model.truncate(length)

    def _readable(self, tokens: list[int]) -> list[int]:
        return [self._stand_ins.get(token, token) for token in tokens]


def on_shared_ids(model: ReadingModel, vocabulary: SharedVocabulary) -> ReadingModel:
    """`model` itself where ids mean the same to target and drafter."""
    return model if vocabulary.is_whole else SharedIdsModel(model, vocabulary)
