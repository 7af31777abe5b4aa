"""Token ids in, text out as it becomes certain: unfinished characters and possible stop strings are held back."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass

UNFINISHED = "\ufffd"
CONTEXT_TOKENS = 16
"""Tokens before the text that are looked at: more than a character, and the space before it, can be made of."""

MAX_HELD_TOKENS = 256
"""Of a run of single bytes no more are held back: a model that repeats one for ever is seen to do so."""


@dataclass(kw_only=True, frozen=True, slots=True)
class TokenKinds:
    """Ids of a vocabulary that are not just a piece of text."""

    hidden: Set[int] = frozenset()
    """Special tokens, which leave no trace in the text."""
    single_bytes: Set[int] = frozenset()
    """Tokens of one byte that a decoder reads in runs: a byte that follows may change the text of those before."""


class TextStream:
    """The text of a growing list of token ids, in linear time: that of decoding them all at once.

    `decode` leaves out the tokens that `kinds` calls hidden. `stop` are texts, and `stop_ids` tokens, before which the
    text ends. With `after`, tokens that come before the text, it is their continuation; else it is decoded as a
    beginning, where some tokenizers drop a space.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        stop: Sequence[str] = (),
        *,
        stop_ids: Set[int] = frozenset(),
        kinds: TokenKinds | None = None,
        after: Sequence[int] = (),
    ):
        self._decode, self._stop, self._stop_ids = decode, stop, stop_ids
        self._kinds = kinds or TokenKinds()
        # ids[_settled:_read] are decoded again with what follows, so that what follows is no beginning to the decoder:
        # these always leave some text, unless there is none at all.
        self._ids = [token for token in after if token not in self._kinds.hidden][-CONTEXT_TOKENS:]
        self._settled, self._read = 0, len(self._ids)
        self._text, self.is_stopped = "", False
        # Where the text of each token ends in _text. A token that completes a character owns all of it.
        self._ends: list[int] = []
        self._num_taken_tokens = self._num_taken_chars = 0

    def push(self, token: int) -> None:
        """Adds a token; `is_stopped` is set once a stop string is complete, and the text ends before it."""
        if token in self._stop_ids:
            self._take(may_be_unfinished=False)
            self.is_stopped = True
        elif token not in self._kinds.hidden:
            self._ids.append(token)
            self._take(may_be_unfinished=True)
        self._ends.append(len(self._text))

    def close(self) -> None:
        """No more tokens: an unfinished character becomes a replacement character, and nothing is held back."""
        self._take(may_be_unfinished=False)
        self._stop = ()
        if self._ends:
            self._ends[-1] = len(self._text)

    def _take(self, *, may_be_unfinished: bool) -> None:
        if self.is_stopped or self._read == len(self._ids):
            return
        known = self._decode(self._ids[self._settled : self._read])
        extended = self._decode(self._ids[self._settled :])
        if may_be_unfinished and extended.endswith(UNFINISHED):
            return
        # What comes before the text may end within a character, which is then the text's.
        while not extended.startswith(known):
            known = known[:-1]
        text = self._text + extended[len(known) :]
        longest_stop = max(map(len, self._stop), default=0)
        search_from = max(0, len(self._text) - longest_stop + 1)
        found = [at for at in (text.find(stop, search_from) for stop in self._stop) if at >= 0]
        if found:
            self._text, self.is_stopped = text[: min(found)], True
        elif not (may_be_unfinished and self._may_change()):
            if len(extended) > len(known):
                self._settled = self._read
            self._text, self._read = text, len(self._ids)

    def _may_change(self) -> bool:
        """Whether a token that follows may change the text of what was not taken yet."""
        return self._ids[-1] in self._kinds.single_bytes and len(self._ids) - self._read < MAX_HELD_TOKENS

    @property
    def text(self) -> str:
        """All text so far, but for a tail that may be the beginning of a stop string."""
        if self.is_stopped:
            return self._text
        return self._text[: len(self._text) - self._possible_stop_length()]

    def take_pieces(self) -> list[tuple[int, str]]:
        """The text that became certain since the last call, by token: (index of the token, its part of the text)."""
        pieces, certain = [], len(self.text)
        while self._num_taken_chars < certain:
            end = min(self._ends[self._num_taken_tokens], certain)
            if end > self._num_taken_chars:
                pieces.append((self._num_taken_tokens, self._text[self._num_taken_chars : end]))
                self._num_taken_chars = end
            if self._num_taken_chars < certain:
                self._num_taken_tokens += 1
        return pieces

    def _possible_stop_length(self) -> int:
        lengths = (
            length for stop in self._stop for length in range(1, len(stop)) if self._text.endswith(stop[:length])
        )
        return max(lengths, default=0)
