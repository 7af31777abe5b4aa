"""The files that a run leaves: rounds.jsonl, a line per round as it happens, and result.json at the end.

A disk that fills meanwhile costs rounds, not the result: the room for it is taken at the start.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import tomllib
from contextlib import suppress
from dataclasses import asdict
from importlib import metadata
from io import FileIO
from pathlib import Path
from typing import Any

from orchestrator.round import Round

ROUNDS, RESULT, RESERVE = "rounds.jsonl", "result.json", "result.partial"
ESSENTIAL = ("prompt_tokens", "token_ids", "text", "finish_reason", "failure", "seed")
"""Fields of a result that are written even where there is no room for the others."""
BYTES_PER_TOKEN = 32
"""Room for a token in result.json: its id, and its text, which has 4 bytes on average."""
MOST_RESERVED_TOKENS = 1 << 20
RESERVED_BYTES = 8192
"""Room for what a result has besides its tokens and the configuration."""
PROJECT = Path(__file__).resolve().parents[1]
# Real newlines are JSON's own, never a string's: a list of numbers in the file, not something like it in the text.
NUMBER_LIST = re.compile(r"\[\n[\s\d.,eE+-]+\]")
DISTRIBUTIONS = {"torch": "torch", "transformers": "transformers", "hydra": "hydra-core"}


class Report:
    """The two files of one run. `begin` empties rounds.jsonl and removes an earlier result.json."""

    def __init__(self, folder: Path, num_reserved_bytes: int = 0):
        """Takes that much room for the result; an earlier one stays until the run begins.

        Raises OSError where the folder cannot be written, or has not as much room.
        """
        self.result_path = folder / RESULT
        if self.result_path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(self.result_path))
        self._reserve_path = folder / RESERVE
        self._reserve: FileIO | None = reserved_file(self._reserve_path, num_reserved_bytes)
        try:
            self._rounds = FileIO(folder / ROUNDS, "a")
        except OSError:
            self._give_back()
            raise
        self._num_rounds_bytes = 0
        self.has_result = False
        """Whether this run's result.json is there."""
        self.incomplete: dict[str, str] = {}
        """Names of files that lack something, and why."""

    def begin(self) -> None:
        """Replaces an earlier run's files: a run that is killed must not leave the result of the run before it."""
        self._rounds.truncate(0)
        self.result_path.unlink(missing_ok=True)

    def add_round(self, round_: Round, seconds: float) -> None:
        """Writes the round out at once: whoever watches the file sees it, and a crash loses nothing.

        From the first one that cannot be written on the file stays as it is, and is `incomplete`.
        """
        if ROUNDS in self.incomplete:
            return
        record = asdict(round_) | {"phases_s": round_.seconds, "seconds": seconds}
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        try:
            write_whole(self._rounds, line)
        except OSError as error:
            self.incomplete[ROUNDS] = f"{error.strerror}: no rounds from {round_.index} on"
            with suppress(OSError):  # of the last line there may be a part
                self._rounds.truncate(self._num_rounds_bytes)
        else:
            self._num_rounds_bytes += len(line)

    def write_result(self, result: dict[str, Any]) -> Path:
        """Atomically: result.json is there as a whole or not at all.

        Where there is no room for all of it, it has its ESSENTIAL fields, and `left_out` says why. Raises OSError.
        """
        whole = encoded(result)
        try:
            self._write(whole)
        except OSError as error:
            self.incomplete[RESULT] = f"{error.strerror}: it has the tokens and the text alone"
            self._write(encoded(essentials(result, self.incomplete[RESULT])))
        self.has_result = True
        return self.result_path

    def _write(self, content: bytes) -> None:
        """Writes into the room that was taken for it, of which the file keeps what it needs."""
        if not self._reserve_path.exists():  # somebody has removed the folder
            self._reserve_path.parent.mkdir(parents=True, exist_ok=True)
            self._close_reserve()
        if self._reserve is None:
            self._reserve = reserved_file(self._reserve_path, 0)
        self._reserve.seek(0)
        write_whole(self._reserve, content)
        self._reserve.truncate(len(content))
        os.replace(self._reserve_path, self.result_path)
        self._close_reserve()

    def _close_reserve(self) -> None:
        if self._reserve is not None:
            self._reserve.close()
        self._reserve = None

    def _give_back(self) -> None:
        """What was reserved and not used."""
        if self._reserve is not None:
            self._reserve_path.unlink(missing_ok=True)
        self._close_reserve()

    def close(self) -> None:
        self._give_back()
        self._rounds.close()


def num_bytes_to_reserve(config: dict[str, Any], max_new_tokens: int) -> int:
    """Room for the result of a run with this configuration."""
    of_tokens = BYTES_PER_TOKEN * min(max_new_tokens, MOST_RESERVED_TOKENS)
    return RESERVED_BYTES + len(encoded(config)) + of_tokens


def reserved_file(path: Path, num_bytes: int) -> FileIO:
    """A file with room for so many bytes, which no other file can take. Raises OSError, and then there is none."""
    file = FileIO(path, "w")
    try:
        if num_bytes:
            try:
                os.posix_fallocate(file.fileno(), 0, num_bytes)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                    raise
                write_whole(file, bytes(num_bytes))  # a file system that cannot reserve
    except OSError:
        file.close()
        path.unlink(missing_ok=True)
        raise
    return file


def write_whole(file: FileIO, content: bytes) -> None:
    """All of it, at the file's position. Raises OSError."""
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]


def essentials(result: dict[str, Any], why: str) -> dict[str, Any]:
    """The ESSENTIAL fields of a result; `why` is the reason that there are no others."""
    return {name: result[name] for name in ESSENTIAL if name in result} | {"left_out": why}


def encoded(result: dict[str, Any]) -> bytes:
    """JSON for people, too: lists of numbers take one line. Raises ValueError for NaN and infinity."""
    text = json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False)
    text = NUMBER_LIST.sub(lambda match: " ".join(match.group().split()).replace("[ ", "[").replace(" ]", "]"), text)
    # A lone surrogate cannot be UTF-8; written as \udc80 it is still valid JSON.
    return (text + "\n").encode("utf-8", "backslashreplace")


def versions() -> dict[str, str | None]:
    """Versions of what decides the tokens; None for what is not installed."""
    known: dict[str, str | None] = {"python": platform.python_version()}
    known |= {name: installed_version(distribution) for name, distribution in DISTRIBUTIONS.items()}
    return known | {"tierforce": installed_version("tierforce") or project_version()}


def installed_version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def project_version() -> str | None:
    """The version of a clone that is run in place, from its pyproject.toml."""
    path = PROJECT / "pyproject.toml"
    return tomllib.loads(path.read_text(encoding="utf-8"))["project"]["version"] if path.exists() else None
