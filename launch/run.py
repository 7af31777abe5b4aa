"""Generates from a long document: torchrun launch/run.py key=value ... (keys: conf/schema.py, groups: conf/).

Exit codes: 0 done; 1 failed at run time, with one line naming role, rank and phase; 2 bad configuration or input, with
one message; 130 interrupted. torch is imported only after the configuration was found good.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from conf.schema import ConfigError, PlacementConfig, PlacementKind, RunConfig, to_plain
from launch.assembly.session_run import fit_to_model, make_metrics, make_seed, take_round
from launch.assembly.start_checks import check_start, world_size
from launch.command_line.interruption import Interruption
from launch.command_line.outcome import ExitCode, fail, refuse
from launch.command_line.overrides import CONFIG_FOLDER, read_config
from launch.command_line.program import program
from launch.processes.guard import Guard
from launch.prompts.prompt import read_prompt, read_workload
from orchestrator.display import Display
from orchestrator.hierarchy import Round
from orchestrator.metrics import Metrics
from orchestrator.placement import place
from orchestrator.run_files import Report, versions

# ---- The run. ----


@dataclass(kw_only=True)
class Job:
    """One run, from the prompt to the report. `phase` is where it is, for the message if it fails."""

    config: RunConfig
    folder: Path
    display: Display
    interruption: Interruption
    phase: str = "prepare"
    seed: int = 0
    prompt_ids: list[int] = field(default_factory=list)
    expected_answers: list[str] = field(default_factory=list)
    """Of a prompt whose answer is known."""
    engine: Any = None
    company: Any = None
    """The processes of a run over several; see launch.processes.company."""
    metrics: Metrics = field(init=False)

    def __post_init__(self) -> None:
        self.metrics, self.seed = make_metrics(self.config), make_seed(self.config)

    def run(self) -> int:
        """The exit code; raises ConfigError for what cannot be run, anything else for what failed."""
        report, code = Report(self.folder), ExitCode.failed
        try:
            try:
                self._load()
                self._generate(report)
            except KeyboardInterrupt:
                self.interruption.is_requested = True
            if self.company is not None and self.interruption.is_requested:
                self.company.crew.check_guards()
            code = self._finish(report)
            return code
        finally:
            report.close()
            if self.engine is not None:
                self.engine.close()
            if self.company is not None:
                # Whoever waits for the prompt to be read, or for the dead, does not hear that it is over.
                self.company.close(at_once=code != ExitCode.done)

    def _load(self) -> None:
        engines = import_module("launch.assembly.engine")  # and torch with it: seconds
        placement = place(self.config.placement, world_size())
        if placement.kind is not PlacementKind.inline:
            company = import_module("launch.processes.company").Company
            self.company = company(self.config, placement, self.display.note, self.interruption.check_patience)
            self.company.start()
        prepared = engines.prepare(self.config)
        prepared.on_locked = self.display.locking
        self.phase = "prompt"
        self.prompt_ids = read_prompt(self.config.prompt, prepared.tokenizer, at_most=4 * prepared.max_positions)
        self.expected_answers = list(read_workload(self.config.prompt).answers)
        max_new_tokens = fit_to_model(self.config, len(self.prompt_ids), prepared.max_positions, self.display.note)
        self.phase = "load"
        what = (self.config, prepared, self.prompt_ids, max_new_tokens, self.seed)
        self.engine = engines.build(*what) if self.company is None else self.company.build(*what)
        for line in self.engine.notes:
            self.display.note(line)
        self.display.note(f"{self.config.decoding.mode} decoding of {self.config.model.target}, seed {self.seed}")

    def _generate(self, report: Report) -> None:
        hierarchy = self.engine.hierarchy
        self.phase = "prefill"
        num_tokens = len(self.prompt_ids)
        self.engine.on_prefill_progress(lambda done, total: self.display.reading(num_tokens, done / total))
        self.display.reading(num_tokens, 0.0)
        self._take_round(hierarchy.start, report)
        self.phase = "decode"
        self.interruption.is_deferred = True
        while not hierarchy.session.is_finished and not self.interruption.is_requested:
            self._take_round(hierarchy.round, report)

    def _take_round(self, advance: Callable[[], Round], report: Report) -> None:
        round_, seconds = take_round(advance, self.metrics)
        if "reread" in round_.seconds:
            self.display.note("a stored block was damaged: all tokens so far were read again")
        report.add_round(round_, seconds)
        self.display.add_round(round_, self.engine.hierarchy.session.text_stream.take_pieces(), self.metrics)

    def _finish(self, report: Report) -> int:
        """Writes and shows what there is; a run that was interrupted before its end says so."""
        self.phase, self.interruption.is_deferred = "report", True
        session = self.engine.hierarchy.session if self.engine is not None else None
        if session is not None and not session.is_finished:
            session.text_stream.close()
            self.display.add_text(session.text_stream.take_pieces())
        result = self._result(session)
        path = report.write_result(result)
        self.display.finish(result, os.path.relpath(path))
        return ExitCode.done if session is not None and session.is_finished else ExitCode.interrupted

    def _result(self, session: Any) -> dict[str, Any]:
        engine = self.engine
        return {
            "prompt_tokens": len(self.prompt_ids),
            "token_ids": list(session.generated) if session else [],
            "text": session.text if session else "",
            "expected_answers": self.expected_answers,
            "finish_reason": session.finish_reason if session and session.is_finished else "interrupted",
            "seed": self.seed,
            "config": to_plain(self.config),
            "timing": self.metrics.timing(),
            "speculation": self.metrics.speculation(),
            "memory": engine.memory_report() if engine else {},
            "streaming": engine.streaming_report() if engine else {},
            "processes": engine.processes_report() if engine else [],
            "versions": versions(),
        }


# ---- The program. ----


def run(config: RunConfig, folder: Path, console: Console | None = None) -> int:
    """One run with all its errors; returns the exit code."""
    config.output = os.path.relpath(folder)
    display, interruption = Display(console or Console()), Interruption()
    job = Job(config=config, folder=folder, display=display, interruption=interruption)
    try:
        with interruption, display:
            return job.run()
    except KeyboardInterrupt:
        return ExitCode.interrupted
    except ConfigError as error:
        return refuse(error)
    except Exception as error:
        return fail(error, job.phase, folder)


def run_task(cfg: DictConfig) -> int:
    """What Hydra runs; it handles its own errors: what Hydra catches, it reports as its own, with exit code 1."""
    try:
        config = OmegaConf.to_object(cfg)
        check_start(config)
    except ConfigError as error:
        return refuse(error)
    return run(config, Path(HydraConfig.get().runtime.output_dir))


@program
def main(argv: list[str]) -> int:
    """The orchestrator of a run; on any other rank the guard of its worker."""
    if os.environ.get("RANK", "0") != "0":
        return Guard(start_timeout_s(argv)).run()
    # Hydra's own flags (--help, --cfg job, --multirun) bring their own syntax: it checks what it composes.
    if not any(item.startswith("-") for item in argv):
        check_start(read_config(argv))
    return run_hydra(argv)


def start_timeout_s(argv: list[str]) -> float:
    """For a rank that looks for the orchestrator: all else there is to know, and what is wrong, that one says."""
    try:
        return read_config([item for item in argv if not item.startswith("-")]).placement.start_timeout_s
    except ConfigError:
        return PlacementConfig().start_timeout_s


def run_hydra(argv: list[str]) -> int:
    """The worst exit code of its runs: one, or with --multirun several."""
    codes = []

    @hydra.main(version_base=None, config_path=str(CONFIG_FOLDER), config_name="run")
    def task(cfg: DictConfig) -> None:
        codes.append(run_task(cfg))
        if codes[-1] == ExitCode.interrupted:
            sys.exit(ExitCode.interrupted)

    outer, sys.argv = sys.argv, [sys.argv[0], *argv]
    try:
        task()
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else ExitCode.done
    finally:
        sys.argv = outer
    return max(codes, default=ExitCode.done)


if __name__ == "__main__":
    sys.exit(main())
