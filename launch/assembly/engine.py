"""The engine of a run: what any engine offers, and the one that has all roles in this process.

`build` puts models, tiers, caches, roles and the hierarchy over them together in this process;
launch.processes.remote_engine does it over several processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from conf.schema import AUTO, ConfigError, RunConfig
from launch.assembly.generated_text import make_text_stream
from launch.assembly.prepare import Prepared
from launch.assembly.role_builder import RoleBuilder, disk_folder
from launch.assembly.sizing import (
    FreeBytes,
    ModelSize,
    available_bytes,
    budgets,
    gammas1,
    gammas2,
    plan_input,
    with_known_budget,
)
from launch.assembly.task import Task
from orchestrator.hierarchy import Hierarchy
from orchestrator.pace import AdaptivePace
from orchestrator.rebuild_policy import RebuildPolicy
from orchestrator.roles import DrafterRole, RetrieverRole, VerifierRole
from orchestrator.session import Session
from tiers.errors import OutOfTierMemoryError
from tiers.planning.memory import (
    device_free_bytes,
    disk_free_bytes,
    host_free_bytes,
    lockable_memory,
    process_bytes,
)
from tiers.planning.plan import MemoryPlan, make_plan
from tiers.planning.sizes import PlanInput
from workers.checkpoint.facts import ModelFacts
from workers.models.causal_model import CausalModel
from workers.models.target_model import TargetModel
from workers.process.background import InBackground


class Engine(Protocol):
    """A run ready to start, with what it reports at the end: see LocalEngine and RemoteEngine."""

    hierarchy: Hierarchy
    """The decoding loop: `start` once, then `round` until its session is finished."""
    notes: list[str]
    """Lines for the user about what was chosen on the way."""

    def on_prefill_progress(self, callback: Callable[[int, int], None]) -> None:
        """From now on `callback(done, total)` is called as the prompt is read, in tokens through all layers."""

    def memory_report(self) -> dict[str, dict[str, int]]:
        """`planned_bytes` and `peak_bytes` of each tier."""

    def streaming_report(self) -> dict[str, float | None]:
        """What was streamed from host and disk; see RoleBuilder.streaming_report."""

    def processes_report(self) -> list[dict[str, Any]]:
        """What each worker process was and had, in JSON types; empty for a run in one process."""

    def close(self) -> None:
        """Gives back what the engine holds; processes of their own are ended by who started them."""


@dataclass(kw_only=True)
class LocalEngine:
    """The Engine that has all roles in this process."""

    hierarchy: Hierarchy
    plan: MemoryPlan
    notes: list[str]
    process_planned_bytes: int
    """Bytes that this process took before it loaded anything, and those that the plan adds to its memory."""
    _builder: RoleBuilder
    _target: TargetModel
    _background: InBackground | None = None

    def on_prefill_progress(self, callback: Callable[[int, int], None]) -> None:
        """See Engine."""
        self._target.on_prefill_progress = callback

    @property
    def models(self) -> list[CausalModel]:
        """The target's weights, and the drafter's where there is one."""
        return self._builder.models

    def memory_report(self) -> dict[str, dict[str, int]]:
        """Planned and peak bytes of each tier, and of the process as the system sees it."""
        peaks = self._builder.peak_bytes() | {"process": process_bytes()[1]}
        planned = self.plan.totals | {"process": self.process_planned_bytes}
        return {name: {"planned_bytes": planned[name], "peak_bytes": peaks[name]} for name in planned}

    def streaming_report(self) -> dict[str, float | None]:
        """What was streamed from host and disk; see RoleBuilder.streaming_report."""
        return self._builder.streaming_report()

    def processes_report(self) -> list[dict[str, Any]]:
        """See Engine: there is no worker process."""
        return []

    def close(self) -> None:
        """Ends the thread that verifies in the background, and gives back caches and files."""
        if self._background is not None:
            self._background.close()
        self._builder.close()


def build(task: Task) -> LocalEngine:
    """Plans the memory, then loads weights and makes the caches. Raises ConfigError."""
    prepared, pace = task.prepared, make_pace(task)
    config = with_known_budget(task.config, task.num_prompt_tokens, notes := list(prepared.notes))
    task = replace(task, config=config)
    plan = memory_plan(task)
    in_this_process = [plan.totals["host"], plan.totals["device"] if prepared.device.type != "cuda" else 0]
    process_planned_bytes = process_bytes()[0] + sum(in_this_process)
    notes.append(plan.reason)
    with memory_shortage_as_config_error(config):
        builder = RoleBuilder(
            config,
            prepared.target,
            prepared.device,
            plan,
            seed=task.seed,
            rules=prepared.rules.of_task(task.num_prompt_tokens, task.max_new_tokens),
            in_threads=config.overlaps,
            on_locked=prepared.on_locked,
        )
        target = builder.load_target()
        verifier, target_model = builder.verifier(target)
        background = InBackground(verifier, prepared.device) if config.overlaps else None
        hierarchy = make_hierarchy(
            task,
            pace=pace,
            verifier=background or verifier,
            retriever=builder.retriever(target) if config.uses_retrieval else None,
            drafter=builder.drafter(prepared.drafter, target.vocab_size) if config.uses_drafter else None,
        )
    if builder.tiers.link.gb_per_s is not None:
        notes.append(f"the link from host to device is emulated: {builder.tiers.link.gb_per_s:g} GB/s")
    return LocalEngine(
        hierarchy=hierarchy,
        plan=plan,
        notes=notes + builder.notes,
        process_planned_bytes=process_planned_bytes,
        _builder=builder,
        _target=target_model,
        _background=background,
    )


def memory_plan(task: Task) -> MemoryPlan:
    """The plan of a run in this process, of what is free now. Raises ConfigError."""
    return make_plan(plan_input_for(task, _free_bytes(task.config, task.prepared)), task.config.cache)


@contextmanager
def memory_shortage_as_config_error(config: RunConfig) -> Iterator[None]:
    """Within it, a tier that runs out of memory raises ConfigError with what is free and a way out."""
    try:
        yield
    except OutOfTierMemoryError as error:
        raise ConfigError(
            f"{error}. A smaller prompt.max_tokens (it is {config.prompt.max_tokens}) needs less. "
            f"{host_free_bytes() / 2**30:.2f} GiB of host memory are free; `ulimit -l` is {lockable_memory()}"
        ) from error


def make_pace(task: Task) -> AdaptivePace | None:
    """What chooses the settings that are `auto`, for a task whose configuration still says so; None where none is."""
    config = task.config
    of_budget = budgets(config, task.num_prompt_tokens)
    chooses = AUTO in (config.decoding.gamma1, config.decoding.gamma2) or len(of_budget) > 1
    drafts = config.uses_drafter or config.uses_retrieval
    return AdaptivePace(gammas1(config), gammas2(config), of_budget) if chooses and drafts else None


def make_hierarchy(
    task: Task,
    *,
    pace: AdaptivePace | None = None,
    verifier: VerifierRole,
    retriever: RetrieverRole | None,
    drafter: DrafterRole | None,
) -> Hierarchy:
    """The hierarchy over these roles, which are in this process or stand for roles in others."""
    config = task.config
    rebuild = config.cache.retrieval.rebuild
    return Hierarchy(
        session=_make_session(task),
        verifier=verifier,
        retriever=retriever,
        drafter=drafter,
        gamma1=config.decoding.most_gamma1,
        gamma2=config.decoding.most_gamma2,
        pace=pace,
        overlap=config.decoding.overlap,
        original_length=task.prepared.target.original_length,
        rebuild_policy=RebuildPolicy(int(rebuild) if rebuild.isdigit() else rebuild),
    )


def _make_session(task: Task) -> Session:
    prepared, generation = task.prepared, task.config.generation
    return Session(
        prompt=task.prompt_ids,
        max_new_tokens=task.max_new_tokens,
        text_stream=make_text_stream(task),
        eos_ids=frozenset() if generation.ignore_eos else prepared.eos_ids,
    )


def _free_bytes(config: RunConfig, prepared: Prepared) -> FreeBytes:
    free = FreeBytes(
        device=device_free_bytes(prepared.device),
        host=host_free_bytes(),
        disk=disk_free_bytes(disk_folder(config)),
        device_is_host=prepared.device.type != "cuda",
    )
    return available_bytes(config.placement, free)


def plan_input_for(task: Task, free: FreeBytes) -> PlanInput:
    """What the memory plan asks of a task; see launch.assembly.sizing.plan_input."""
    prepared = task.prepared
    drafter = _size_of(prepared.drafter) if prepared.drafter else None
    return plan_input(
        task.config,
        _size_of(prepared.target),
        drafter,
        max_tokens=task.max_tokens,
        max_new_tokens=task.max_new_tokens,
        free=free,
    )


def _size_of(facts: ModelFacts) -> ModelSize:
    text_config = facts.config.get_text_config()
    return ModelSize(
        cache_shape=facts.cache_shape,
        num_weight_bytes=facts.num_weight_bytes,
        hidden_size=text_config.hidden_size,
        intermediate_size=getattr(text_config, "intermediate_size", None) or 4 * text_config.hidden_size,
    )
