"""Our engine as a contender of launch/bench.py, and what every contender is.

A contender reads the prompt once, then continues it segment by segment, in turns with the others; so a repetition is a
stretch of the same continuation, at the same positions for all, and no prompt is read twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from conf.schema import RunConfig
from launch.assembly.engine import LocalEngine, build, plan_input_for, with_known_budget
from launch.assembly.prepare import Prepared, prepare
from launch.assembly.session_run import make_metrics, take_round
from launch.assembly.sizing import FreeBytes
from launch.assembly.task import Task
from tiers.planning.plan import make_plan

WORKSPACE_BYTES = 256 << 20
"""What no plan counts."""
BOUNDLESS = FreeBytes(device=1 << 60, host=1 << 60, disk=1 << 60, device_is_host=True)


class NotHereError(Exception):
    """A contender that this machine, pair or cell cannot have: skipped, with the reason."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Cell:
    """What all contenders of one comparison have in common."""

    config: RunConfig
    """Of our engine; each of our contenders changes some of it."""
    prepared: Prepared
    """Of the pair, with its drafter: facts of the models for the peers."""
    prompt: list[int]
    num_new_tokens: int
    """At most, over all segments."""
    seed: int


@dataclass(kw_only=True, slots=True)
class Segment:
    """What one turn brought: `num_timed` of its tokens took `seconds`."""

    tokens: list[int]
    num_timed: int
    seconds: float


class Contender(Protocol):
    """`load`, `start`, then `decode` as often as wanted; `close` may come at any time, and more than once."""

    def needed_bytes(self) -> int:
        """Of memory, about; raises NotHereError, ConfigError."""

    def load(self) -> None:
        """Weights and caches."""

    def start(self) -> list[int]:
        """Reads the prompt and generates the first token, which it returns."""

    def decode(self, count: int) -> Segment:
        """`count` tokens, or, where a round brings several, some more."""

    def begin_counting(self) -> None:
        """The warm-up is over."""

    def facts(self) -> dict[str, Any]:
        """What else there is to tell, of what was decoded since `begin_counting`; JSON types."""

    def close(self) -> None: ...


def kv_bytes(prepared: Prepared, num_tokens: int) -> int:
    """Of the target's whole cache."""
    return prepared.target.cache_shape.bytes_per_token * num_tokens


class ForwardClock:
    """Seconds within the forward passes of a model, waiting for streamed keys and values included.

    Stands in for each model's `forward`; of use only where a pass is done when it returns (not on CUDA), and passes
    come one after the other.
    """

    def __init__(self, models: list[Any]):
        self.seconds = 0.0
        for model in models:
            model.forward = self._timed(model.forward)

    def _timed(self, forward: Callable) -> Callable:
        def timed(*args, **kwargs):
            began = time.perf_counter()
            try:
                return forward(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began

        return timed


@dataclass(kw_only=True)
class OurEngine:
    """One of our modes; see Contender."""

    cell: Cell
    config: RunConfig
    _engine: LocalEngine | None = None
    _clock: ForwardClock | None = None
    _wanted_tokens: int = 0
    _metrics: Any = field(init=False)

    def __post_init__(self) -> None:
        self._metrics = make_metrics(self.config)

    def needed_bytes(self) -> int:
        """What its plan takes; that of each tier, where host and device are one memory."""
        cell, config = self.cell, with_known_budget(self.config, len(self.cell.prompt), [])
        prepared = cell.prepared if config.uses_drafter else replace(cell.prepared, drafter=None)
        planned = make_plan(plan_input_for(self._task(config, prepared), BOUNDLESS), config.cache).totals
        return planned["device"] + (planned["host"] if cell.prepared.device.type == "cpu" else 0) + WORKSPACE_BYTES

    def load(self) -> None:
        cell = self.cell
        self._engine = build(self._task(self.config, prepare(self.config)))
        if cell.prepared.device.type == "cpu" and not self.config.overlaps:
            self._clock = ForwardClock(self._engine.models)

    def _task(self, config: RunConfig, prepared: Prepared) -> Task:
        cell = self.cell
        return Task(
            config=config,
            prepared=prepared,
            prompt_ids=cell.prompt,
            max_new_tokens=cell.num_new_tokens,
            seed=cell.seed,
        )

    def start(self) -> list[int]:
        take_round(self._engine.hierarchy.start, self._metrics)
        self._wanted_tokens = 1
        return list(self._engine.hierarchy.session.generated)

    def decode(self, count: int) -> Segment:
        hierarchy = self._engine.hierarchy
        session, num_before, seconds = hierarchy.session, len(hierarchy.session.generated), 0.0
        self._wanted_tokens += count
        while len(session.generated) < self._wanted_tokens and not session.is_finished:
            seconds += take_round(hierarchy.round, self._metrics)[1]
        tokens = session.generated[num_before:]
        return Segment(tokens=tokens, num_timed=len(tokens), seconds=seconds)

    def begin_counting(self) -> None:
        self._metrics = self._metrics.restarted()
        if self._clock is not None:
            self._clock.seconds = 0.0

    def facts(self) -> dict[str, Any]:
        """`outside` are shares of the decoding time: outside the roles' calls (the hierarchy's own work), and outside
        forward passes and the passing on of keys and values (Python, sampling, acceptance too); null: not known."""
        metrics, streaming = self._metrics, self._engine.streaming_report()
        phases, total = metrics.phase_seconds, metrics.decode_s
        share = {"roles": None, "forwards_and_copies": None}
        if total:
            share["roles"] = 1 - sum(phases.values()) / total
            if self._clock is not None:
                share["forwards_and_copies"] = 1 - (self._clock.seconds + phases.get("refresh", 0.0)) / total
        return {
            "phases_s": dict(phases),
            "decode_s": total,
            "outside": share,
            "speculation": metrics.speculation(),
            "streaming": streaming,
            "memory": self._engine.memory_report(),
            "notes": self._engine.notes,
        }

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = self._clock = None
