"""The files that a run leaves: rounds.jsonl, a line per round as it happens, and result.json at the end."""

from __future__ import annotations

import json
import os
import platform
import re
import tomllib
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from orchestrator.round import Round

ROUNDS, RESULT = "rounds.jsonl", "result.json"
PROJECT = Path(__file__).resolve().parents[1]
# Real newlines are JSON's own, never a string's: a list of numbers in the file, not something like it in the text.
NUMBER_LIST = re.compile(r"\[\n[\s\d.,eE+-]+\]")
DISTRIBUTIONS = {"torch": "torch", "transformers": "transformers", "hydra": "hydra-core"}


class Report:
    """The two files of one run. Opening it empties rounds.jsonl and removes an earlier result.json."""

    def __init__(self, folder: Path):
        self.result_path = folder / RESULT
        # A run that is killed must not leave the result of the run before it.
        self.result_path.unlink(missing_ok=True)
        self._rounds: TextIO = (folder / ROUNDS).open("w", encoding="utf-8")

    def add_round(self, round_: Round, seconds: float) -> None:
        """Writes the round out at once: whoever watches the file sees it, and a crash loses nothing."""
        record = asdict(round_) | {"phases_s": round_.seconds, "seconds": seconds}
        self._rounds.write(json.dumps(record, allow_nan=False) + "\n")
        self._rounds.flush()

    def write_result(self, result: dict[str, Any]) -> Path:
        """Atomically: result.json is there as a whole or not at all."""
        text = json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False)
        text = NUMBER_LIST.sub(
            lambda match: " ".join(match.group().split()).replace("[ ", "[").replace(" ]", "]"), text
        )
        partial = self.result_path.with_suffix(".partial")
        # A lone surrogate cannot be UTF-8; written as \udc80 it is still valid JSON.
        partial.write_bytes((text + "\n").encode("utf-8", "backslashreplace"))
        os.replace(partial, self.result_path)
        return self.result_path

    def close(self) -> None:
        self._rounds.close()


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
