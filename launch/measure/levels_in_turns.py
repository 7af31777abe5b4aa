"""Ways of decoding in turns over one prompt, which is read once: each goes on where the last one stopped.

So ways that take turns see the same machine, the same caches and nearly the same context; the text they write differs,
and with it what is accepted, which repetitions even out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from conf.schema import CudaGraphs, RunConfig
from launch.assembly.engine import make_hierarchy, memory_plan, memory_shortage_as_config_error
from launch.assembly.prepare import Prepared
from launch.assembly.role_builder import RoleBuilder
from launch.assembly.task import Task
from launch.command_line.timing import now
from orchestrator.round import Phase, Round
from workers.attention.forward_pass import NOBODY
from workers.messages import Draft
from workers.models.causal_model import CausalModel

WARM_UP_ROUNDS, FIRST_ROUNDS = 1, 3
"""Rounds that are not counted; the first ones of a way record its graphs."""


@dataclass(kw_only=True)
class Sample:
    """Some tokens of one way of decoding."""

    num_tokens: int = 0
    num_rounds: int = 0
    seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds by phase, named as in a round."""
    num_proposed: int = 0
    num_accepted: int = 0
    gb_per_s: float | None = None
    """Rate of the stream of blocks; None where nothing was streamed."""

    @property
    def seconds_per_token(self) -> float:
        return self.seconds / self.num_tokens

    @property
    def acceptance(self) -> float | None:
        """Share of the proposed tokens that the target accepted; None where none were proposed."""
        return self.num_accepted / self.num_proposed if self.num_proposed else None

    def add(self, record: Round, seconds: float) -> None:
        """Counts a round that took so many seconds."""
        self.num_tokens += len(record.tokens)
        self.num_rounds += 1
        self.seconds += seconds
        self.num_proposed += len(record.proposed)
        self.num_accepted += record.num_accepted
        for phase, value in record.seconds.items():
            self.phases[phase] = self.phases.get(phase, 0.0) + value


class LevelsInTurns:
    """All levels of `config`, whose gamma2 is the largest there will be.

    `target`, if given, are weights that are loaded already. Raises ConfigError where memory is short.
    """

    def __init__(
        self,
        config: RunConfig,
        prepared: Prepared,
        target: CausalModel | None,
        prompt: list[int],
        max_new_tokens: int,
    ):
        config = replace(config, decoding=replace(config.decoding, cuda_graphs=CudaGraphs.on))
        seed = config.sampling.seed or 0
        task = Task(config=config, prepared=prepared, prompt_ids=prompt, max_new_tokens=max_new_tokens, seed=seed)
        self.plan = memory_plan(task)
        self._device = prepared.device
        self._warm: set[tuple[int, bool]] = set()
        with memory_shortage_as_config_error(config):
            self._builder = RoleBuilder(config, prepared.target, prepared.device, self.plan, seed=seed)
            self.target = target or self._builder.load_target()
            self._verifier, self._target_model = self._builder.verifier(self.target)
            self._hierarchy = make_hierarchy(
                task,
                verifier=self._verifier,
                retriever=self._builder.retriever(self.target),
                drafter=self._builder.drafter(prepared.drafter, self.target.vocab_size),
            )

    def start(self) -> None:
        """Reads the prompt and generates the first token."""
        self._hierarchy.start()

    def triforce(self, num_tokens: int, *, gamma2: int, graphs: bool) -> Sample:
        """Decodes at least `num_tokens` in whole rounds, after rounds that warm up."""
        self._hierarchy.gamma2 = gamma2
        for recorded in self._builder.recorded:
            recorded.is_on = graphs
        for _ in range(WARM_UP_ROUNDS if (gamma2, graphs) in self._warm else FIRST_ROUNDS):
            self._hierarchy.round()
        self._warm.add((gamma2, graphs))
        sample, before = Sample(), self._streamed()
        while sample.num_tokens < num_tokens:
            began = now(self._device)
            record = self._hierarchy.round()
            sample.add(record, now(self._device) - began)
        assert not self._hierarchy.session.is_finished, "the measurement used up its tokens"
        return self._with_stream(sample, before)

    def autoregressive(self, num_tokens: int) -> Sample:
        """Decodes `num_tokens`, after one that warms up; then the other levels catch up, which is not counted."""
        tokens: list[int] = []
        with self._without_retrieval():
            tokens += self._verify_one()
            sample, before = Sample(num_rounds=num_tokens, num_tokens=num_tokens), self._streamed()
            began = now(self._device)
            for _ in range(num_tokens):
                tokens += self._verify_one()
            sample.seconds = now(self._device) - began
        self._with_stream(sample, before)
        sample.phases[Phase.verify] = sample.seconds
        for role in (self._hierarchy.retriever, self._hierarchy.drafter):
            assert role is not None, "a run of triforce has all levels"
            role.commit(tokens)
        self._hierarchy.gamma2 = 0
        self._hierarchy.round()
        return sample

    @contextmanager
    def _without_retrieval(self) -> Iterator[None]:
        """Within it, passes are those of a target without a retrieval level: a baseline on the same cache.

        The retrieval level is to follow, not to be rebuilt, with the first pass afterwards.
        """
        target = self._target_model
        observers, target.observers = target.observers, NOBODY
        assert self._builder.full_cache is not None
        self._builder.full_cache.drop_collections()
        try:
            yield
        finally:
            target.observers = observers

    def _verify_one(self) -> list[int]:
        verdict = self._verifier.verify(Draft())
        tokens = self._hierarchy.session.commit([verdict.next_token])
        self._verifier.commit(tokens)
        return tokens

    def _streamed(self) -> tuple[float, float]:
        """Bytes streamed so far, and the seconds that took."""
        report = self._builder.streaming_report()
        return report["bytes"] or 0.0, report["seconds"] or 0.0

    def _with_stream(self, sample: Sample, before: tuple[float, float]) -> Sample:
        num_bytes, seconds = (after - then for after, then in zip(self._streamed(), before, strict=True))
        if seconds > 0:
            sample.gb_per_s = num_bytes / seconds / 1e9
        return sample

    def close(self) -> None:
        """Gives the memory of all caches back, as far as nobody else refers to them."""
        self._builder.close()
