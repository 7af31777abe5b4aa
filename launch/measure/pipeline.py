"""Times a pipeline's parts: torchrun --nproc-per-node=N -m launch.measure.pipeline verification|overlap [key=value ...]

verification    a verification of γ2 + 1 tokens by as many verifier ranks as there are: placement=colocated with N of 1,
                2, ... or a pipeline; a row of a table for each start
overlap         what drafting during verifications brings, on an emulated link: runs with decoding.overlap off, ahead
                and outcomes, for links of several speeds, acceptances and couplings; with placement=pipeline (N of 4)
                in processes of their own, or inline (N of 1) in threads

Processes start once and make all runs. Ratios of runs beside each other mean something on a machine with nothing else
to do; each process computes with one thread. Keys: conf/schema.py. Exit codes: 0 measured; 2 a bad
configuration; 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, TypeAlias

from conf.schema import ConfigError, Coupling, Overlap, PlacementKind, RunConfig, require
from launch.assembly.session_run import make_seed
from launch.assembly.start_checks import check_start, world_size
from launch.command_line.cluster import read_place
from launch.command_line.outcome import ExitCode
from launch.command_line.overrides import read_config, start_timeout_s
from launch.command_line.program import program
from launch.command_line.tables import markdown_head, markdown_row
from launch.command_line.timing import Stopwatch
from launch.processes.guard import Guard
from orchestrator.metrics import Metrics
from orchestrator.placement import place
from orchestrator.round import Phase

if TYPE_CHECKING:
    from launch.assembly.engine import Engine
    from launch.assembly.task import Task

ALWAYS = ["generation.ignore_eos=true", "placement.threads=1", "prompt.max_tokens=8192", "generation.max_new_tokens=96"]
VERIFICATION = ["decoding.mode=retrieval", "cache.full.tier=device"]
OVERLAP = ["cache.full.tier=host", "decoding.gamma2=12"]
LINKS_GB_PER_S = (2.0, 0.5)
ACCEPTANCES = (["cache.retrieval.budget=1024"], ["cache.retrieval.budget=128", "sampling.temperature=1"])
"""Overrides of a retrieval cache that is nearly always right, and of one that is not."""
VERIFICATION_HEADS = ("placement", "verifier ranks", "a verification", "tokens per verification", "TBT")
OVERLAP_HEADS = (
    *("coupling", "link", "a verification / a step", "accepted", "off"),
    *("ahead: TBT, gain, hits", "outcomes: TBT, gain, hits"),
)

Build: TypeAlias = Callable[["Task"], "Engine"]
"""A function like launch.assembly.engine.build."""


@contextmanager
def builder(config: RunConfig) -> Iterator[Build]:
    """Builds runs one after another, in this process or in those of torchrun."""
    from launch.assembly.engine import build
    from launch.processes.company import Company
    from launch.processes.remote_engine import build_remote

    placement = place(config.placement, world_size())
    if placement.kind is PlacementKind.inline:
        yield build
        return
    company = Company(config, placement, lambda line: print(line, file=sys.stderr))
    company.start()
    try:
        yield partial(build_remote, company=company)
    finally:
        company.close()


def measured(build: Build, overrides: list[str]) -> Metrics:
    """Makes one run, to its end."""
    from launch.assembly.prepare import prepare
    from launch.assembly.task import Task
    from launch.prompts.prompt import read_prompt

    config = read_config([*ALWAYS, *overrides])
    prepared = prepare(config)
    prompt = read_prompt(config.prompt, prepared.tokenizer)
    metrics = Metrics(uses_drafter=config.uses_drafter, uses_retrieval=config.uses_retrieval)
    task = Task(
        config=config,
        prepared=prepared,
        prompt_ids=prompt,
        max_new_tokens=config.generation.max_new_tokens,
        seed=make_seed(config),
    )
    with closing(build(task)) as engine:
        hierarchy = engine.hierarchy
        advance = hierarchy.start
        while not hierarchy.session.is_finished:
            with Stopwatch() as watch:
                round_ = advance()
            metrics.add(round_, watch.seconds)
            advance = hierarchy.round
    return metrics


def verification(build: Build, overrides: list[str]) -> Iterator[str]:
    """The head of the table, then its rows."""
    placement = place(read_config(overrides).placement, world_size())
    yield markdown_head(VERIFICATION_HEADS)
    for _ in range(3):
        metrics = measured(build, [*VERIFICATION, *overrides])
        milliseconds = 1e3 * metrics.phase_seconds[Phase.verify] / metrics.verifications
        yield markdown_row(
            [
                placement.kind,
                str(placement.tensor_parallel),
                f"{milliseconds:.1f} ms",
                f"{metrics.tokens_per_verification:.2f}",
                f"{_tbt_ms(metrics):.1f} ms",
            ]
        )


def overlap(
    build: Build,
    overrides: list[str],
    links: Sequence[float] = LINKS_GB_PER_S,
    acceptances: Sequence[list[str]] = ACCEPTANCES,
) -> Iterator[str]:
    """The head of the table, then its rows, for each coupling, acceptance and speed of the link.

    A step drafts γ1 tokens and has them verified by the retrieval draft. Raises ConfigError.
    """
    config = read_config(overrides)
    require(
        config.uses_retrieval, "decoding.mode", str(config.decoding.mode), "triforce or retrieval, which draft in steps"
    )
    yield markdown_head(OVERLAP_HEADS)
    for coupling, acceptance, link in product(Coupling, acceptances, links):
        settings = [*OVERLAP, *acceptance, f"sampling.coupling={coupling}", f"tiers.link.gb_per_s={link}"]
        runs = {each: measured(build, [*settings, f"decoding.overlap={each}", *overrides]) for each in Overlap}
        yield markdown_row([coupling, f"{link:g} GB/s", *_overlap_cells(runs)])


def _overlap_cells(runs: dict[Overlap, Metrics]) -> list[str]:
    off = runs[Overlap.off]
    drafting = off.phase_seconds.get(Phase.draft, 0.0) + off.phase_seconds.get(Phase.retrieval, 0.0)
    num_steps = max(1, off.num_inner_steps)
    ratio = off.phase_seconds[Phase.verify] / off.verifications / (drafting / num_steps)
    cells = [f"{ratio:.0f}", f"{off.levels[-1].acceptance_rate:.2f}", f"{_tbt_ms(off):.1f} ms"]
    for each in (Overlap.ahead, Overlap.outcomes):
        metrics = runs[each]
        assert metrics.ahead is not None
        gain, hits = _tbt_ms(off) / _tbt_ms(metrics), metrics.ahead.to_plain()["hit_rate"]
        cells.append(f"{_tbt_ms(metrics):.1f} ms, {gain:.2f}x, {hits:.0%}")
    return cells


def _tbt_ms(metrics: Metrics) -> float:
    """Mean milliseconds between tokens."""
    assert metrics.tbt_mean_s is not None, "each run generates more than one token"
    return 1e3 * metrics.tbt_mean_s


Table: TypeAlias = Callable[[Build, list[str]], Iterator[str]]
TABLES: dict[str, Table] = {"verification": verification, "overlap": overlap}


def measure(argv: list[str], tables: Mapping[str, Table] = TABLES) -> None:
    """Prints the table that the first argument names, row by row. Raises ConfigError."""
    name, *overrides = argv or [""]
    if name not in tables:
        raise ConfigError(f"the first argument is {name!r}; it must be one of {', '.join(tables)}")
    config = read_config([*ALWAYS, *overrides])
    check_start(config)
    with builder(config) as build:
        for row in tables[name](build, overrides):
            print(row, flush=True)


@partial(program, prints_result=True)
def main(argv: list[str]) -> int:
    if read_place(os.environ).rank != 0:
        return Guard(start_timeout_s([])).run()
    if {"--help", "-h"} & set(argv):
        print(__doc__)
        return ExitCode.done
    measure(argv)
    return ExitCode.done


if __name__ == "__main__":
    sys.exit(main())
