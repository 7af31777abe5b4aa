"""Times decoding on the device, with the full cache on the host and on the device: autoregressive against triforce."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import TypeAlias

from conf.schema import FullCacheConfig, FullCacheTier, RunConfig
from launch.assembly.prepare import prepare
from launch.command_line.timing import median_or_none, now
from launch.measure.gpu_config import GpuPart
from launch.measure.gpu_results import Cells
from launch.measure.gpu_setting import SAMPLE_SECONDS, Setting
from launch.measure.levels_in_turns import LevelsInTurns, Sample
from launch.prompts.prompt import read_prompt
from orchestrator.round import Phase

PHASES = (Phase.draft, Phase.retrieval, Phase.verify, Phase.refresh)
SPARE_TOKENS = 8
"""Tokens by which a sample's last round may go beyond what was asked for, beside gamma2."""


@dataclass(frozen=True, slots=True)
class Autoregressive:
    """The way to decode that all others are held against."""

    def __str__(self) -> str:
        return "autoregressive"

    def sample(self, levels: LevelsInTurns, num_tokens: int) -> Sample:
        """A quarter of the tokens that others decode at least: each of them takes a verification."""
        return levels.autoregressive(max(1, num_tokens // 4))


@dataclass(frozen=True, slots=True)
class Speculating:
    """A way to decode by triforce."""

    gamma2: int
    graphs: bool
    """Whether drafter and retrieval draft replay CUDA graphs."""

    def __str__(self) -> str:
        return f"triforce, gamma2={self.gamma2}, graphs {'on' if self.graphs else 'off'}"

    def sample(self, levels: LevelsInTurns, num_tokens: int) -> Sample:
        """At least `num_tokens` tokens, in whole rounds."""
        return levels.triforce(num_tokens, gamma2=self.gamma2, graphs=self.graphs)


AUTOREGRESSIVE = Autoregressive()
Way: TypeAlias = Speculating | Autoregressive


def measure_offloaded(setting: Setting) -> None:
    """A long context on the host."""
    config = setting.config
    full = FullCacheConfig(tier=FullCacheTier.host, block_tokens=str(config.block_tokens))
    sizes = (config.offloaded_tokens, config.offloaded_budget, config.offloaded_gamma2)
    _measure(setting, GpuPart.offloaded, full, *sizes)


def measure_on_chip(setting: Setting) -> None:
    """A shorter context on the device."""
    config = setting.config
    full = FullCacheConfig(tier=FullCacheTier.device)
    _measure(setting, GpuPart.on_chip, full, config.on_chip_tokens, config.on_chip_budget, config.on_chip_gamma2)


def _measure(
    setting: Setting, cell: GpuPart, full: FullCacheConfig, num_tokens: int, budget: int, gammas: list[int]
) -> None:
    """All ways take turns after one prompt, as often as there are repetitions, or time."""
    config, results = setting.config, setting.results
    ways: list[Way] = [AUTOREGRESSIVE]
    ways += [Speculating(gamma2, graphs) for gamma2 in gammas for graphs in (False, True)]
    # Every sample warms up with a round, and a round brings at most gamma2 + gamma1 + 1 tokens.
    most = 2 * max(gammas) + config.sample_tokens + SPARE_TOKENS
    max_new_tokens = (config.repetitions + 1) * len(ways) * most
    run_config = setting.pair.run_config(full, num_tokens, budget, max(gammas))
    with _levels(setting, cell, run_config, max_new_tokens) as (levels, num_prompt_tokens):
        samples: dict[Way, list[Sample]] = {way: [] for way in ways}
        for _ in range(config.repetitions):
            for way in ways:
                if not setting.deadline.leaves(SAMPLE_SECONDS):
                    results.note(f"{cell}: out of time after {len(samples[ways[-1]])} repetitions")
                    return
                samples[way].append(way.sample(levels, config.sample_tokens))
                title = f"Decoding after {num_prompt_tokens} tokens, {cell}, budget {budget}"
                results.set_table(title, decoding_rows(samples))


@contextmanager
def _levels(
    setting: Setting, cell: GpuPart, run_config: RunConfig, max_new_tokens: int
) -> Iterator[tuple[LevelsInTurns, int]]:
    """All levels of the pair, after they have read the prompt, and the number of tokens of the prompt."""
    prepared = prepare(run_config)
    prompt = read_prompt(run_config.prompt, prepared.tokenizer)
    began = now(setting.device)
    levels = LevelsInTurns(run_config, prepared, setting.pair.target, prompt, max_new_tokens)
    try:
        setting.pair.keep(levels.target)
        made = now(setting.device)
        setting.results.note(f"{cell}: weights and caches made in {made - began:.1f} s; {levels.plan.reason}")
        levels.start()
        setting.results.note(f"{cell}: {len(prompt)} tokens read in {now(setting.device) - made:.1f} s")
        yield levels, len(prompt)
    finally:
        levels.close()


def decoding_rows(samples: Mapping[Way, list[Sample]]) -> list[Cells]:
    """A row of medians over the samples of each way that has some; the ratio is to autoregressive decoding."""
    plain = median_or_none(sample.seconds_per_token for sample in samples.get(AUTOREGRESSIVE, []))
    return [_row(way, each, plain) for way, each in samples.items() if each]


def _row(way: Way, samples: list[Sample], plain: float | None) -> Cells:
    """One way; `plain` are seconds of a token when autoregressive."""
    times = [sample.seconds_per_token for sample in samples]
    tbt = median(times)
    row: Cells = {
        "way": str(way),
        "TBT, ms": 1e3 * tbt,
        "least": 1e3 * min(times),
        "most": 1e3 * max(times),
        "against autoregressive": plain / tbt if plain and way is not AUTOREGRESSIVE else None,
        "tokens per verification": median(sample.num_tokens / sample.num_rounds for sample in samples),
    }
    for phase in PHASES:
        values = [1e3 * sample.phases[phase] / sample.num_rounds for sample in samples if phase in sample.phases]
        row[f"{phase}, ms a round"] = median_or_none(values)
    row["acceptance"] = median_or_none(sample.acceptance for sample in samples)
    row["streamed, GB/s"] = median_or_none(sample.gb_per_s for sample in samples)
    row["repetitions"] = len(samples)
    return row
