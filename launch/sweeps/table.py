"""The table of a sweep: a row for each job, from its result.json; kept as one file a job, so that parallel jobs never
write the same file. The table is put together from those files at any time. Standard library; parquet by pyarrow."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Mapping
from enum import StrEnum
from importlib import util
from pathlib import Path
from typing import Any

from launch.command_line.tables import write_atomically, write_csv
from orchestrator.round import Phase
from orchestrator.run_files import RESULT
from orchestrator.session import FAILED, INTERRUPTED

SweepRow = dict[str, Any]
"""Columns of a job by their name: JOB_COLUMNS, settings by their key, METRICS; None for what there is not."""

JOBS, ROW, TABLE = "jobs", "row.json", "table"
"""Folder of the jobs' folders; file of a job's row in its folder; the table in the sweep's folder, without ending."""


class JobStatus(StrEnum):
    """Whether a job has a result."""

    done = "done"
    failed = "failed"
    refused = "refused"
    """It was not even started, or refused its configuration itself."""


JOB_COLUMNS = ("id", "status", "exit_code", "message", "log", "seconds", "host", "processes", "repetition")
"""Columns of a job that are known whatever it measures."""
LEVELS = ("retrieval", "drafter")
MEMORIES = ("device", "host", "disk", "process")
PHASES = tuple(Phase)
METRICS = (
    "tbt_ms",
    "tbt_ms_p50",
    "tbt_ms_p95",
    "tokens_per_s",
    "prefill_s",
    "ttft_s",
    "decode_s",
    "prompt_tokens",
    "new_tokens",
    "finish_reason",
    "verifications",
    "tokens_per_verification",
    "rebuilds",
    *(f"{level}_{what}" for level in LEVELS for what in ("acceptance", "proposed", "accepted_per_position")),
    *(f"{phase}_s" for phase in PHASES),
    "streamed_bytes",
    "stream_gb_per_s",
    "stall_s",
    *(f"{memory}_peak_bytes" for memory in MEMORIES),
    "torch",
    "tierforce",
)
"""Columns of what was measured. Settings go by their key, which has a group: a dot."""

TAKES_NO_PART = {
    "autoregressive": ("model.drafter", "decoding.gamma1", "decoding.gamma2", "decoding.overlap", "cache.retrieval.",
                       "cache.streaming.", "sampling.block_verification"),
    "streaming": ("cache.retrieval.",),
    "retrieval": ("model.drafter", "decoding.gamma1", "cache.streaming."),
}  # fmt: skip
"""Settings that decoding.mode makes void, by the beginning of their key: a baseline is the same whatever γ is."""


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a nested configuration by their dotted keys."""
    items: dict[str, Any] = {}
    for name, value in config.items():
        items |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return items


def is_setting(key: str) -> bool:
    """Whether a column is a setting of the run: the key of one has a group, and so a dot."""
    return "." in key or key == "processes"


def takes_part(key: str, mode: str) -> bool:
    """Whether a setting matters to a run of this decoding.mode."""
    return not key.startswith(TAKES_NO_PART.get(mode, ()))


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run, from its nested configuration; null where they take no part in it."""
    settings = flat(config)
    settings.pop("output", None)
    mode = settings.get("decoding.mode", "")
    return {key: value if takes_part(key, mode) else None for key, value in settings.items()}


def row_of_result(result: Mapping[str, Any]) -> SweepRow:
    """Settings and measurements of a finished run; null for what was not measured."""
    timing, speculation, streaming = result["timing"], result["speculation"], result["streaming"]
    row = settings_of(result["config"]) | dict.fromkeys(METRICS)
    row |= {name: result[name] for name in ("prompt_tokens", "finish_reason")}
    row |= {name: timing[name] for name in ("tokens_per_s", "prefill_s", "ttft_s", "decode_s")}
    row |= {name: speculation[name] for name in ("verifications", "tokens_per_verification", "rebuilds")}
    row["new_tokens"] = len(result["token_ids"])
    row["tbt_ms"] = timing["tbt_ms"]["mean"]
    row |= {f"tbt_ms_{name}": timing["tbt_ms"][name] for name in ("p50", "p95")}
    row |= {f"{phase}_s": timing["phases_s"].get(phase, 0.0) for phase in PHASES}
    for level in speculation["levels"]:
        name = level["name"]
        row[f"{name}_acceptance"] = level["acceptance_rate"]
        row[f"{name}_proposed"] = level["proposed"]
        row[f"{name}_accepted_per_position"] = level["accepted_per_position"]
    row |= {"streamed_bytes": streaming.get("bytes"), "stall_s": streaming.get("stall_s")}
    row["stream_gb_per_s"] = streaming.get("gb_per_s")
    row |= {f"{memory}_peak_bytes": result["memory"].get(memory, {}).get("peak_bytes") for memory in MEMORIES}
    return row | {name: result["versions"].get(name) for name in ("torch", "tierforce")}


def finished_result(folder: Path) -> dict[str, Any] | None:
    """The result of a run that came to its end; None where there is none. (It is written as a whole or not at all.)"""
    try:
        result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_whole = result.get("finish_reason") not in (None, INTERRUPTED, FAILED) and "left_out" not in result
    return result if is_whole else None


def write_row(folder: Path, row: SweepRow) -> None:
    """Leaves a job's row in its folder, atomically."""
    write_atomically(folder / ROW, json.dumps(row, indent=1))


def read_rows(folder: Path) -> list[SweepRow]:
    """All rows of a sweep's folder, in the order of their settings."""
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in (folder / JOBS).glob(f"*/{ROW}")]
    order = [*axes_of(rows), "id"]
    return sorted(rows, key=lambda row: [sort_key(row.get(key)) for key in order])


def axes_of(rows: Iterable[SweepRow]) -> list[str]:
    """The settings in which rows differ; not where one of them has no part in a run, as γ in a baseline."""
    values: dict[str, set[str]] = {}
    for row in rows:
        for key, value in row.items():
            if (is_setting(key) or key == "repetition") and value is not None:
                values.setdefault(key, set()).add(repr(value))
    return [key for key, different in values.items() if len(different) > 1]


def sort_key(value: Any) -> tuple[int, float, str]:
    """Orders the values of a setting: nothing, then numbers, then texts."""
    if value is None:
        return (0, 0.0, "")
    is_number = isinstance(value, int | float)
    return (1, float(value), "") if is_number else (2, 0.0, str(value))


def write_table(folder: Path, rows: list[SweepRow]) -> list[Path]:
    """Writes table.csv, and table.parquet where pyarrow is installed; returns their paths."""
    settings = dict.fromkeys(key for row in rows for key in row if is_setting(key) and key not in JOB_COLUMNS)
    columns = [*JOB_COLUMNS, *settings, *METRICS]
    rows = [{column: _cell(row.get(column)) for column in columns} for row in rows]
    paths = [folder / f"{TABLE}.csv"]
    write_csv(paths[0], columns, rows)
    if rows and util.find_spec("pyarrow") is not None:
        paths.append(folder / f"{TABLE}.parquet")
        _write_parquet(paths[1], rows)
    return paths


def _cell(value: Any) -> Any:
    """The value of a cell, which is one: a list becomes a JSON text."""
    return json.dumps(value) if isinstance(value, list | dict) else value


def _write_parquet(path: Path, rows: list[SweepRow]) -> None:
    """Writes a parquet file, atomically."""
    import pyarrow
    import pyarrow.parquet

    columns = {name: [row[name] for row in rows] for name in rows[0]}
    for name, values in columns.items():
        # A column has one type; integers beside numbers become numbers, anything else mixed becomes text.
        kinds = {type(value) for value in values if value is not None}
        if len(kinds) > 1:
            columns[name] = [_as(float if kinds == {int, float} else str, value) for value in values]
    partial = path.with_name(f".{path.name}")
    pyarrow.parquet.write_table(pyarrow.table(columns), partial)
    os.replace(partial, path)


def _as(kind: type, value: Any) -> Any:
    """A value as this type; None stays None."""
    return None if value is None else kind(value)


def read_table(path: Path) -> list[SweepRow]:
    """The rows of a table.csv or table.parquet. Raises ValueError for what is no table."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(path).to_pylist()
    else:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    return [{name: _value(cell) for name, cell in row.items()} for row in rows]


def _value(cell: Any) -> Any:
    """The value that a cell held before it became text."""
    if not isinstance(cell, str):
        return cell
    if cell in ("", "True", "False"):
        return {"": None, "True": True, "False": False}[cell]
    try:
        return json.loads(cell)
    except ValueError:
        return cell
