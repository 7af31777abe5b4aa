"""Level 1 without a model: the continuation of the last place where the newest tokens occurred before.

Prompt lookup decoding (Saxena 2023) over the whole context and the generated text.
"""

from __future__ import annotations

import torch

from workers.messages import DRAFTER, Draft


class LookupDrafter:
    """Matches the longest suffix of up to `MAX_MATCH` tokens; each token costs `MAX_MATCH` dictionary entries.

    `one_hot` says whether drafts carry the distribution they were drawn from (all of it on one token), which the
    maximal coupling needs.
    """

    MIN_MATCH = 2
    MAX_MATCH = 6

    def __init__(self, vocab_size: int, *, one_hot: bool):
        self._vocab_size, self._one_hot = vocab_size, one_hot
        self._tokens: list[int] = []
        # For each length: the tokens of a match -> the index of the token that followed its last occurrence.
        self._followers: dict[int, dict[tuple[int, ...], int]] = {}

    def prefill(self, prompt: list[int], num_commits: int = 0) -> None:
        self._tokens = []
        self._followers = {length: {} for length in range(self.MIN_MATCH, self.MAX_MATCH + 1)}
        self.commit(prompt)

    def commit(self, tokens: list[int]) -> None:
        """Indexes the places before each new token; the newest suffix itself has no follower yet."""
        for token in tokens:
            for length, followers in self._followers.items():
                if len(self._tokens) >= length:
                    followers[tuple(self._tokens[-length:])] = len(self._tokens)
            self._tokens.append(token)

    def propose(self, after: list[int], count: int, branch: int = 0) -> Draft:
        """At most `count` tokens that followed the longest match of the newest tokens; none where nothing matches."""
        suffix = (self._tokens[-self.MAX_MATCH :] + after)[-self.MAX_MATCH :]
        for length in range(min(self.MAX_MATCH, len(suffix)), self.MIN_MATCH - 1, -1):
            follower = self._followers[length].get(tuple(suffix[-length:]))
            if follower is not None:
                return self._draft(self._tokens[follower : follower + count])
        return Draft()

    def _draft(self, tokens: list[int]) -> Draft:
        draft = Draft(tokens=tokens, origins=[DRAFTER] * len(tokens))
        if self._one_hot:
            probs = torch.zeros(len(tokens), self._vocab_size)
            draft.probs = list(probs.scatter_(1, torch.tensor(tokens)[:, None], 1.0))
        return draft
