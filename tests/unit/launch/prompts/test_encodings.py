"""Bytes that are no UTF-8 text are refused in one line that says what they are, and how they become it."""

from __future__ import annotations

import gzip
import io
import random
import zipfile

import pytest

from conf.schema import ConfigError, PromptConfig
from launch.prompts.document import check_document
from launch.prompts.encodings import NotUtf8Error, decoded

ENGLISH = "It was a dark and stormy night; it rained.\r\nThe cat sat.\n" * 20
RUSSIAN = "Все счастливые семьи похожи друг на друга.\n" * 20
CHINESE = "道可道，非常道。名可名，非常名。\n" * 20
FRENCH = "Longtemps, je me suis couché de bonne heure. Parfois, à peine ma bougie éteinte.\n" * 20
ENCODINGS = ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")


def text_of(content: bytes) -> str:
    return "".join(decoded(io.BytesIO(content)))


@pytest.mark.parametrize("text", [ENGLISH, RUSSIAN, CHINESE, FRENCH])
def test_utf8_is_read_with_and_without_its_mark(text):
    text = text.replace("\r\n", "\n")
    assert text_of(text.encode()) == text_of(text.encode("utf-8-sig")) == text


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("text", [ENGLISH, RUSSIAN, CHINESE, FRENCH, "Hi there\n"], ids=lambda text: text[:8].strip())
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["no mark", "mark"])
def test_utf16_and_utf32_are_refused_by_name(encoding, text, mark):
    name = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")
    with pytest.raises(NotUtf8Error, match=f"{name}.*iconv -f {name} -t UTF-8"):
        text_of((mark + text).encode(encoding))


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
def test_latin_1_is_refused_by_name_and_byte(encoding):
    with pytest.raises(NotUtf8Error, match=r"not UTF-8 at byte 27 .*CP1252"):
        text_of(FRENCH.encode(encoding))


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("word/document.xml", ENGLISH)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (random.Random(0).randbytes(5000), "which (is not UTF-8|has a NUL) at byte"),
        (b"a\0b", "NUL at byte 1: it is no text"),
        (ENGLISH.encode() + b"\0", f"NUL at byte {len(ENGLISH)}"),
        (b"\x7fELF\x02\x01\x01\0\0\0", "NUL at byte 7: it is no text"),
        (b"%PDF-1.7\n%\xe2\xe3", "a PDF: extract"),
        (zipped(), "a zip archive .*: extract"),
        (gzip.compress(ENGLISH.encode()), "a gzip archive: extract"),
    ],
    ids=["random", "nul", "nul at the end", "program", "pdf", "zip", "gzip"],
)
def test_binary_files_are_refused_in_one_line(tmp_path, content, words):
    with pytest.raises(NotUtf8Error, match=words):
        text_of(content)
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"^prompt.path is '{path}', .*it must be a UTF-8 text file") as caught:
        check_document(PromptConfig(path=str(path)))
    assert "\n" not in str(caught.value)
