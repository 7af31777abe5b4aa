"""The prompt as token ids: of a file, of a text, or of the source of Python's standard library.

Text is read and tokenized only as far as tokens are wanted, so a prompt cut from a huge file costs what it needs.
Special tokens written in the text are plain text; the tokenizer's own beginning of sequence is added as it does.
"""

from __future__ import annotations

import codecs
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from conf.schema import ConfigError, PromptConfig

CHARS_PER_TOKEN = 8
# The end of a cut text may be tokenized differently than in the whole text; so far from the end it is not.
MARGIN_TOKENS = 256
BLOCK_BYTES = 1 << 18
ONLY_PACKAGES = {"site-packages", "dist-packages"}


def check_prompt(config: PromptConfig) -> None:
    """What can be said of it without a tokenizer; raises ConfigError. What comes out of a pipe comes only once."""
    is_pipe = config.path is not None and os.path.exists(config.path) and not os.path.isfile(config.path)
    if (config.path is not None or config.text is not None) and (not is_pipe or os.path.isdir(config.path)):
        next(_pieces(config), None)


def read_prompt(config: PromptConfig, tokenizer, at_most: int | None = None) -> list[int]:
    """The first `config.max_tokens` tokens of the prompt, never more than `at_most`; raises ConfigError.

    `tokenizer` is a fast tokenizer of transformers.
    """
    limits = [limit for limit in (config.max_tokens, at_most) if limit is not None]
    ids = encode_first(_Text(_pieces(config)), tokenizer, min(limits, default=None))
    if not ids:
        raise ConfigError(f"{_source(config)} has no tokens; it must have at least one")
    return ids


def read_text(config: PromptConfig, num_chars: int) -> str:
    """The prompt's first `num_chars` characters, before any limit of tokens; raises ConfigError."""
    return _Text(_pieces(config)).first(num_chars)[0]


def encode_first(text: _Text, tokenizer, count: int | None) -> list[int]:
    """The first `count` tokens of the text (all: None), as if the whole text had been tokenized and then cut."""
    num_chars = None if count is None else CHARS_PER_TOKEN * (count + MARGIN_TOKENS)
    while True:
        prefix, is_whole = text.first(num_chars)
        ids = tokenizer(prefix, split_special_tokens=True, verbose=False)["input_ids"] if prefix else []
        if is_whole or len(ids) >= count + MARGIN_TOKENS:
            return ids[:count]
        num_chars *= 2


class _Text:
    """Text that arrives in pieces and is read only as far as asked for."""

    def __init__(self, pieces: Iterator[str]):
        self._pieces, self._read, self._num_chars = pieces, [], 0

    def first(self, num_chars: int | None) -> tuple[str, bool]:
        """The first `num_chars` characters (all: None), and whether that is the whole text."""
        is_whole = False
        while num_chars is None or self._num_chars < num_chars:
            piece = next(self._pieces, None)
            if piece is None:
                is_whole = True
                break
            self._read.append(piece)
            self._num_chars += len(piece)
        self._read = ["".join(self._read)]
        return self._read[0][:num_chars], is_whole


def _source(config: PromptConfig) -> str:
    if config.path is not None:
        return f"prompt.path={config.path!r}"
    return f"prompt.text={config.text!r}" if config.text is not None else "the source of Python's standard library"


def _pieces(config: PromptConfig) -> Iterator[str]:
    if config.path is not None:
        if "\0" in config.path:
            raise _path_error(config.path, "which no file can be called")
        return _file_pieces(config.path)
    if config.text is not None:
        return iter([_checked_text(config.text)])
    return _standard_library_pieces()


def _checked_text(text: str) -> str:
    """Bytes of the command line that are not UTF-8 arrive as lone surrogates."""
    try:
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


def _decoded(file, path: str) -> Iterator[str]:
    """UTF-8 with or without a byte order mark, block by block."""
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
