"""Token ids in, text out as it becomes certain: unfinished characters and possible stop strings are held back."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class TextStream:
    """The text of a growing list of token ids, in linear time."""

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()):
        self._decode, self._stop = decode, stop
        self._ids: list[int] = []
        # ids[_settled:_read] are decoded again with what follows: some tokenizers treat a first token specially.
        self._settled = self._read = 0
        self._text, self.is_stopped = "", False
        # Where the text of each token ends in _text. A token that completes a character owns all of it.
        self._ends: list[int] = []
        self._num_taken_tokens = self._num_taken_chars = 0

    def push(self, token: int) -> None:
        """Adds a token; `is_stopped` is set once a stop string is complete, and the text ends before it."""
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
        if self.is_stopped:
            return
        known = self._decode(self._ids[self._settled : self._read])
        extended = self._decode(self._ids[self._settled :])
        if may_be_unfinished and extended.endswith("\ufffd"):
            return
        self._settled, self._read = self._read, len(self._ids)
        new = extended[len(known) :]
        longest_stop = max(map(len, self._stop), default=0)
        search_from = max(0, len(self._text) - longest_stop + 1)
        self._text += new
        found = [at for at in (self._text.find(stop, search_from) for stop in self._stop) if at >= 0]
        if found:
            self._text, self.is_stopped = self._text[: min(found)], True

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
