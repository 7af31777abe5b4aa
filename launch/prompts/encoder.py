"""Text as token ids: of a long text only as many as are wanted, as if the whole had been tokenized and then cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from launch.prompts.document import Text

CHARS_PER_TOKEN = 8
PIECE_CHARS = 1 << 16
# The ends of a cut text may be tokenized differently than in the whole text; so far from them it is not.
MARGIN_TOKENS = 256
ALIKE_TOKENS = 16
NEIGHBOURS = ("\n", "a", ".")
"""Texts that may stand before another one to have it tokenized as the continuation that it is."""
PEEK_CHARS = 64


class Tokenizer(Protocol):
    """A fast tokenizer of transformers, as far as a prompt needs one."""

    chat_template: Any
    """Jinja text, or several by name; None for a model without one."""
    eos_token_id: int | None

    def __call__(self, text: str, **options: Any) -> Mapping[str, Any]: ...

    def decode(self, token_ids: list[int]) -> str | list[str]: ...

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]: ...


def special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Ids of the tokens that are left out of generated text, by their text."""
    return {token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}


class Encoder:
    """A tokenizer as prompts use it: what it puts before a text is added once, by name; what it puts behind, never."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.beginning = _beginning(tokenizer)
        """Tokens that the tokenizer puts before any text, such as its beginning of sequence."""
        apart, together = self._ids("\n") + self._ids("a"), self._ids("\na")
        self._treats_beginnings = apart != together

    def encode(self, text: str, *, special: bool = False, continues: bool = True) -> list[int]:
        """All tokens of a text, with nothing added.

        With `special`, special tokens written in it become special tokens; else they are plain text. With `continues`
        it is tokenized as it would be behind another text: no space is put before it.
        """
        return self.encode_first(Text(iter([text])), None, special=special, continues=continues) if text else []

    def encode_first(
        self, text: Text, count: int | None, *, special: bool = False, continues: bool = False
    ) -> list[int]:
        """The first `count` tokens of a text (all: None); options as for `encode`.

        The text is tokenized in pieces: a tokenizer takes more than a kilobyte for each token of what it is given at
        once. Pieces overlap, and are joined where both go on alike, far from the end of the one and the beginning of
        the other.
        """
        num_before = 0
        if continues and self._treats_beginnings:
            neighbour = self._neighbour(text.read(0, PEEK_CHARS)[0], special)
            text.put_before(neighbour)
            num_before = len(self._ids(neighbour))
            count = None if count is None else count + num_before
        ids: list[int] = []
        first = 0
        num_chars = PIECE_CHARS if count is None else min(PIECE_CHARS, CHARS_PER_TOKEN * (count + MARGIN_TOKENS))
        piece = self._encode(text, 0, num_chars, special)
        while not piece.is_last and (count is None or len(ids) + len(piece.ids) - first < count + MARGIN_TOKENS):
            joint = None
            if len(piece.ids) - first > 4 * MARGIN_TOKENS:
                following = self._encode(text, piece.starts[-3 * MARGIN_TOKENS], num_chars, special)
                joint = _joint(piece, following)
            if joint is None:
                num_chars *= 2
                piece = self._encode(text, piece.start, num_chars, special)
            else:
                end, next_first = joint
                ids += piece.ids[first:end]
                piece, first = following, next_first
                text.forget(piece.start)
        ids += piece.ids[first:]
        return ids[num_before:count]

    def _neighbour(self, beginning: str, special: bool) -> str:
        """A text with which the tokens of what follows do not merge; empty if there is none."""
        for neighbour in NEIGHBOURS:
            ids = self._ids(neighbour)
            if ids and self._ids(neighbour + beginning, special)[: len(ids)] == ids:
                return neighbour
        return ""

    def _ids(self, text: str, special: bool = False) -> list[int]:
        return self._encode(Text(iter([text])), 0, len(text), special).ids if text else []

    def _encode(self, text: Text, start: int, num_chars: int, special: bool) -> _Piece:
        string, is_last = text.read(start, num_chars)
        encoded = self.tokenizer(
            string,
            add_special_tokens=False,
            split_special_tokens=not special,
            return_offsets_mapping=True,
            verbose=False,
        )
        starts = [start + first for first, _ in encoded["offset_mapping"]]
        return _Piece(start, encoded["input_ids"], starts, is_last)


@dataclass(slots=True)
class _Piece:
    """Tokens of a part of the text, without those that a tokenizer adds, and where in the text each one begins."""

    start: int
    ids: list[int]
    starts: list[int]
    is_last: bool


def _joint(piece: _Piece, following: _Piece) -> tuple[int, int] | None:
    """Indices in each piece of a token that both have, a margin from the end of one and the beginning of the other."""
    index_at = {start: index for index, start in enumerate(following.starts)}
    for index in range(len(piece.ids) - 2 * MARGIN_TOKENS, len(piece.ids) - MARGIN_TOKENS):
        other = index_at.get(piece.starts[index])
        if other is None:
            continue
        if piece.ids[index : index + ALIKE_TOKENS] == following.ids[other : other + ALIKE_TOKENS]:
            return index, other
    return None


def _beginning(tokenizer: Tokenizer) -> list[int]:
    """Tokens that the tokenizer puts before any text; what it puts behind, an end of sequence, belongs in no prompt."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    ids, mask = encoded["input_ids"], encoded["special_tokens_mask"]
    num_before = mask.index(0) if 0 in mask else len(mask)
    return list(ids[:num_before])
