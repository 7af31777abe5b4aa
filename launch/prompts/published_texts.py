"""Books of PG-19 (arXiv 1911.05507) and stories with questions of NarrativeQA (arXiv 1712.07040): the test split.

From a folder as the sets were first published (PG-19: test/*.txt; NarrativeQA: qaps.csv and tmp/ID.content), read by
the standard library alone; or, through the `datasets` package, from a folder as they are on the hub, or from the hub.
"""

from __future__ import annotations

import csv
import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from conf.schema import ConfigError, Dataset

HUB = {Dataset.pg19: "emozilla/pg19", Dataset.narrativeqa: "deepmind/narrativeqa"}
"""Copies on the hub without loading scripts, which `datasets` no longer runs."""
LAYOUT = {
    Dataset.pg19: "books as .txt files, in it or in its folder test",
    Dataset.narrativeqa: "qaps.csv and the stories as tmp/ID.content",
}
TEST = "test"


@dataclass(kw_only=True, frozen=True, slots=True)
class Item:
    """A text; one of NarrativeQA has a question about it, too, and texts that answer it."""

    text: str
    question: str | None = None
    answers: tuple[str, ...] = ()


def check_item(dataset: Dataset, path: str | None, index: int) -> None:
    """Checks of an item what needs no network; raises ConfigError."""
    if path is not None:
        read_item(dataset, path, index)
    else:
        _check_package(dataset)


@lru_cache(maxsize=2)
def read_item(dataset: Dataset, path: str | None, index: int) -> Item:
    """The item at this index of the test split, of a folder or, without a path, of the hub; raises ConfigError."""
    if path is None:
        return _from_package(dataset, HUB[dataset], index)
    folder = Path(path)
    if "\0" in path or not folder.is_dir():
        raise ConfigError(
            f"prompt.path is {path!r}; with prompt.dataset={dataset} it must be a folder: {LAYOUT[dataset]}"
        )
    if dataset is Dataset.pg19 and (books := _books(folder)):
        _check_index(dataset, index, len(books))
        return Item(text=_read(books[index]))
    if dataset is Dataset.narrativeqa and (folder / "qaps.csv").is_file():
        return _story(folder, index)
    return _from_package(dataset, path, index)


def _books(folder: Path) -> list[Path]:
    inner = folder / TEST
    return sorted((inner if inner.is_dir() else folder).glob("*.txt"))


def _story(folder: Path, index: int) -> Item:
    with (folder / "qaps.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("set") == TEST]
    _check_index(Dataset.narrativeqa, index, len(rows))
    row = rows[index]
    path = folder / "tmp" / f"{row['document_id']}.content"
    if not path.is_file():
        raise ConfigError(
            f"prompt.item is {index}, whose story {path} is missing; NarrativeQA's download_stories.sh fetches it"
        )
    return Item(text=_read(path), question=row["question"], answers=(row["answer1"], row["answer2"]))


def _read(path: Path) -> str:
    # Some of the stories were never UTF-8.
    return path.read_text(encoding="utf-8", errors="replace")


def _check_index(dataset: Dataset, index: int, count: int) -> None:
    if index >= count:
        raise ConfigError(
            f"prompt.item is {index}; it must be below {count}: prompt.dataset={dataset} has no more here"
        )


def _check_package(dataset: Dataset) -> None:
    if importlib.util.find_spec("datasets") is None:
        raise ConfigError(
            f"prompt.dataset is {dataset}, which needs the package datasets: pip install 'tierforce[data]', or "
            f"set prompt.path to a folder with {LAYOUT[dataset]}"
        )


def _from_package(dataset: Dataset, source: str, index: int) -> Item:
    """The item of a folder with parquet or JSON files, or of a hub id; only as much is fetched as is read."""
    _check_package(dataset)
    import datasets

    try:
        splits = datasets.load_dataset(source, streaming=True)
        split = splits[TEST] if TEST in splits else next(iter(splits.values()))
        rows: list[dict[str, Any]] = list(islice(split, index, index + 1))
    except Exception as error:  # whatever datasets makes of no network, or of a folder that is something else
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"prompt.dataset is {dataset}, which cannot be read from {source!r} ({type(error).__name__}: {reason}); "
            f"set prompt.path to a folder with {LAYOUT[dataset]}, or with the files that the hub has"
        ) from error
    if not rows:
        raise ConfigError(f"prompt.item is {index}; {source!r} has fewer items: it must be smaller")
    try:
        return _item(dataset, rows[0])
    except (KeyError, TypeError) as error:
        columns = ", ".join(rows[0])
        raise ConfigError(
            f"prompt.path is {source!r}, whose columns are {columns}; it must have those of {HUB[dataset]} on the hub"
        ) from error


def _item(dataset: Dataset, row: dict[str, Any]) -> Item:
    if dataset is Dataset.pg19:
        return Item(text=row["text"])
    answers = tuple(answer["text"] for answer in row["answers"])
    return Item(text=row["document"]["text"], question=row["question"]["text"], answers=answers)
