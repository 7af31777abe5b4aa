"""The text that a prompt is cut from: of a file, a text, an item of a data set, or Python's standard library.

It is read only as far as it is asked for.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from conf.schema import STANDARD_INPUT, ConfigError, PromptConfig
from launch.prompts.encodings import NotUtf8Error, decoded
from launch.prompts.published_texts import check_item, read_item

ONLY_PACKAGES = {"site-packages", "dist-packages"}


class Text:
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

    def put_before(self, text: str) -> None:
        """Has the text begin with another one; before anything was forgotten."""
        assert self._start == 0, f"{self._start} characters were forgotten"
        self._held = text + self._held

    def forget(self, end: int) -> None:
        """Drops the text before `end`, which will not be asked for again."""
        self._held, self._start = self._held[end - self._start :], end


def check_document(config: PromptConfig) -> None:
    """Checks of a document what needs no tokenizer; raises ConfigError. A pipe is not read: its text comes once."""
    if config.dataset is not None:
        check_item(config.dataset, config.path, config.item)
    elif config.path == STANDARD_INPUT:
        _check_standard_input()
    elif not is_built_in(config) and can_be_read_again(config):
        next(text_pieces(config), None)


def _check_standard_input() -> None:
    """Raises ConfigError for a terminal: books are not typed at one. A closed standard input is one without a text."""
    if os.isatty(0):
        raise ConfigError(
            "prompt.path is '-', standard input, which is the terminal; it must be a file or a pipe: < book.txt"
        )


def is_built_in(config: PromptConfig) -> bool:
    """Whether the document is the one that is there when none is named: Python's standard library."""
    return config.dataset is None and config.path is None and config.text is None


def can_be_read_again(config: PromptConfig) -> bool:
    """Whether reading the document leaves it as it was; a pipe's text comes only once."""
    path = config.path
    if path == STANDARD_INPUT:
        return False
    return path is None or not os.path.exists(path) or os.path.isfile(path) or os.path.isdir(path)


def source_of(config: PromptConfig) -> str:
    """What the document is, in words for a message."""
    if config.dataset is not None:
        return f"prompt.dataset={config.dataset}, prompt.item={config.item}"
    if config.path is not None:
        return f"prompt.path={config.path!r}"
    return f"prompt.text={config.text!r}" if config.text is not None else "the source of Python's standard library"


def read_text(config: PromptConfig, num_chars: int) -> str:
    """The document's first `num_chars` characters, before any limit of tokens; raises ConfigError."""
    return Text(text_pieces(config)).read(0, num_chars)[0]


def text_pieces(config: PromptConfig) -> Iterator[str]:
    """The document piece by piece; raises ConfigError where it is no text."""
    if config.dataset is not None:
        text = read_item(config.dataset, config.path, config.item).text
        return iter([text.replace("\r\n", "\n").replace("\r", "\n")])
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
        with open(0, "rb", closefd=False) if path == STANDARD_INPUT else open(path, "rb") as file:
            for piece in decoded(file):
                is_empty = is_empty and not piece
                yield piece
    except NotUtf8Error as error:
        raise _path_error(path, str(error)) from None
    except FileNotFoundError:
        where = "" if os.path.isabs(path) else f" in {os.getcwd()}"
        raise _path_error(path, f"which does not exist{where}") from None
    except IsADirectoryError:
        raise _path_error(path, "a folder") from None
    except OSError as error:
        raise _path_error(path, f"which cannot be read ({error.strerror})") from None
    if is_empty:
        nothing = "standard input, which has nothing, or nothing more, to read"
        raise _path_error(path, nothing if path == STANDARD_INPUT else "which is empty")


def _path_error(path: str, what: str) -> ConfigError:
    return ConfigError(f"prompt.path is {path!r}, {what}; it must be a UTF-8 text file, for example book.txt")


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
