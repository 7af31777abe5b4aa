"""Our engine as a contender of launch/bench.py, in one of its modes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from conf.schema import RunConfig
from launch.assembly.engine import LocalEngine, build, plan_input_for
from launch.assembly.prepare import Prepared, prepare
from launch.assembly.session_run import make_metrics, take_round
from launch.assembly.sizing import FreeBytes, with_known_budget
from launch.assembly.task import Task
from launch.benchmark.contender import WORKSPACE_BYTES, Cell, Turn
from launch.command_line.timing import Stopwatch
from orchestrator.metrics import Metrics
from orchestrator.round import Phase
from tiers.planning.plan import make_plan
from workers.models.causal_model import CausalModel

BOUNDLESS = FreeBytes(device=1 << 60, host=1 << 60, disk=1 << 60, device_is_host=True)


class ForwardClock(Stopwatch):
    """Seconds within the forward passes of models, waiting for streamed keys and values included.

    Stands in for each model's `forward`; of use only where a pass is done when it returns (not on CUDA), and passes
    come one after the other.
    """

    def __init__(self, models: Iterable[CausalModel]):
        super().__init__()
        for model in models:
            model.forward = self._timed(model.forward)  # type: ignore[method-assign]  # of this object alone

    def _timed(self, forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """The same function, within the clock."""

        def timed(*args: Any, **kwargs: Any) -> torch.Tensor:
            with self:
                return forward(*args, **kwargs)

        return timed


@dataclass
class OurEngine:
    """One of our modes; see launch.benchmark.contender.Contender."""

    cell: Cell
    config: RunConfig
    _engine: LocalEngine | None = None
    _clock: ForwardClock | None = None
    _wanted_tokens: int = 0
    _metrics: Metrics = field(init=False)

    def __post_init__(self) -> None:
        self._metrics = make_metrics(self.config)

    def needed_bytes(self) -> int:
        """The bytes that its plan takes on the device; and on the host, too, where both are one memory."""
        cell, config = self.cell, with_known_budget(self.config, len(self.cell.prompt), [])
        prepared = cell.prepared if config.uses_drafter else replace(cell.prepared, drafter=None)
        planned = make_plan(plan_input_for(self._task(config, prepared), BOUNDLESS), config.cache).totals
        return planned["device"] + (planned["host"] if cell.prepared.device.type == "cpu" else 0) + WORKSPACE_BYTES

    def load(self) -> None:
        """Plans the memory, and makes weights and caches. Raises ConfigError."""
        cell = self.cell
        self._engine = build(self._task(self.config, prepare(self.config)))
        if cell.prepared.device.type == "cpu" and not self.config.overlaps:
            self._clock = ForwardClock(self._engine.models)

    def _task(self, config: RunConfig, prepared: Prepared) -> Task:
        """The cell's task for a run of ours."""
        cell = self.cell
        return Task(
            config=config,
            prepared=prepared,
            prompt_ids=cell.prompt,
            max_new_tokens=cell.num_new_tokens,
            seed=cell.seed,
        )

    @property
    def _loaded(self) -> LocalEngine:
        """The engine, which `load` has made."""
        assert self._engine is not None, "a contender is loaded before it takes part"
        return self._engine

    def start(self) -> list[int]:
        """Reads the prompt; returns the first token."""
        hierarchy = self._loaded.hierarchy
        take_round(hierarchy.start, self._metrics)
        self._wanted_tokens = 1
        return list(hierarchy.session.generated)

    def decode(self, count: int) -> Turn:
        """Whole rounds, until there are `count` more tokens than were wanted before."""
        hierarchy = self._loaded.hierarchy
        session, num_before, seconds = hierarchy.session, len(hierarchy.session.generated), 0.0
        self._wanted_tokens += count
        while len(session.generated) < self._wanted_tokens and not session.is_finished:
            seconds += take_round(hierarchy.round, self._metrics)[1]
        tokens = session.generated[num_before:]
        return Turn(tokens=tokens, num_timed=len(tokens), seconds=seconds)

    def begin_counting(self) -> None:
        """Metrics and clock start again from 0."""
        self._metrics = self._metrics.restarted()
        if self._clock is not None:
            self._clock.reset()

    def facts(self) -> dict[str, Any]:
        """Phases, acceptance, streaming and memory since `begin_counting`.

        `outside` are shares of the decoding time: outside the roles' calls (the hierarchy's own work), and outside
        forward passes and the passing on of keys and values (Python, sampling, acceptance too); null: not known.
        """
        metrics, engine = self._metrics, self._loaded
        phases, total = metrics.phase_seconds, metrics.decode_s
        outside: dict[str, float | None] = {"roles": None, "forwards_and_copies": None}
        if total:
            outside["roles"] = 1 - sum(phases.values()) / total
            if self._clock is not None:
                outside["forwards_and_copies"] = 1 - (self._clock.seconds + phases.get(Phase.refresh, 0.0)) / total
        return {
            "phases_s": dict(phases),
            "decode_s": total,
            "outside": outside,
            "speculation": metrics.speculation(),
            "streaming": engine.streaming_report(),
            "memory": engine.memory_report(),
            "notes": engine.notes,
        }

    def close(self) -> None:
        """Gives caches and weights back."""
        if self._engine is not None:
            self._engine.close()
            self._engine = self._clock = None
