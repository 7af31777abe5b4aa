"""The measuring of launch/bench.py: contenders take turns, cell by cell of the grid; what fails is recorded."""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from conf.schema import ConfigError, DecodingConfig, FullCacheTier, RunConfig, to_plain
from launch.assembly.prepare import prepare
from launch.assembly.session_run import check_ids, make_seed
from launch.benchmark.config import BenchConfig, most_per_round
from launch.benchmark.contender import Cell, Contender, NotHereError
from launch.benchmark.our_engine import OurEngine
from launch.benchmark.peers import PEERS
from launch.benchmark.shared_models import SharedModels
from launch.benchmark.table import ContenderRow, Status, compare, make_table, write_grid_csv
from launch.command_line.machine import describe_machine
from launch.command_line.tables import write_json
from launch.command_line.timing import Stopwatch, utc_now
from launch.prompts.prompt import read_prompt
from orchestrator.run_files import installed_version, versions
from tiers.planning.memory import device_free_bytes, release_unused

JSON_FILE, CSV_FILE, FAILURES = "bench.json", "bench.csv", "failures.log"
"""Files of a bench in its folder."""
OTHER_PACKAGES = {"llama_cpp_python": "llama-cpp-python", "gguf": "gguf", "accelerate": "accelerate"}
"""Distributions whose versions are recorded beside those of a run, by the name they have in the record."""
OFFLOADED_PEER = "transformers_offloaded"
KEPT_FREE = 0.1
"""Share of the free memory that contenders leave alone."""


@dataclass(kw_only=True)
class Entry:
    """A contender and what it showed."""

    row: ContenderRow
    contender: Contender
    num_bytes: int = 0
    """Memory that it will take, about."""

    @property
    def runs(self) -> bool:
        """Whether it has been neither skipped nor failed so far."""
        return self.row.status is Status.ok


@dataclass(kw_only=True)
class SideBySide:
    """All cells of the grid, one after the other. Raises ConfigError when it is made, before anything is measured."""

    config: BenchConfig
    folder: Path
    console: Console
    argv: list[str]
    """The command line, for the record."""
    make_ours: Callable[[Cell, RunConfig], Contender] = OurEngine
    """A contender of a mode of ours; tests give another."""
    free_bytes: Callable[[torch.device], int] = device_free_bytes
    """Memory that contenders of a cell may take."""
    cells: list[dict[str, Any]] = field(default_factory=list)
    """Cells as bench.json has them, with what was measured so far."""
    num_failed: int = 0

    def __post_init__(self) -> None:
        self._seed = make_seed(self.config)
        base = replace(self.config.run_config, decoding=DecodingConfig(), output=str(self.folder))
        prepared = prepare(base)
        # Found once: `auto` looks for idle cores, and would look again for each contender.
        self._base = replace(base, placement=replace(base.placement, threads=str(prepared.num_threads)))
        self._trained_positions = prepared.max_positions
        packages = {name: installed_version(distribution) for name, distribution in OTHER_PACKAGES.items()}
        self._record = {
            "program": "bench",
            "argv": self.argv,
            "started": utc_now(),
            "seed": self._seed,
            "versions": versions() | packages,
            "machine": describe_machine(prepared.device),
            "environment": {name: value for name, value in os.environ.items() if name.startswith(("OMP_", "MKL_"))},
            "config": to_plain(self.config),
            "cells": self.cells,
        }
        self.console.print(", ".join(prepared.notes), highlight=False)

    def run(self) -> int:
        """Measures every cell; returns how many contenders and cells failed."""
        for place in self.config.grid.cells():
            try:
                self._cell(*place)
            finally:
                self._write()
        self.console.print(f"written: {self.folder / JSON_FILE}, {CSV_FILE}", highlight=False)
        return self.num_failed

    def _write(self) -> None:
        """Writes all that was measured so far."""
        write_json(self.folder / JSON_FILE, self._record)
        write_grid_csv(self.folder / CSV_FILE, self.cells)

    # ---- One cell. ----

    def _cell(self, context: int, tier: FullCacheTier, link: float | None) -> None:
        """Measures one cell, and shows and records it, whatever happens."""
        cache = replace(self._base.cache, full=replace(self._base.cache.full, tier=tier))
        link_config = replace(self._base.tiers.link, gb_per_s=link or self._base.tiers.link.gb_per_s)
        config = replace(self._base, cache=cache, tiers=replace(self._base.tiers, link=link_config))
        record: dict[str, Any] = {"context": context, "prompt_tokens": None, "tier": str(tier)}
        record |= {"link_gb_per_s": link_config.gb_per_s, "positions": None, "rows": [], "reason": None}
        self.cells.append(record)
        title = f"{context:,} tokens, {tier}"
        if link_config.gb_per_s is not None:
            title += f", emulated link of {link_config.gb_per_s:g} GB/s"
        entries: list[Entry] = []
        try:
            cell = self._make_cell(context, config)
        except Exception as error:  # a context that this prompt or model cannot have; the others go on
            record["reason"] = self._failure(title, error)
            self.console.print(f"{title}: {record['reason']}", highlight=False)
            return
        record |= {"prompt_tokens": len(cell.prompt), "positions": cell.prepared.max_positions}
        shared = SharedModels(cell, self.config.peer, self.folder)
        try:
            entries = self._entries(cell, shared, tier)
            for group in self._groups(entries, cell):
                self._measure(group)
        finally:
            shared.close()
            compare([entry.row for entry in entries], is_greedy=config.sampling.is_greedy)
            record["rows"] = [entry.row.to_plain() for entry in entries]
            if entries:
                self.console.print(make_table(title, [entry.row for entry in entries]), highlight=False)

    def _make_cell(self, context: int, config: RunConfig) -> Cell:
        """The task of a cell of the grid. Raises ConfigError for a context that prompt or model cannot have."""
        # The last turn may end late, too.
        most_late = max(map(most_per_round, self.config.runs_of_ours(config).values()), default=0)
        num_new = 1 + (1 + self.config.repetitions) * config.generation.max_new_tokens + most_late
        if context <= num_new:
            raise ConfigError(f"grid.contexts has {context}; it must be above the {num_new} tokens that are generated")
        if context > self._trained_positions and config.model.max_positions is None:
            positions = self._trained_positions
            while positions < context:
                positions *= 2
            config = replace(config, model=replace(config.model, max_positions=positions))
        prepared = prepare(config)
        if context > prepared.max_positions:
            raise ConfigError(f"grid.contexts has {context}; model.max_positions is {prepared.max_positions}")
        prompt_config = replace(config.prompt, max_tokens=context - num_new)
        prompt = read_prompt(prompt_config, prepared.tokenizer)
        check_ids(prompt, prepared.vocab_size, prepared.tokenizer)
        if len(prompt) < context - num_new:
            raise ConfigError(
                f"the prompt has {len(prompt)} tokens; of {context} in all it must be {context - num_new}"
            )
        return Cell(config=config, prepared=prepared, prompt=prompt, num_new_tokens=num_new, seed=self._seed)

    def _entries(self, cell: Cell, shared: SharedModels, tier: FullCacheTier) -> list[Entry]:
        """Our contenders, and the peers whose cache belongs in this tier."""
        entries = []
        for name, config in self.config.runs_of_ours(cell.config).items():
            row = ContenderRow(name=name, settings=self.config.contenders[name])
            entries.append(Entry(row=row, contender=self.make_ours(cell, config)))
        keeps_on_device = tier in (FullCacheTier.device, FullCacheTier.auto)
        for name in self.config.peers:
            fits_tier = tier is FullCacheTier.host if name == OFFLOADED_PEER else keeps_on_device
            if self.config.runs(name) and fits_tier:
                row = ContenderRow(name=name, settings="peer")
                entries.append(Entry(row=row, contender=PEERS[name](shared)))
        return entries

    def _groups(self, entries: list[Entry], cell: Cell) -> Iterator[list[Entry]]:
        """Contenders that fit into memory together, in order; what does not fit alone is skipped."""
        free = int((1 - KEPT_FREE) * self.free_bytes(cell.prepared.device))
        group: list[Entry] = []
        for entry in entries:
            with self._guarded(entry):
                entry.num_bytes = entry.contender.needed_bytes()
                if entry.num_bytes > free:
                    need, have = entry.num_bytes / 2**30, free / 2**30
                    raise NotHereError(f"needs about {need:.1f} GiB; {have:.1f} GiB are free")
            if not entry.runs:
                continue
            if sum(other.num_bytes for other in group) + entry.num_bytes > free:
                self.console.print("(not all fit into memory together: they run in groups)", style="dim")
                yield group
                group = []
            group.append(entry)
        if group:
            yield group

    def _measure(self, group: list[Entry]) -> None:
        """All turns of a group; then its memory is free again."""
        count = self.config.generation.max_new_tokens
        try:
            for entry in group:
                with self._guarded(entry):
                    self._start(entry)
            for repetition in range(1 + self.config.repetitions):
                # Another one goes first each time: who follows whom is no advantage to anybody.
                shift = repetition % len(group)
                for entry in group[shift:] + group[:shift]:
                    if entry.runs:
                        with self._guarded(entry):
                            self._take_turn(entry, count, is_warm_up=repetition == 0)
            for entry in group:
                if entry.runs:
                    with self._guarded(entry):
                        entry.row.facts = entry.contender.facts()
        finally:
            for entry in group:
                entry.contender.close()
            gc.collect()
            release_unused()

    def _start(self, entry: Entry) -> None:
        """Loads a contender and has it read the prompt."""
        entry.contender.load()
        with Stopwatch() as watch:
            entry.row.token_ids += entry.contender.start()
        entry.row.ttft_s = watch.seconds
        self.console.print(f"  {entry.row.name} has read the prompt: {entry.row.ttft_s:.1f} s", style="dim")

    def _take_turn(self, entry: Entry, count: int, *, is_warm_up: bool) -> None:
        """One turn of a contender, whose time counts unless it is the warm-up."""
        turn = entry.contender.decode(count)
        entry.row.token_ids += turn.tokens
        if is_warm_up:
            entry.contender.begin_counting()
        else:
            entry.row.samples_ms.append(1000 * turn.seconds / turn.num_timed)

    # ---- Failures. ----

    @contextmanager
    def _guarded(self, entry: Entry) -> Iterator[None]:
        """A contender that fails is recorded, and the others go on."""
        try:
            yield
        except NotHereError as reason:
            entry.row.status, entry.row.reason = Status.skipped, str(reason)
            self.console.print(f"  {entry.row.name} skipped: {reason}", style="dim", highlight=False)
        except Exception as error:
            entry.row.status, entry.row.reason = Status.failed, self._failure(entry.row.name, error)
            entry.contender.close()
            self.console.print(f"  {entry.row.name} failed: {entry.row.reason}", style="red", highlight=False)

    def _failure(self, who: str, error: Exception) -> str:
        """The reason in one line; counts the failure, and writes its traceback to a file."""
        self.num_failed += 1
        with (self.folder / FAILURES).open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"==== {who}\n{''.join(traceback.format_exception(error))}\n")
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
