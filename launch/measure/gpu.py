"""Measures real shapes on one GPU, in one call of under ten minutes: python -m launch.measure.gpu

The demo pair is widened to the shapes of Llama-2-7B and Llama-68M (launch/widen.py): weights, keys and values and the
time they take are those of the real ones, what is accepted is a small trained model's. Then, in this order:

    copies         plain page-locked copies against our streamer, by size of a block; scattered pieces, by their size
    offloaded      a long context on the host: autoregressive against triforce, by gamma2, and the time of each level
    on_chip        a shorter one on the device: the same, with and without CUDA graphs
    attention      over many keys: by products of matrices against the flash kernel, by number of rows
    transformers   its own generate with an offloaded cache

A prompt is read once; the ways to decode take turns on it, each going on where the last one stopped. Results are
written as they come, as JSON and as a page of tables; what does not fit into the time is left out, and said so.
Exit codes: 0 measured; 1 something failed, and the rest was measured; 2 a bad configuration.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path
from statistics import median

import torch
from hydra.core.config_store import ConfigStore

from conf.schema import (
    CacheConfig,
    ConfigError,
    DecodingConfig,
    Dtype,
    FullCacheConfig,
    FullCacheTier,
    GenerationConfig,
    ModelConfig,
    PromptConfig,
    RetrievalCacheConfig,
    RunConfig,
    SamplingConfig,
    require,
)
from launch.assembly.engine import prepare
from launch.command_line.outcome import refuse
from launch.command_line.overrides import compose_program
from launch.measure.copies import Copies
from launch.measure.levels_in_turns import LevelsInTurns, Sample
from launch.prompts.prompt import read_prompt
from launch.widen import Fill, WidenConfig, Widened, widen
from orchestrator.run_files import versions
from tiers.base import Segment
from tiers.pinned_host_tier import can_pin
from workers.attention.attend import attend
from workers.attention.kernels import LIMITS, KernelLimits
from workers.models.causal_model import CausalModel

CELLS = ("copies", "offloaded", "on_chip", "attention", "transformers")
LEAST_SECONDS = {"copies": 20, "offloaded": 120, "on_chip": 60, "attention": 10, "transformers": 90}
"""A part of the measurement is not begun with less time left; most of it is reading the prompt."""
SAMPLE_SECONDS = 15
"""Nor is another sample."""
AUTOREGRESSIVE = "autoregressive"


@dataclass(kw_only=True, slots=True)
class MeasureGpuConfig:
    """What is measured; the defaults are for 80 GB on the device and 128 GB on the host."""

    cells: list[str] = field(default_factory=lambda: list(CELLS))
    deadline_s: float = 500.0
    """Nothing is begun that would end later."""
    target_shape: str = "NousResearch/Yarn-Llama-2-7b-128k"
    drafter_shape: str = "JackFram/llama-68m"
    offloaded_tokens: int = 120_000
    on_chip_tokens: int = 32_000
    transformers_tokens: int = 32_000
    block_tokens: int = 2048
    """Of the offloaded cache; 2048 are 32 MiB of a layer of Llama-2-7B."""
    block_mib: list[float] = field(default_factory=lambda: [0.25, 1, 4, 8, 16, 32, 64])
    piece_kib: list[int] = field(default_factory=lambda: [2, 8, 32, 128, 512])
    copied_mib: int = 2048
    gamma1: int = 2
    offloaded_gamma2: list[int] = field(default_factory=lambda: [8, 16, 32])
    on_chip_gamma2: list[int] = field(default_factory=lambda: [4, 8, 16])
    offloaded_budget: int = 8192
    on_chip_budget: int = 4096
    repetitions: int = 3
    sample_tokens: int = 16
    """Of a speculating sample, at least; of autoregressive decoding a quarter as many."""
    temperature: float = 0.6
    smoke: bool = False
    """Tiny shapes, on any machine: whether the program runs, not how fast anything is."""
    models: str = "outputs/widened"
    """Folder for the widened pair."""
    output: str = "outputs/gpu"

    def __post_init__(self) -> None:
        for cell in self.cells:
            require(cell in CELLS, "cells", cell, f"of {', '.join(CELLS)}")
        require(self.repetitions >= 1, "repetitions", self.repetitions, ">= 1")
        require(self.sample_tokens >= 4, "sample_tokens", self.sample_tokens, ">= 4")
        require(self.deadline_s > 0, "deadline_s", self.deadline_s, "above 0")


ConfigStore.instance().store(name="measure_gpu_schema", node=MeasureGpuConfig)
SMOKE = {
    "offloaded_tokens": 700,
    "on_chip_tokens": 400,
    "transformers_tokens": 200,
    "block_tokens": 64,
    "block_mib": [0.0625, 0.125],
    "piece_kib": [2],
    "copied_mib": 1,
    "offloaded_gamma2": [4],
    "on_chip_gamma2": [4],
    "offloaded_budget": 128,
    "on_chip_budget": 128,
    "repetitions": 1,
    "sample_tokens": 6,
}
SMOKE_TARGET = {"num_layers": 7, "hidden_size": 512, "num_heads": 4, "num_kv_heads": 4, "intermediate_size": 800}
SMOKE_DRAFTER = {"hidden_size": 256, "num_heads": 2, "num_kv_heads": 2}


class Deadline:
    def __init__(self, seconds: float):
        self._ends = time.monotonic() + seconds

    def leaves(self, seconds: float) -> bool:
        return self._ends - time.monotonic() > seconds


class Results:
    """All there is so far, in two files of `folder`."""

    def __init__(self, folder: Path, facts: dict):
        self._folder, self.facts = folder, facts
        self.tables: dict[str, list[dict]] = {}
        self.notes: list[str] = []
        self.has_failed = False
        folder.mkdir(parents=True, exist_ok=True)

    def note(self, text: str) -> None:
        print(text, flush=True)
        self.notes.append(text)
        self.write()

    def set_table(self, title: str, rows: list[dict]) -> None:
        self.tables[title] = rows
        self.write()

    def write(self) -> None:
        whole = {"facts": self.facts, "tables": self.tables, "notes": self.notes}
        (self._folder / "results.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        (self._folder / "results.md").write_text(self.page(), encoding="utf-8")

    def page(self) -> str:
        parts = [", ".join(f"{key}: {value}" for key, value in self.facts.items() if not isinstance(value, dict))]
        parts += [f"### {title}\n\n{table(rows)}" for title, rows in self.tables.items() if rows]
        return "\n\n".join([*parts, "\n".join(f"- {note}" for note in self.notes)]) + "\n"


def table(rows: list[dict]) -> str:
    """Markdown; what a row lacks is left blank."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"| {' | '.join(keys)} |", "|---" * len(keys) + "|"]
    lines += ["| " + " | ".join(_shown(row.get(key)) for key in keys) + " |" for row in rows]
    return "\n".join(lines)


def _shown(value) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 1000 else str(value)


class Measurement:
    """The parts of the measurement, over one pair of models."""

    def __init__(self, config: MeasureGpuConfig, device: torch.device, results: Results, deadline: Deadline):
        self._config, self._device, self._results, self._deadline = config, device, results, deadline
        self._folder = Path(config.output)
        self._target: CausalModel | None = None  # loaded once
        self._pair: list[Widened] = []

    def run(self, cell: str) -> None:
        began = time.monotonic()
        try:
            getattr(self, f"_measure_{cell}")()
        finally:
            peak = ""
            if self._device.type == "cuda":
                peak = f", at most {torch.cuda.max_memory_allocated(self._device) / 2**30:.1f} GiB on the device"
            self._results.note(f"{cell}: {time.monotonic() - began:.0f} s{peak}")

    def release(self) -> None:
        """What the last part held, also where it failed, is there for the next."""
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)

    # ---- Copies and attention, without models. ----

    def _measure_copies(self) -> None:
        config, copies = self._config, Copies(self._device, self._config.copied_mib << 20)
        if self._device.type == "cuda" and not can_pin():
            self._results.note("host memory is not page-locked (cupy is missing): copies are slow")
        for number in range(config.repetitions):
            for mib in config.block_mib:
                copies.measure_blocks(int(mib * 2**20))
            for kib in config.piece_kib:
                copies.measure_pieces(kib << 10)
            self._results.set_table("Blocks from host to device, GB/s", copies.block_rows())
            self._results.set_table("Scattered pieces from host to device, GB/s", copies.piece_rows())
            if not self._deadline.leaves(SAMPLE_SECONDS):
                self._results.note(f"copies: {number + 1} of {config.repetitions} repetitions")
                return

    def _measure_attention(self) -> None:
        """32 heads x 128 over the keys of the on-chip context; milliseconds of one layer."""
        dtype = torch.bfloat16 if self._device.type == "cuda" else torch.float32
        num_keys = self._config.on_chip_tokens
        k, v = torch.randn(2, 32, num_keys, 128, device=self._device, dtype=dtype)
        rows = []
        for num_rows in (1, 9, 17, 33):
            q = torch.randn(32, 1, num_rows, 128, device=self._device, dtype=dtype)
            row = {"rows": num_rows, "keys": num_keys}
            for name, most_rows in (("by matrix products, ms", num_rows), ("by the flash kernel, ms", 0)):
                limits = replace(LIMITS, matmul_max_rows=most_rows)
                row[name] = self._milliseconds(lambda q=q, limits=limits: _attend_once(q, k, v, limits))
            rows.append(row)
            self._results.set_table("Attention of one layer", rows)

    def _milliseconds(self, action: Callable[[], object], repetitions: int = 10) -> float:
        times = []
        for _ in range(repetitions + 2):
            began = self._now()
            action()
            times.append(self._now() - began)
        return 1e3 * median(times[2:])

    def _now(self) -> float:
        """When all that was queued is done."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    # ---- Decoding. ----

    def _measure_offloaded(self) -> None:
        config = self._config
        full = FullCacheConfig(tier=FullCacheTier.host, block_tokens=str(config.block_tokens))
        sizes = (config.offloaded_tokens, config.offloaded_budget, config.offloaded_gamma2)
        self._measure_decoding("offloaded", full, *sizes)

    def _measure_on_chip(self) -> None:
        config = self._config
        full = FullCacheConfig(tier=FullCacheTier.device)
        self._measure_decoding("on_chip", full, config.on_chip_tokens, config.on_chip_budget, config.on_chip_gamma2)

    def _measure_decoding(
        self, cell: str, full: FullCacheConfig, num_tokens: int, budget: int, gammas: list[int]
    ) -> None:
        ways: list[tuple[int, bool] | None] = [None]  # autoregressive
        ways += [(gamma2, graphs) for gamma2 in gammas for graphs in (False, True)]
        # Every sample warms up with a round, and a round brings at most gamma2 + gamma1 + 1 tokens.
        most = 2 * max(gammas) + self._config.sample_tokens + 8
        max_new_tokens = (self._config.repetitions + 1) * len(ways) * most
        run_config = self._run_config(full, num_tokens, budget, max(gammas))
        prepared = prepare(run_config)
        prompt = read_prompt(run_config.prompt, prepared.tokenizer)
        began = self._now()
        levels = LevelsInTurns(run_config, prepared, self._target, prompt, max_new_tokens)
        try:
            if self._target is None:
                self._target = levels.target
                self._pair[0].widening.fill_with_noise(self._target.hf_model)
            made = self._now()
            self._results.note(f"{cell}: weights and caches made in {made - began:.1f} s; {levels.plan.reason}")
            levels.start()
            self._results.note(f"{cell}: {len(prompt)} tokens read in {self._now() - made:.1f} s")
            samples: dict[tuple[int, bool] | None, list[Sample]] = {way: [] for way in ways}
            for _ in range(self._config.repetitions):
                for way in ways:
                    if not self._deadline.leaves(SAMPLE_SECONDS):
                        self._results.note(f"{cell}: out of time after {len(samples[ways[-1]])} repetitions")
                        return
                    samples[way].append(self._sample(levels, way))
                    title = f"Decoding after {len(prompt)} tokens, {cell}, budget {budget}"
                    self._results.set_table(title, decoding_rows(samples))
        finally:
            levels.close()

    def _sample(self, levels: LevelsInTurns, way: tuple[int, bool] | None) -> Sample:
        if way is None:
            return levels.autoregressive(max(1, self._config.sample_tokens // 4))
        return levels.triforce(self._config.sample_tokens, gamma2=way[0], graphs=way[1])

    def _run_config(self, full: FullCacheConfig, num_tokens: int, budget: int, gamma2: int) -> RunConfig:
        target, drafter = self._widened()
        return RunConfig(
            model=ModelConfig(
                target=str(target),
                drafter=str(drafter),
                dtype=self._dtype,
                # One model for all contexts: it is loaded once.
                max_positions=131_072,
                self_check=False,  # padded tokens' logits are too far off for its tolerance; tests compare instead
            ),
            decoding=DecodingConfig(gamma1=self._config.gamma1, gamma2=gamma2),
            cache=CacheConfig(full=full, retrieval=RetrievalCacheConfig(budget=budget)),
            generation=GenerationConfig(ignore_eos=True),
            prompt=PromptConfig(max_tokens=num_tokens),
            sampling=SamplingConfig(temperature=self._config.temperature),
            output=str(self._folder),
        )

    def _widened(self) -> list[Path]:
        """Folders of target and drafter, written at the first call.

        The target's zeros take next to no place on disk, and are filled with noise when they are on the device.
        """
        if not self._pair:
            began, config = time.monotonic(), self._config
            target = {"shape": config.target_shape} if not config.smoke else {"shape": None} | SMOKE_TARGET
            drafter = {"shape": config.drafter_shape} if not config.smoke else {"shape": None} | SMOKE_DRAFTER
            for name, sizes in (("target", target), ("drafter", drafter | {"fill": Fill.noise})):
                folder = Path(config.models) / name
                widened = WidenConfig(source=f"assets/demo/{name}", output=str(folder), dtype=self._dtype, **sizes)
                self._pair.append(widen(widened))
            gib = " and ".join(f"{one.num_bytes / 2**30:.2f}" for one in self._pair)
            self._results.note(f"pair widened in {time.monotonic() - began:.0f} s: {gib} GiB of weights")
        return [one.folder for one in self._pair]

    @property
    def _dtype(self) -> Dtype:
        return Dtype.bfloat16 if self._device.type == "cuda" else Dtype.float32

    def _measure_transformers(self) -> None:
        """Its offloaded cache brings a layer's keys and values to the device while the layer before is computed."""
        config = self._config
        run_config = self._run_config(FullCacheConfig(), config.transformers_tokens, config.on_chip_budget, 4)
        prepared = prepare(run_config)
        if self._target is None:
            raise ConfigError("cells has transformers alone; it must have offloaded or on_chip, which load the model")
        prompt = read_prompt(run_config.prompt, prepared.tokenizer)
        model, times = self._target.hf_model, TokenTimes(self._now)
        model.set_attn_implementation("sdpa")
        with torch.inference_mode():
            ids = torch.tensor([prompt], device=self._device)
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=4,
                min_new_tokens=4,
                do_sample=False,
                cache_implementation="offloaded" if self._device.type == "cuda" else None,
                streamer=times,
            )
        row = {
            "tokens of context": len(prompt),
            "TTFT, s": times.seconds[0],
            "TBT, ms": 1e3 * median(times.seconds[1:]),
        }
        self._results.set_table("transformers, generate with an offloaded cache", [row])


class TokenTimes:
    """What transformers calls a streamer: it is given the prompt, then each token. Seconds between them."""

    def __init__(self, now: Callable[[], float]):
        self._now, self._last, self.seconds = now, now(), []

    def put(self, tokens: torch.Tensor) -> None:
        now = self._now()
        if tokens.numel() == 1:
            self.seconds.append(now - self._last)
        self._last = now

    def end(self) -> None: ...


def _attend_once(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, limits: KernelLimits) -> torch.Tensor:
    return attend(q, [Segment(k, v, start=0)], first_position=k.shape[1], scale=q.shape[-1] ** -0.5, limits=limits)


def decoding_rows(samples: dict[tuple[int, bool] | None, list[Sample]]) -> list[dict]:
    """Medians over repetitions; the ratio is to autoregressive decoding."""
    rows, plain = [], None
    for way, each in samples.items():
        if not each:
            continue
        tbt = median(sample.seconds / sample.num_tokens for sample in each)
        plain = tbt if way is None else plain
        row = {
            "way": AUTOREGRESSIVE if way is None else f"triforce, gamma2={way[0]}, graphs {'on' if way[1] else 'off'}",
            "TBT, ms": 1e3 * tbt,
            "least": 1e3 * min(sample.seconds / sample.num_tokens for sample in each),
            "most": 1e3 * max(sample.seconds / sample.num_tokens for sample in each),
            "against autoregressive": plain / tbt if plain and way is not None else None,
            "tokens per verification": median(sample.num_tokens / sample.num_rounds for sample in each),
        }
        for phase in ("draft", "retrieval", "verify", "refresh"):
            values = [1e3 * sample.phases[phase] / sample.num_rounds for sample in each if phase in sample.phases]
            row[f"{phase}, ms a round"] = median(values) if values else None
        rates = [sample.acceptance for sample in each if sample.acceptance is not None]
        row["acceptance"] = median(rates) if rates else None
        streamed = [sample.gb_per_s for sample in each if sample.gb_per_s is not None]
        row["streamed, GB/s"] = median(streamed) if streamed else None
        rows.append(row | {"repetitions": len(each)})
    return rows


def machine(device: torch.device) -> dict:
    """The card and what belongs to a measurement."""
    facts = {"date": str(date.today()), "device": str(device), "torch": torch.__version__}
    if device.type == "cuda":
        facts["card"] = torch.cuda.get_device_name(device)
        query = "--query-gpu=driver_version,pcie.link.gen.current,pcie.link.width.current"
        try:
            shown = subprocess.run(
                ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, timeout=10, check=True
            )
            facts["driver, PCIe generation, lanes"] = shown.stdout.strip()
        except (OSError, subprocess.SubprocessError) as error:
            facts["driver, PCIe generation, lanes"] = f"unknown ({type(error).__name__})"
    return facts


def measure(config: MeasureGpuConfig) -> Results:
    """Runs every part that there is time for. Raises ConfigError."""
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not config.smoke:
        raise ConfigError("smoke is False; it must be true on a machine without a CUDA device")
    if config.smoke:
        for key, value in SMOKE.items():
            setattr(config, key, value)
    deadline = Deadline(config.deadline_s)
    facts = machine(device) | {"config": asdict(config), "versions": versions()}
    results = Results(Path(config.output), facts)
    measurement = Measurement(config, device, results, deadline)
    for cell in (cell for cell in CELLS if cell in config.cells):
        if not deadline.leaves(0 if config.smoke else LEAST_SECONDS[cell]):
            results.note(f"{cell}: left out, there was no time")
            continue
        try:
            measurement.run(cell)
        except Exception as error:
            results.has_failed = True
            (Path(config.output) / f"{cell}.log").write_text(traceback.format_exc(), encoding="utf-8")
            reason = (str(error).splitlines() or [""])[0]
            results.note(f"{cell}: failed: {type(error).__name__}: {reason} ({cell}.log)")
        measurement.release()
    return results


def main(argv: list[str] | None = None) -> int:
    """The program; `argv` without its name."""
    try:
        config = compose_program("measure_gpu", sys.argv[1:] if argv is None else argv, "launch/measure/gpu.py")
        results = measure(config)
    except ConfigError as error:
        return refuse(error)
    print(results.page())
    return 1 if results.has_failed else 0


if __name__ == "__main__":
    sys.exit(main())
