"""One run of launch/run.py, from the prompt to the report, in this process or over several."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.schema import ConfigError, PlacementKind, RunConfig, to_plain
from launch.assembly.session_run import check_ids, fit_to_model, make_metrics, make_seed, note_of_cut, take_round
from launch.assembly.start_checks import unwritable, world_size
from launch.assembly.task import Task
from launch.command_line.interruption import Interruption
from launch.command_line.outcome import ExitCode, shown_path
from launch.prompts.prompt import Prompt, make_prompt, read_workload
from orchestrator.display import Display
from orchestrator.metrics import Metrics
from orchestrator.placement import place
from orchestrator.round import Phase, Round
from orchestrator.run_files import ROUNDS, Report, num_bytes_to_reserve, versions
from orchestrator.session import FAILED, INTERRUPTED, Session

if TYPE_CHECKING:
    from launch.assembly.engine import Engine
    from launch.assembly.generated_text import Stops
    from launch.processes.company import Company


@dataclass(kw_only=True)
class GenerationRun:
    """A run with its display and its files. `phase` is where it is, for the message if it fails."""

    config: RunConfig
    folder: Path
    display: Display
    interruption: Interruption
    phase: str = "prepare"
    seed: int = 0
    prompt: Prompt | None = None
    """None until it has been read."""
    stops: Stops | None = None
    """The stop strings as the target's tokenizer has them; None until that is known."""
    expected_answers: list[str] = field(default_factory=list)
    """Answers that a prompt of a known workload asks for."""
    drafter_vocabulary: dict[str, float] | None = None
    """How many token ids drafter and target share; None where no model drafts."""
    generation_config: dict[str, Any] = field(default_factory=dict)
    """What was taken from the target's generation_config.json, and what was not."""
    engine: Engine | None = None
    company: Company | None = None
    """The processes of a run over several."""
    metrics: Metrics = field(init=False)
    unwritten_result: dict[str, Any] | None = None
    """The result, where it could not be written."""

    def __post_init__(self) -> None:
        self.metrics, self.seed = make_metrics(self.config), make_seed(self.config)

    def run(self) -> ExitCode:
        """The exit code; raises ConfigError for what cannot be run, anything else for what failed."""
        report, code = self._open_report(), ExitCode.failed
        try:
            try:
                self._generate(self._load(), report)
            except KeyboardInterrupt:
                self.interruption.is_requested = True
            if self.company is not None and self.interruption.is_requested:
                self.company.crew.check_guards()
            code = self._finish(report)
            return code
        except ConfigError:
            raise
        except KeyboardInterrupt:  # the user cannot wait: what there is, is written
            self._save_what_there_is(report)
            raise
        except Exception as error:
            self._save_what_there_is(report, error)
            raise
        finally:
            report.close()
            if self.engine is not None:
                self.engine.close()
            if self.company is not None:
                # Whoever waits for the prompt to be read, or for the dead, does not hear that it is over.
                self.company.close(at_once=code != ExitCode.done)

    def _open_report(self) -> Report:
        num_bytes = num_bytes_to_reserve(to_plain(self.config), self.config.generation.max_new_tokens)
        try:
            return Report(self.folder, num_bytes)
        except OSError as error:
            example = f"outputs/run, on a disk with {num_bytes:,} bytes free for the result"
            raise unwritable("output", self.config.output, error, example, self.folder) from None

    def _load(self) -> Engine:
        from launch.assembly.generated_text import make_stops
        from launch.assembly.prepare import prepare  # and torch with it, which takes seconds

        company = self._gather_company()
        prepared = prepare(self.config)
        prepared.on_locked = self.display.locking
        if prepared.vocabulary is not None:
            self.drafter_vocabulary = prepared.vocabulary.report()
        self.phase = "prompt"
        prompt = self.prompt = make_prompt(self.config.prompt, prepared.tokenizer, at_most=4 * prepared.max_positions)
        check_ids(prompt.ids, prepared.vocab_size, prepared.tokenizer)
        self.expected_answers = list(read_workload(self.config.prompt).answers)
        max_new_tokens = fit_to_model(self.config, len(prompt.ids), prepared.max_positions, self.display.note)
        self.stops = make_stops(self.config.generation.stop_strings, prepared.tokenizer)
        for line in (note_of_cut(self.config, prompt, prepared.max_positions), prompt.frame.note):
            if line is not None:
                self.display.note(line)
        for text, note in self.stops.notes.items():
            self.display.note(f"generation.stop has {text!r}: {note}")
        self.generation_config = prepared.rules.report()
        self.phase = "load"
        task = Task(
            config=self.config,
            prepared=prepared,
            prompt_ids=prompt.ids,
            max_new_tokens=max_new_tokens,
            seed=self.seed,
        )
        engine = self.engine = _build(task, company)
        for line in engine.notes:
            self.display.note(line)
        self.display.note(f"{self.config.decoding.mode} decoding of {self.config.model.target}, seed {self.seed}")
        return engine

    def _gather_company(self) -> Company | None:
        """The processes of a run over several, which have been told where to come; None for a run in this one."""
        placement = place(self.config.placement, world_size())
        if placement.kind is PlacementKind.inline:
            return None
        from launch.processes.company import Company

        self.company = Company(self.config, placement, self.display.note, self.interruption.check_patience)
        self.company.start()
        return self.company

    def _generate(self, engine: Engine, report: Report) -> None:
        hierarchy = engine.hierarchy
        report.begin()
        self.phase = "prefill"
        num_tokens = len(hierarchy.session.prompt)
        engine.on_prefill_progress(lambda done, total: self.display.reading(num_tokens, done / total))
        self.display.reading(num_tokens, 0.0)
        self._take_round(hierarchy.start, hierarchy.session, report)
        self.phase = "decode"
        self.interruption.is_deferred = True
        while not hierarchy.session.is_finished and not self.interruption.is_requested:
            self._take_round(hierarchy.round, hierarchy.session, report)

    def _take_round(self, advance: Callable[[], Round], session: Session, report: Report) -> None:
        round_, seconds = take_round(advance, self.metrics)
        if round_.passes_original_length:
            self.display.note("the text passed the model's original length: all tokens so far were read again")
        elif Phase.reread in round_.seconds:
            self.display.note("a stored block was damaged: all tokens so far were read again")
        was_whole = ROUNDS not in report.incomplete
        report.add_round(round_, seconds)
        if was_whole and ROUNDS in report.incomplete:
            self.display.note(f"{ROUNDS} ends here, the run goes on ({report.incomplete[ROUNDS]})")
        self.display.add_round(round_, session.text_stream.take_pieces(), self.metrics)

    def _finish(self, report: Report) -> ExitCode:
        """Writes and shows what there is; a run that was interrupted before its end says so."""
        self.phase, self.interruption.is_deferred = "report", True
        session = self._ended_session()
        result = self._result(session)
        with suppress(KeyboardInterrupt):  # a later signal while processes are asked: the rest is reported
            result |= self._reports_of(self.engine)
        path = self._write(report, result)
        if session is not None:
            self.display.add_text(session.text_stream.take_pieces())
        for name, why in report.incomplete.items():
            self.display.note(f"{name} is incomplete: {why}")
        self.display.finish(result, shown_path(path))
        return ExitCode.done if session is not None and session.is_finished else ExitCode.interrupted

    def _save_what_there_is(self, report: Report, failure: Exception | None = None) -> None:
        """Writes the tokens so far of a run that failed, or that was interrupted again and again.

        Of the engine's own reports it has none: who would make them may be who failed.
        """
        session = self._ended_session()
        if session is None or report.has_result:
            return
        result = self._result(session)
        if failure is not None:
            result["failure"] = f"{type(failure).__name__}: {failure}"
            if not session.is_finished:
                result["finish_reason"] = FAILED
        try:
            self._write(report, result)
        except Exception as second:
            if failure is not None:
                failure.add_note(f"the result was not written: {type(second).__name__}: {second}")
        self.display.add_text(session.text_stream.take_pieces())

    def _ended_session(self) -> Session | None:
        """The session, with all the text of its tokens; None where nothing is loaded."""
        session = self.engine.hierarchy.session if self.engine is not None else None
        if session is not None and not session.is_finished:
            session.text_stream.close()
        return session

    def _write(self, report: Report, result: dict[str, Any]) -> Path:
        """Where result.json is; raises what hinders it, with the result in `unwritten_result`."""
        if report.incomplete:
            result["incomplete_files"] = dict(report.incomplete)
        self.unwritten_result = result
        path = report.write_result(result)
        self.unwritten_result = None
        return path

    def _reports_of(self, engine: Engine | None) -> dict[str, Any]:
        return {
            "memory": engine.memory_report() if engine else {},
            "streaming": engine.streaming_report() if engine else {},
            "processes": engine.processes_report() if engine else [],
        }

    def _retrieval_budget(self) -> int | None:
        """The budget as it was cut to the prompt, the most of an automatic one; None where there is no such level."""
        from launch.assembly.sizing import budgets  # which loads torch: a run that has a result has it already

        return max(budgets(self.config, len(self.prompt.ids)), default=None) if self.prompt else None

    def _result(self, session: Session | None) -> dict[str, Any]:
        return {
            "prompt_tokens": len(self.prompt.ids) if self.prompt else 0,
            "prompt": self.prompt.to_plain() if self.prompt else {},
            "token_ids": list(session.generated) if session else [],
            "text": session.text if session else "",
            "stops": self.stops.to_plain() if self.stops else [],
            "expected_answers": self.expected_answers,
            "finish_reason": session.finish_reason if session and session.is_finished else INTERRUPTED,
            "seed": self.seed,
            "generation_config": self.generation_config,
            "config": to_plain(self.config),
            "timing": self.metrics.timing(),
            "speculation": self.metrics.speculation(),
            "drafter_vocabulary": self.drafter_vocabulary,
            "retrieval_budget_tokens": self._retrieval_budget(),
            "memory": {},
            "streaming": {},
            "processes": [],
            "versions": versions(),
        }


def _build(task: Task, company: Company | None) -> Engine:
    """The engine of this process, or of the company's."""
    if company is None:
        from launch.assembly.engine import build

        return build(task)
    from launch.processes.remote_engine import build_remote

    return build_remote(task, company)
