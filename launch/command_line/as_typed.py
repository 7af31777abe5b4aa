r"""Texts of the command line, taken as they were typed, for keys that are texts.

Hydra's grammar of values reads 2024.10 as a number, a comma as a list, and has no place for ~ or an unclosed
parenthesis. What a key that is a text is given is therefore put into quotes before Hydra sees it, once, for our own
check and for Hydra's composition alike. Left as they are:

    null            no text
    "..." '...'     a value that is wholly in quotes: they are Hydra's, and are not part of the text
    ${key}          a reference, within quotes too; \${ is a literal ${

The same holds for the texts in a list, [a, b], and in a dictionary, {key: a}; there, and between the values of a sweep,
what has a comma, a bracket without its other or a quote at its beginning needs quotes of its own.
"""

from __future__ import annotations

import os
import re
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import conf

GROUPS_OF_CONF = frozenset(path.parent.name for path in Path(conf.__file__).parent.glob("*/*.yaml"))
"""Keys whose value is the name of a file."""
NULL = "null"
FOLDERS_OF_HYDRA = ("hydra.run.dir", "hydra.sweep.dir")
"""Keys of Hydra's own that are paths."""
WORD = re.compile(r"[A-Za-z_][\w./-]*")
WORDS_OF_HYDRA = (NULL, "true", "false", "nan", "inf", "on", "off", "yes", "no")
IN_QUOTES = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
CHOICE = re.compile(r"choice\((.*)\)", re.DOTALL)
OTHER_SWEEP = re.compile(r"(?:range|interval|glob|shuffle|sort|tag)\(.*\)", re.DOTALL)
CLOSING = {"[": "]", "{": "}", "(": ")"}


def as_typed(override: str, schema: type, *, is_sweep: bool = False) -> str:
    """The override in Hydra's grammar, the texts in its value as they were typed; any other is returned as it is.

    With `is_sweep` commas outside of quotes, and choice(...), separate several values.
    """
    key, equals, value = override.partition("=")
    name = key.lstrip("+")
    texts = _texts_of(name, schema)
    if not equals or texts is None or (is_sweep and OTHER_SWEEP.fullmatch(value)):
        return override
    if is_sweep and (choice := CHOICE.fullmatch(value)):
        value = choice[1]  # the same as its values with commas alone, which Hydra leaves in their quotes
    if is_sweep and "," in value:
        items = _items(value)
        if items is None or len(items) > 1:
            return override if items is None else f"{key}={_elements(items, texts)}"
    return f"{key}={_literal(os.path.expanduser(value) if name in FOLDERS_OF_HYDRA else value, texts)}"


def quoted(text: str) -> str:
    """A text in Hydra's grammar: as it is where that is plain, else in quotes. References in it stay references."""
    if WORD.fullmatch(text) and text.lower() not in WORDS_OF_HYDRA:
        return text
    # A backslash is itself unless it stands before a quote.
    return "'" + re.sub(r"(\\*)('|\Z)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), text) + "'"


def is_in_quotes(value: str) -> bool:
    """Whether the value is one text in quotes, from beginning to end."""
    return IN_QUOTES.fullmatch(value) is not None


@dataclass(frozen=True)
class _Texts:
    """The texts that a key's values are, or have in them.

    `inner(name)` is that of a dictionary's key; None: what is there is no text.
    """

    is_text: bool = False
    is_list: bool = False
    inner: Callable[[str], _Texts | None] | None = None


TEXT, LIST = _Texts(is_text=True), _Texts(is_list=True)
NAMED = _Texts(inner=lambda name: TEXT)


def _texts_of(key: str, schema: type) -> _Texts | None:
    """The texts of a key; None where it has none, or is none of the schema."""
    if key in FOLDERS_OF_HYDRA or key in GROUPS_OF_CONF:
        return TEXT
    found: _Texts | None = _of_hint(schema)
    for name in key.split("."):
        found = found.inner(name) if found is not None and found.inner is not None else None
    return found


def _of_hint(hint: Any) -> _Texts | None:
    """The texts of a value of this type."""
    if is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        names = {item.name for item in fields(hint)}
        return _Texts(inner=lambda name: _of_hint(hints[name]) if name in names else None)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kinds = set(typing.get_args(hint)) - {type(None)}
        return _of_hint(kinds.pop()) if len(kinds) == 1 else None
    if hint is str:
        return TEXT
    if hint == list[str]:
        return LIST
    # Of a schema's values those of any type are texts by name, such as documents={book: book.txt}.
    return NAMED if hint is Any or hint == dict[str, str] else None


def _literal(value: str, texts: _Texts) -> str:
    """A value in Hydra's grammar; what is written otherwise than its type asks is left as it is, to be refused."""
    if value == NULL:
        return value
    if texts.is_text:
        return value if is_in_quotes(value) else quoted(value)
    opening, closing = ("[", "]") if texts.is_list else ("{", "}")
    items = _items(value[1:-1]) if len(value) > 1 and value[0] == opening and value[-1] == closing else None
    if items is None or items == [""]:
        return value
    if texts.is_list:
        return f"[{_elements(items, TEXT)}]"
    return f"{{{','.join(_named(item.strip(), texts) for item in items)}}}"


def _elements(items: list[str], texts: _Texts) -> str:
    """Values between commas. What may be meant as a list in the list, or as the beginning of quotes, is left alone."""
    literals = []
    for item in map(str.strip, items):
        is_unclear = texts.is_text and ("," in item or item[:1] in ("'", '"')) and not is_in_quotes(item)
        literals.append(item if is_unclear or not item else _literal(item, texts))
    return ",".join(literals)


def _named(item: str, texts: _Texts) -> str:
    """A `name: value` of a dictionary."""
    name, colon, value = item.partition(":")
    inner = texts.inner(name.strip()) if texts.inner is not None else None
    return f"{name}:{_elements([value], inner)}" if colon and inner is not None else item


def _items(text: str) -> list[str] | None:
    """The parts between the commas that are in no quotes and no brackets; None where a bracket has no other."""
    items, start = [], 0
    expected: list[str] = []
    for position, character in _outside_quotes(text):
        if character in CLOSING:
            expected.append(CLOSING[character])
        elif character in CLOSING.values():
            if not expected or expected.pop() != character:
                return None
        elif character == "," and not expected:
            items.append(text[start:position])
            start = position + 1
    return None if expected else [*items, text[start:]]


def _outside_quotes(text: str) -> Iterator[tuple[int, str]]:
    """Position and character of what is in no quotes. Quotes begin where a value may begin; elsewhere they are text."""
    position, may_begin = 0, True
    while position < len(text):
        match = IN_QUOTES.match(text, position) if may_begin else None
        if match is not None:
            position, may_begin = match.end(), False
            continue
        character = text[position]
        yield position, character
        may_begin = character in "[{(,:" or (may_begin and character.isspace())
        position += 1
