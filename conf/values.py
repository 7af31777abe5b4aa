"""Legal values of the configuration: words, limits, and the error that refuses others. Standard library only."""

import os
import re
from enum import StrEnum

AUTO = "auto"
"""Chosen by the program, from what it measures."""
NEVER, ADAPTIVE = "never", "adaptive"
"""Words of cache.retrieval.rebuild beside numbers of verifications."""
LOOKUP_DRAFTER, NO_DRAFTER = "lookup", "none"
"""Words of model.drafter beside names of models."""
STANDARD_INPUT = "-"
"""Word of prompt.path beside names of files."""
GREEDY_BELOW_TEMPERATURE = 1e-5
"""A temperature below it is greedy decoding."""

MAX_GAMMA1 = 64
MAX_GAMMA2 = 256
MAX_AUTO_GAMMA1, MAX_AUTO_GAMMA2 = 8, 64
"""The largest that auto chooses."""
MAX_STOP_STRINGS = 64
MAX_THREADS = 1024
MAX_TURNS = 20

ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", '"': '"', "'": "'"}
"""What a backslash and a letter stand for in a text that has escapes."""
ESCAPE = re.compile(r"\\((?:u[0-9a-fA-F]{4}\\)?u[0-9a-fA-F]{4}|.)", re.DOTALL)


class ConfigError(ValueError):
    """A configuration or input that the program refuses: the message names key, value and a legal value."""


class Mode(StrEnum):
    """Levels that take part in decoding."""

    triforce = "triforce"
    retrieval = "retrieval"
    streaming = "streaming"
    autoregressive = "autoregressive"


class Coupling(StrEnum):
    """Coupling of the tokens of a draft to those of the model that verifies it."""

    maximal = "maximal"
    gumbel = "gumbel"


class Overlap(StrEnum):
    """Drafting while the target verifies."""

    off = "off"
    ahead = "ahead"
    outcomes = "outcomes"


class CudaGraphs(StrEnum):
    """Recording and replay of the forward passes of the draft levels."""

    auto = "auto"
    on = "on"
    off = "off"


class Dtype(StrEnum):
    """Number format of weights and caches; `auto` is bfloat16 where the processor computes in it, else float32."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Dataset(StrEnum):
    """A published collection of long texts."""

    pg19 = "pg19"
    narrativeqa = "narrativeqa"


class PromptTask(StrEnum):
    """Task that is set about the document."""

    continuation = "continuation"
    summary = "summary"
    question = "question"
    needle = "needle"


class PromptTemplate(StrEnum):
    """Frame around a document and what is asked of it."""

    auto = "auto"
    none = "none"


class RetrievalRuleName(StrEnum):
    """Rules by which the chunks of the retrieval cache are chosen; see tiers.retrieval.rule, which finds the class."""

    attention = "attention"
    mean_key = "mean_key"


class ChunkDtype(StrEnum):
    """Number format of the chosen chunks of the retrieval cache; `auto` is as the model has them."""

    auto = "auto"
    int8 = "int8"
    int4 = "int4"

    @property
    def bits(self) -> int | None:
        """Bits of a value; None: as many as the model's have."""
        return {ChunkDtype.int8: 8, ChunkDtype.int4: 4}.get(self)


class FullCacheTier(StrEnum):
    """Tier in which the full cache lives."""

    auto = "auto"
    device = "device"
    host = "host"
    disk = "disk"


class PlacementKind(StrEnum):
    """Spread of the roles over processes."""

    auto = "auto"
    inline = "inline"
    colocated = "colocated"
    pipeline = "pipeline"


def require(condition: bool, key: str, value: object, rule: str) -> None:
    """Raises ConfigError "<key> is <value>; it must be <rule>" unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{key} is {value!r}; it must be {rule}")


def expand_home(config: object, prefix: str, *names: str) -> None:
    """Replaces ~ and ~user at the beginning of the paths that these fields of `config` have; null stays null.

    Raises ConfigError, with `prefix` before the field's name, where there is no such user.
    """
    for name in names:
        path = getattr(config, name)
        if isinstance(path, str) and path.startswith("~"):
            expanded = os.path.expanduser(path)
            user = path.partition("/")[0][1:]
            rule = f"~ or a user's, and there is no user {user!r}; what is itself called so is written ./{path}"
            require(not expanded.startswith("~"), f"{prefix}{name}", path, rule)
            setattr(config, name, expanded)


def parse_auto_count(key: str, value: str, words: tuple[str, ...], minimum: int = 0) -> int | str:
    """Reads one of `words`, or an integer >= minimum. Raises ConfigError."""
    if value in words:
        return value
    is_number = value.isascii() and value.isdigit() and int(value) >= minimum
    require(is_number, key, value, f"{', '.join(words)} or an integer >= {minimum}")
    return int(value)


def unescaped(key: str, text: str) -> str:
    r"""The text with its escapes read: \n, \t, \r, \\, \", \' and \uXXXX, as JSON has it; other backslashes stay.

    Raises ConfigError for a \uXXXX that is no character.
    """

    def meaning(match: re.Match[str]) -> str:
        escape = match.group(1)
        if len(escape) == 1:
            return ESCAPES.get(escape, match.group())
        try:  # two of them may be the halves of a character beyond the first 65,536
            return bytes.fromhex(escape.replace("\\", "").replace("u", "")).decode("utf-16-be")
        except UnicodeDecodeError:
            raise ConfigError(f"{key} has {match.group()!r}; it must be a character, as \\u00e9 is") from None

    return ESCAPE.sub(meaning, text)
