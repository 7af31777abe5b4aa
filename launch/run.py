"""Generates from a long document: torchrun launch/run.py key=value ... (keys: conf/schema.py, groups: conf/).

Exit codes: 0 done; 1 failed at run time, with one line naming role, rank and phase; 2 bad configuration or input, with
one message; 130 interrupted. torch is imported only after the configuration was found good.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conf.model_source import model_source
from conf.schema import LOOKUP_DRAFTER, NO_DRAFTER, ConfigError, PlacementConfig, PlacementKind, RunConfig, to_plain
from launch.assembly.session_run import fit_to_model, make_metrics, make_seed, take_round
from launch.command_line.overrides import CONFIG_FOLDER, read_config
from launch.processes.guard import Guard
from launch.prompts.prompt import check_prompt, read_prompt, workload_of
from orchestrator.crew import RunFailedError
from orchestrator.display import Display
from orchestrator.hierarchy import Round
from orchestrator.metrics import Metrics
from orchestrator.placement import place
from orchestrator.run_files import Report, versions

DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130
FAILURE_LOG = "failure.log"
# Which role a line of code belongs to, for the message of a failure; all else is the orchestrator's.
ROLE_OF_FILE = {
    "drafter.py": "drafter",
    "lookup_drafter.py": "drafter",
    "retrieval_drafter.py": "retriever",
    "target_verifier.py": "verifier",
}


def check_start(config: RunConfig, num_processes: int | None = None) -> None:
    """What must hold on this machine before anything is loaded; `num_processes` if not those that torchrun started."""
    place(config.placement, num_processes or world_size())
    check_folder("output", config.output, "outputs/run")
    if config.tiers.disk.folder is not None:
        check_folder("tiers.disk.folder", config.tiers.disk.folder, "outputs/disk")
    check_prompt(config.prompt)
    model_source("model.target", config.model.target)
    if config.model.drafter not in (LOOKUP_DRAFTER, NO_DRAFTER):
        model_source("model.drafter", config.model.drafter)


def world_size() -> int:
    """Processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_folder(key: str, folder: str, example: str) -> None:
    """The folder can be made, or is there, and can be written; leaves nothing behind."""
    example = f"a folder that can be written, for example {example}"
    if not folder or "\0" in folder:
        raise ConfigError(f"{key} is {folder!r}; it must be {example}")
    nearest = Path(folder).absolute()
    try:
        while not nearest.exists():
            nearest = nearest.parent
        tempfile.TemporaryDirectory(dir=nearest).cleanup()
    except OSError as error:
        raise ConfigError(
            f"{key} is {folder!r}, but {nearest} cannot be written ({error.strerror}); it must be {example}"
        ) from None


# ---- The run. ----


class Interruption:
    """Ctrl-C and SIGTERM: the first one ends the run in good order, a later one at once.

    While a round is decoded the first is only noted, so that the session stays whole; elsewhere it raises
    KeyboardInterrupt. torchrun passes a Ctrl-C on to a process that had it already: an echo is no second one.
    A round that waits for other processes may be left, too, when it takes longer than torchrun's patience.
    """

    ECHO_SECONDS = 2.0
    PATIENCE_SECONDS = 15.0
    """torchrun kills after 30."""

    def __init__(self):
        self.is_requested = self.is_deferred = False
        self._first_at = 0.0

    def __enter__(self) -> Interruption:
        self._earlier = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if not self.is_requested:
            self.is_requested, self._first_at = True, now
            must_stop_now = not self.is_deferred
        else:
            must_stop_now = now - self._first_at > self.ECHO_SECONDS
        if must_stop_now:
            raise KeyboardInterrupt

    def check_patience(self) -> None:
        """Raises KeyboardInterrupt when a round takes too long after the first signal."""
        if self.is_requested and self.is_deferred and time.monotonic() - self._first_at > self.PATIENCE_SECONDS:
            raise KeyboardInterrupt


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
        report, code = Report(self.folder), FAILED
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
                self.company.close(at_once=code != DONE)

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
        self.expected_answers = list(workload_of(self.config.prompt).answers)
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
        return DONE if session is not None and session.is_finished else INTERRUPTED

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
        return INTERRUPTED
    except ConfigError as error:
        return refuse(error)
    except Exception as error:
        return fail(error, job.phase, folder)


def refuse(error: ConfigError) -> int:
    """One message."""
    print(f"tierforce: {error}", file=sys.stderr, flush=True)
    return REFUSED


def fail(error: Exception, phase: str, folder: Path) -> int:
    """One line with the root cause; the traceback goes to a file."""
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    reason = (str(root).splitlines() or [""])[0]
    role, rank = (error.role, error.rank) if isinstance(error, RunFailedError) else (role_of(error), 0)
    where = f"phase {phase}, role {role}, rank {rank}"
    log = write_traceback(error, folder / FAILURE_LOG)
    print(f"tierforce: failed in {where}: {type(root).__name__}: {reason} ({log})", file=sys.stderr, flush=True)
    return FAILED


def write_traceback(error: Exception, path: Path) -> str:
    """Where the traceback is; a disk that is full must not hide what went wrong."""
    try:
        path.write_text("".join(traceback.format_exception(error)), encoding="utf-8", errors="backslashreplace")
    except OSError as failure:
        return f"no traceback written: {failure.strerror}"
    return f"traceback: {os.path.relpath(path)}"


def role_of(error: BaseException) -> str:
    """The role whose code the error came through."""
    for frame in traceback.extract_tb(error.__traceback__):
        path = Path(frame.filename)
        if path.parent.name == "workers" and path.name in ROLE_OF_FILE:
            return ROLE_OF_FILE[path.name]
    return "orchestrator"


def run_task(cfg: DictConfig) -> int:
    """What Hydra runs; it handles its own errors: what Hydra catches, it reports as its own, with exit code 1."""
    try:
        config = OmegaConf.to_object(cfg)
        check_start(config)
    except ConfigError as error:
        return refuse(error)
    return run(config, Path(HydraConfig.get().runtime.output_dir))


def main(argv: list[str] | None = None) -> int:
    """The program; `argv` without its name."""
    argv = sys.argv[1:] if argv is None else argv
    if os.environ.get("RANK", "0") != "0":
        return Guard(start_timeout_s(argv)).run()
    # transformers' advice to its callers is no message to the user.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        # Hydra's own flags (--help, --cfg job, --multirun) bring their own syntax: it checks what it composes.
        if not any(item.startswith("-") for item in argv):
            check_start(read_config(argv))
    except ConfigError as error:
        return refuse(error)
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
        if codes[-1] == INTERRUPTED:
            sys.exit(INTERRUPTED)

    outer, sys.argv = sys.argv, [sys.argv[0], *argv]
    try:
        task()
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else DONE
    finally:
        sys.argv = outer
    return max(codes, default=DONE)


if __name__ == "__main__":
    # Model text may hold what the terminal's encoding does not.
    sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main())
