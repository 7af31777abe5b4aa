"""Measures what TriForce rests on, for any model: python launch/analyze.py model=llama3.1-8b 'documents={book: FILE}'

The observations of the paper (arXiv 2404.11912, section 3): attention is sparse, what matters to one token goes on
mattering to the next ones, and a cache of a few thousand well-chosen tokens drafts what the target accepts. The target
goes on from each document by its own samples; then facts hidden at known depths of the first one are asked for.

Writes attention.csv, locality.csv, acceptance.csv, needle.csv, summary.md and figures to `output`. Exit codes: 0 done;
2 a bad configuration or input.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from conf.model_source import model_source
from conf.schema import ConfigError
from launch.analysis.config import AnalyzeConfig, said_of_document
from launch.analysis.report import show, summarise, write_summary, write_tables
from launch.assembly.start_checks import check_folder
from launch.command_line.outcome import ExitCode, refuse
from launch.command_line.overrides import compose_program
from launch.prompts.prompt import check_prompt
from tiers.errors import OutOfTierMemoryError


def check_start(config: AnalyzeConfig) -> None:
    """What can be said before torch is loaded; raises ConfigError."""
    check_folder("output", config.output, "outputs/analysis")
    model_source("model.target", config.model.target)
    for name, document in config.named_documents.items():
        with said_of_document(name):
            check_prompt(document)


def analyze(config: AnalyzeConfig, console: Console) -> None:
    """Measures, and writes everything to the output; raises ConfigError."""
    observations = import_module("launch.analysis.observations").Observations(config)  # and torch with it: seconds
    for note in observations.notes:
        console.print(note, highlight=False)
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    steps: list[tuple[str, Callable[[], None]]] = [
        (name, lambda name=name: observations.measure_document(name)) for name in observations.prompts
    ]
    steps += [
        (f"facts ({prompt.form})", lambda prompt=prompt: observations.measure_needle(prompt))
        for prompt in observations.needles
    ]
    for number, (what, measure) in enumerate(steps, start=1):
        console.print(f"{number} of {len(steps)}: {what}", highlight=False)
        measure()
        write_tables(folder, observations.rows)  # what an interrupted run leaves
    summaries = summarise(config, observations.rows)
    show(console, summaries)
    write_summary(folder, settings_of(config), summaries)
    console.print(f"tables and summary.md in {os.path.relpath(folder)}", highlight=False)
    if find_spec("matplotlib") is None:
        console.print("no figures: matplotlib is not installed (pip install -e '.[report]')", markup=False)
        return
    for path in import_module("launch.analysis.figures").draw_all(folder, config, observations.rows):
        console.print(os.path.relpath(path), highlight=False)


def settings_of(config: AnalyzeConfig) -> str:
    """What the figures are of, in words."""
    documents, sampling = ", ".join(config.named_documents), config.sampling
    return (
        f"{config.model.target}: {documents}; {config.context:,} tokens, then {config.new_tokens}; temperature "
        f"{sampling.temperature:g}, top-p {sampling.top_p:g}, top-k {sampling.top_k}; chunks of {config.chunk_size}, "
        f"{config.newest_share:.0%} of the budget newest tokens, chosen anew every {config.rounds_of} tokens."
    )


def main(argv: list[str] | None = None) -> int:
    """The program; `argv` without its name."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    overrides = sys.argv[1:] if argv is None else argv
    try:
        config = compose_program("analyze", overrides, "launch/analysis/config.py, conf/schema.py")
        check_start(config)
        analyze(config, Console())
    except ConfigError as error:
        return refuse(error)
    except OutOfTierMemoryError as error:
        return refuse(ConfigError(f"{error}. A smaller context (it is {config.context}) or fewer budgets need less"))
    return ExitCode.done


if __name__ == "__main__":
    sys.exit(main())
