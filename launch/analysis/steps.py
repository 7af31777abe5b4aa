"""The steps of launch/analyze.py: one document or text with facts after another, then tables, summary and figures."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from launch.analysis.config import AnalyzeConfig
from launch.analysis.observations import Observations
from launch.analysis.summary import show, summarise, write_summary, write_tables
from launch.command_line.outcome import shown_path


def analyze(config: AnalyzeConfig, console: Console) -> None:
    """Measures, and writes everything to the output; raises ConfigError."""
    observations = Observations(config)
    for note in observations.notes:
        console.print(note, highlight=False)
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    steps = [(name, partial(observations.measure_document, name)) for name in observations.prompts]
    steps += [
        (f"facts ({prompt.form})", partial(observations.measure_needle, prompt)) for prompt in observations.needles
    ]
    for number, (what, measure) in enumerate(steps, start=1):
        console.print(f"{number} of {len(steps)}: {what}", highlight=False)
        measure()
        write_tables(folder, observations.rows)  # what an interrupted run leaves
    summaries = summarise(config, observations.rows)
    show(console, summaries)
    write_summary(folder, settings_of(config), summaries)
    console.print(f"tables and summary.md in {shown_path(folder)}", highlight=False)
    if find_spec("matplotlib") is None:
        console.print("no figures: matplotlib is not installed (pip install -e '.[report]')", markup=False)
        return
    for path in import_module("launch.analysis.figures").draw_all(folder, config, observations.rows):
        console.print(shown_path(path), highlight=False)


def settings_of(config: AnalyzeConfig) -> str:
    """The settings in words, for above the tables."""
    documents, sampling = ", ".join(config.named_documents), config.sampling
    return (
        f"{config.model.target}: {documents}; {config.context:,} tokens, then {config.new_tokens}; temperature "
        f"{sampling.temperature:g}, top-p {sampling.top_p:g}, top-k {sampling.top_k}; chunks of {config.chunk_size}, "
        f"{config.newest_share:.0%} of the budget newest tokens, chosen anew every {config.rounds_of} tokens."
    )
