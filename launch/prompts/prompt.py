"""The prompt as token ids: of a file, a text, an item of a data set, or the source of Python's standard library, with
what is asked of it (launch.prompts.workloads) around it.

Text is read and tokenized only as far as tokens are wanted, so a prompt cut from a huge file costs what it needs.
Special tokens written in the text are plain text; the tokenizer's own beginning of sequence is added as it does.
"""

from __future__ import annotations

import codecs
import os
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from conf.schema import ConfigError, PromptConfig
from launch.prompts.published_texts import check_item, read_item
from launch.prompts.workloads import Workload, make_workload

CHARS_PER_TOKEN = 8
PIECE_CHARS = 1 << 16
# The ends of a cut text may be tokenized differently than in the whole text; so far from them it is not.
MARGIN_TOKENS = 256
ALIKE_TOKENS = 16
# A fact is hidden at the end of a line, if there is one so near.
LINE_TOKENS = 64
BLOCK_BYTES = 1 << 18
ONLY_PACKAGES = {"site-packages", "dist-packages"}


class Tokenizer(Protocol):
    """A fast tokenizer of transformers, as far as a prompt needs one."""

    def __call__(self, text: str, **options: Any) -> Mapping[str, Any]: ...

    def decode(self, token_ids: list[int]) -> str | list[str]: ...


def check_prompt(config: PromptConfig) -> None:
    """Checks of a prompt what needs no tokenizer; raises ConfigError. A pipe is not read: its text comes only once."""
    if config.dataset is not None:
        check_item(config.dataset, config.path, config.item)
    elif config.path is not None and _is_pipe(config.path):
        return
    elif config.path is not None or config.text is not None:
        next(_pieces(config), None)


def _is_pipe(path: str) -> bool:
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def read_prompt(config: PromptConfig, tokenizer: Tokenizer, at_most: int | None = None) -> list[int]:
    """The first `config.max_tokens` tokens of the prompt, never more than `at_most`; raises ConfigError.

    A document is cut to that; what is asked of it never is.
    """
    limits = [limit for limit in (config.max_tokens, at_most) if limit is not None]
    limit = min(limits, default=None)
    workload = read_workload(config)
    head = _ids_of(tokenizer, workload.head, special=True) if workload.head else []
    tail = _ids_of(tokenizer, workload.tail)
    facts = [
        (depth, _ids_of(tokenizer, fact.text)) for depth, fact in zip(workload.depths, workload.facts, strict=True)
    ]
    num_taken = len(head) + len(tail) + sum(len(ids) for _, ids in facts)
    if num_taken and limit is not None and num_taken >= limit:
        raise ConfigError(
            f"prompt.max_tokens is {config.max_tokens}; it must be at least {num_taken + 1}: prompt.task={config.task} "
            f"takes {num_taken} tokens beside the document"
        )
    room = None if limit is None else limit - num_taken
    document = encode_first(_Text(_pieces(config)), tokenizer, room, special=not head)
    if not document:
        raise ConfigError(f"{_source(config)} has no tokens; it must have at least one")
    return head + _with_facts(document, facts, tokenizer) + tail


def read_text(config: PromptConfig, num_chars: int) -> str:
    """The prompt's first `num_chars` characters, before any limit of tokens; raises ConfigError."""
    return _Text(_pieces(config)).read(0, num_chars)[0]


def encode_first(text: _Text, tokenizer: Tokenizer, count: int | None, *, special: bool = True) -> list[int]:
    """The first `count` tokens of the text (all: None), as if the whole text had been tokenized and then cut.

    With `special` they begin with the tokenizer's own beginning of sequence.

    The text is tokenized in pieces: a tokenizer takes more than a kilobyte for each token of what it is given at once.
    Pieces overlap, and are joined where both go on alike, far from the end of the one and the beginning of the other.
    """
    before, behind = _added_tokens(tokenizer) if special else ([], [])
    ids, first = list(before), 0
    num_chars = PIECE_CHARS if count is None else min(PIECE_CHARS, CHARS_PER_TOKEN * (count + MARGIN_TOKENS))
    piece = _encode(text, tokenizer, 0, num_chars)
    while not piece.is_last and (count is None or len(ids) + len(piece.ids) - first < count + MARGIN_TOKENS):
        joint = None
        if len(piece.ids) - first > 4 * MARGIN_TOKENS:
            following = _encode(text, tokenizer, piece.starts[-3 * MARGIN_TOKENS], num_chars)
            joint = _joint(piece, following)
        if joint is None:
            num_chars *= 2
            piece = _encode(text, tokenizer, piece.start, num_chars)
        else:
            end, next_first = joint
            ids += piece.ids[first:end]
            piece, first = following, next_first
            text.forget(piece.start)
    if not piece.ids:
        return []
    ids += piece.ids[first:]
    return (ids + behind if piece.is_last else ids)[:count]


@dataclass(slots=True)
class _Piece:
    """Tokens of a part of the text, without those that a tokenizer adds, and where in the text each one begins."""

    start: int
    ids: list[int]
    starts: list[int]
    is_last: bool


def _encode(text: _Text, tokenizer: Tokenizer, start: int, num_chars: int) -> _Piece:
    string, is_last = text.read(start, num_chars)
    encoded = tokenizer(
        string, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
    )
    return _Piece(start, encoded["input_ids"], [start + first for first, _ in encoded["offset_mapping"]], is_last)


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


def _added_tokens(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Tokens that the tokenizer puts before, and behind, any text."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    ids, mask = encoded["input_ids"], encoded["special_tokens_mask"]
    num_before = mask.index(0) if 0 in mask else len(mask)
    num_behind = mask[::-1].index(0) if 0 in mask else 0
    return ids[:num_before], ids[len(ids) - num_behind :]


def read_workload(config: PromptConfig) -> Workload:
    """The task around the document; raises ConfigError where it belongs to a data set that cannot be read."""
    if config.dataset is None:
        return make_workload(config)
    item = read_item(config.dataset, config.path, config.item)
    return make_workload(config, item.question, item.answers)


def _with_facts(document: list[int], facts: list[tuple[float, list[int]]], tokenizer: Tokenizer) -> list[int]:
    """The document with each fact's tokens at its depth, or at the end of a line shortly before."""
    parts: list[int] = []
    end = len(document)
    for depth, ids in sorted(facts, key=lambda fact: fact[0], reverse=True):
        position = min(end, round(depth * len(document)))
        for near in range(position, max(0, position - LINE_TOKENS), -1):
            if "\n" in tokenizer.decode([document[near - 1]]):
                position = near
                break
        parts = [*ids, *document[position:end], *parts]
        end = position
    return document[:end] + parts


def _ids_of(tokenizer: Tokenizer, text: str, *, special: bool = False) -> list[int]:
    """Tokens of the text; with `special` they begin with the tokenizer's own beginning of sequence."""
    if not text:
        return []
    ids: list[int] = tokenizer(text, add_special_tokens=special, split_special_tokens=True, verbose=False)["input_ids"]
    return ids


class _Text:
    """A text that arrives in pieces, and is read only as far as asked for."""

    def __init__(self, pieces: Iterator[str]):
        self._pieces, self._held, self._start = pieces, "", 0

    def read(self, start: int, num_chars: int) -> tuple[str, bool]:
        """The `num_chars` characters from `start` on, and whether the text ends with them."""
        end, arrived = start - self._start + num_chars, []
        missing = end - len(self._held)
        while missing >= 0 and (piece := next(self._pieces, None)) is not None:
            arrived.append(piece)
            missing -= len(piece)
        self._held = "".join([self._held, *arrived])
        return self._held[start - self._start : end], len(self._held) <= end

    def forget(self, end: int) -> None:
        """Drops the text before `end`, which will not be asked for again."""
        self._held, self._start = self._held[end - self._start :], end


def _source(config: PromptConfig) -> str:
    if config.dataset is not None:
        return f"prompt.dataset={config.dataset}, prompt.item={config.item}"
    if config.path is not None:
        return f"prompt.path={config.path!r}"
    return f"prompt.text={config.text!r}" if config.text is not None else "the source of Python's standard library"


def _pieces(config: PromptConfig) -> Iterator[str]:
    if config.dataset is not None:
        return iter([read_item(config.dataset, config.path, config.item).text])
    if config.path is not None:
        if "\0" in config.path:
            raise _path_error(config.path, "which no file can be called")
        return _file_pieces(config.path)
    if config.text is not None:
        return iter([_checked_text(config.text)])
    return _standard_library_pieces()


def _checked_text(text: str) -> str:
    """The text itself; raises ConfigError where it is not UTF-8."""
    try:  # bytes of the command line that are not UTF-8 arrive as lone surrogates
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"prompt.text is {text!r}; it must be UTF-8, and its character {error.start} is not: "
            "put other encodings into UTF-8 first, or use prompt.path"
        ) from None
    return text


def _file_pieces(path: str) -> Iterator[str]:
    is_empty = True
    try:
        with open(path, "rb") as file:
            for piece in _decoded(file, path):
                is_empty = is_empty and not piece
                yield piece
    except FileNotFoundError:
        where = "" if os.path.isabs(path) else f" in {os.getcwd()}"
        raise _path_error(path, f"which does not exist{where}") from None
    except IsADirectoryError:
        raise _path_error(path, "a folder") from None
    except OSError as error:
        raise _path_error(path, f"which cannot be read ({error.strerror})") from None
    if is_empty:
        raise _path_error(path, "which is empty")


def _path_error(path: str, what: str) -> ConfigError:
    return ConfigError(f"prompt.path is {path!r}, {what}; it must be a UTF-8 text file, for example book.txt")


def _decoded(file: BinaryIO, path: str) -> Iterator[str]:
    """The file's text block by block, without a byte order mark; raises ConfigError where it is not UTF-8."""
    decoder, position = codecs.getincrementaldecoder("utf-8")(), 0
    while True:
        block = file.read(BLOCK_BYTES)
        num_pending = len(decoder.getstate()[0])
        try:
            piece = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            offset = position - num_pending + error.start
            raise _path_error(path, f"which is not UTF-8 at byte {offset} ({error.reason})") from None
        if not block:
            break
        yield piece.removeprefix("\ufeff") if position == 0 else piece
        position += len(block)


def _standard_library_pieces() -> Iterator[str]:
    """The .py files of the running Python's standard library, in sorted order of their relative paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    chosen = [path for path in paths if ONLY_PACKAGES.isdisjoint(path.split("/"))]
    if not chosen:
        raise ConfigError(f"prompt.path is not set, and {root} has no .py files to read instead; set prompt.path")
    for path in chosen:
        # A few files of its test suite are not UTF-8 on purpose.
        yield (root / path).read_text(encoding="utf-8", errors="ignore")
