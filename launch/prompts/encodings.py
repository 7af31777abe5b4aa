"""Bytes of a file as text: UTF-8 with universal newlines; what else they are is said by name.

A file that is no UTF-8 text is refused: decoded by another encoding, or with its NULs, it would be tokens of something
that nobody wrote.
"""

from __future__ import annotations

import codecs
import unicodedata
from collections.abc import Iterator
from io import IncrementalNewlineDecoder
from typing import BinaryIO

BLOCK_BYTES = 1 << 18
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32LE",
    codecs.BOM_UTF32_BE: "UTF-32BE",
    codecs.BOM_UTF16_LE: "UTF-16LE",
    codecs.BOM_UTF16_BE: "UTF-16BE",
}
"""Encodings by what a file in them may begin with; the longer marks come first, for one begins as the other."""
CONTAINERS = {b"%PDF-": "a PDF", b"PK\x03\x04": "a zip archive (docx, epub, odt)", b"\x1f\x8b": "a gzip archive"}
"""Kinds of files that hold text, but are none, by what they begin with."""
GUESSED = ("CP1252", "UTF-32LE", "UTF-32BE", "UTF-16LE", "UTF-16BE")
"""Encodings that are tried on what is not UTF-8; of those that fit equally well the first counts."""
TEXT_SHARE = 0.9
USUAL_CATEGORIES = "LMNPZ"
"""Decoded bytes look like text if so many are letters, marks, numbers, punctuation or spaces, as Unicode has them."""


class NotUtf8Error(ValueError):
    """A file that is no UTF-8 text: the message says what it is, as a clause that begins with "which"."""


def decoded(file: BinaryIO) -> Iterator[str]:
    """The text block by block, without a byte order mark, each kind of line end as one newline.

    Raises NotUtf8Error where the file is something else.
    """
    decoder, newlines = codecs.getincrementaldecoder("utf-8")(), IncrementalNewlineDecoder(None, translate=True)
    position, is_last = 0, False
    while not is_last:
        block = file.read(BLOCK_BYTES)
        is_last = not block
        pending = decoder.getstate()[0]
        if position == 0:
            _refuse_by_first_bytes(block)
        try:
            piece = decoder.decode(block, final=is_last)
        except UnicodeDecodeError as error:
            at = position - len(pending) + error.start
            raise NotUtf8Error(f"which is not UTF-8 at byte {at} ({error.reason}){_guess(pending + block)}") from None
        if "\0" in piece:
            at = position - len(pending) + (pending + block).index(0)
            raise NotUtf8Error(f"which has a NUL at byte {at}{_guess(pending + block) or ': it is no text'}")
        yield newlines.decode(piece.removeprefix("\ufeff") if position == 0 else piece, final=is_last)
        position += len(block)


def _refuse_by_first_bytes(block: bytes) -> None:
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if block.startswith(mark):
            raise NotUtf8Error(f"which is {encoding}, as its first bytes say{_way_out(encoding)}")
    for start, kind in CONTAINERS.items():
        if block.startswith(start):
            raise NotUtf8Error(f"which is {kind}: extract the text first")


def _guess(block: bytes) -> str:
    """What the bytes seem to be, with the way to UTF-8; empty if they are text in no known encoding."""
    seeming = {}
    for encoding in GUESSED:
        try:
            text = block[: len(block) // 4 * 4 or len(block)].decode(encoding)
        except UnicodeDecodeError:
            continue
        if sum(map(_is_usual, text)) > TEXT_SHARE * len(text):
            # Bytes of one encoding are often letters of another, but hardly ever its spaces.
            seeming[encoding] = text.count(" ") + text.count("\n")
    if not any(seeming.values()):
        return ""
    encoding = max(seeming, key=lambda name: seeming[name])
    return f": it seems to be {encoding}{_way_out(encoding)}"


def _is_usual(character: str) -> bool:
    return character.isspace() or unicodedata.category(character)[0] in USUAL_CATEGORIES


def _way_out(encoding: str) -> str:
    return f" (iconv -f {encoding} -t UTF-8 makes UTF-8 of it)"
