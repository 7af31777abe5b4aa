"""Puts a run together in one process: models, tiers, caches, roles, and the hierarchy over them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch

from conf.schema import AUTO, LOOKUP_DRAFTER, ConfigError, CudaGraphs, Dtype, RunConfig
from launch.assembly.role_builder import RoleBuilder, disk_folder
from launch.assembly.sizing import (
    FreeBytes,
    ModelSize,
    available_bytes,
    budgets,
    gammas1,
    gammas2,
    plan_input,
    streaming_sizes,
    with_known_budget,
)
from orchestrator.hierarchy import Hierarchy
from orchestrator.pace import AdaptivePace
from orchestrator.rebuild_policy import RebuildPolicy
from orchestrator.session import Session
from orchestrator.text_stream import TextStream
from tiers.errors import OutOfTierMemoryError
from tiers.planning.memory import (
    device_free_bytes,
    disk_free_bytes,
    host_free_bytes,
    lockable_memory,
    num_idle_cores,
    process_bytes,
)
from tiers.planning.plan import MemoryPlan, make_plan
from tiers.planning.sizes import PlanInput
from workers.models.causal_model import CausalModel
from workers.models.facts import ModelFacts, check_same_vocabulary, describe
from workers.models.target_model import TargetModel
from workers.process.background import InBackground


@dataclass(kw_only=True)
class Prepared:
    """A configuration resolved against its models, no weights read yet."""

    device: torch.device
    """Of a run in one process."""
    num_threads: int
    target: ModelFacts
    drafter: ModelFacts | None
    notes: list[str] = field(default_factory=list)
    on_locked: Callable[[int, int], None] = lambda done, total: None
    """Called as host memory is page-locked, in bytes."""

    @property
    def tokenizer(self):
        return self.target.tokenizer

    @property
    def max_positions(self) -> int:
        return self.target.max_positions

    @property
    def eos_ids(self) -> frozenset[int]:
        return self.target.eos_ids


def prepare(config: RunConfig) -> Prepared:
    """Chooses device and dtype, reads configurations and tokenizers, checks that they fit. Raises ConfigError."""
    device = _choose_device(config.placement.device)
    if device.type == "cuda" and config.tiers.link.gb_per_s is not None:
        raise ConfigError(
            f"tiers.link.gb_per_s is {config.tiers.link.gb_per_s}; it must be null on {device}, whose link is real"
        )
    if device.type != "cuda" and config.decoding.cuda_graphs is CudaGraphs.on:
        raise ConfigError(f"decoding.cuda_graphs is 'on'; it must be auto or off on {device}")
    num_threads = _set_threads(config.placement.threads) if device.type == "cpu" else torch.get_num_threads()
    dtype = _choose_dtype(config.model.dtype, device)
    target = describe("model.target", config.model.target, dtype, config.model.max_positions)
    drafter = None
    if config.uses_drafter and config.model.drafter != LOOKUP_DRAFTER:
        drafter = describe("model.drafter", config.model.drafter, dtype)
        check_same_vocabulary(target, drafter)
        _check_drafter_window(config, drafter)
    where = f"device {device}" + (f", threads: {num_threads}" if device.type == "cpu" else "")
    notes = [f"{where}, {str(dtype).split('.')[-1]}"]
    return Prepared(device=device, num_threads=num_threads, target=target, drafter=drafter, notes=notes)


def _choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda:0" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        device = torch.device("cuda:0" if name == "cuda" else name)
        if device.index >= count:
            raise ConfigError(f"placement.device is {name!r}; this machine has {count} CUDA devices: use cpu or auto")
        return device
    return torch.device(name)


def _set_threads(threads: str) -> int:
    """`auto` is OMP_NUM_THREADS where the user set it (torchrun may, to 1), else the number of idle cores."""
    of_user = os.environ.get("OMP_NUM_THREADS")
    if threads != "auto":
        torch.set_num_threads(int(threads))
    elif not of_user or (of_user == "1" and os.environ.get("TORCHELASTIC_RUN_ID")):
        torch.set_num_threads(num_idle_cores())
    return torch.get_num_threads()


def _choose_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    if dtype is not Dtype.auto:
        return getattr(torch, dtype)
    computes_bf16 = device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if computes_bf16 else torch.float32


def _check_drafter_window(config: RunConfig, drafter: ModelFacts) -> None:
    streaming = streaming_sizes(config)
    most = drafter.max_positions - streaming.sinks - streaming.slack
    if streaming.window > most:
        raise ConfigError(
            f"cache.streaming.window is {streaming.window}; it must be at most {most}: the drafter knows "
            f"{drafter.max_positions} positions, {streaming.sinks} of them for cache.streaming.sinks and "
            f"{streaming.slack} for tokens in flight"
        )


@dataclass(kw_only=True)
class Engine:
    """A run ready to start, with what it reports at the end."""

    hierarchy: Hierarchy
    plan: MemoryPlan
    notes: list[str]
    process_planned_bytes: int
    """What this process took before it loaded anything, and what the plan adds to its memory."""
    _builder: RoleBuilder
    _target: TargetModel
    _background: InBackground | None = None

    def on_prefill_progress(self, callback) -> None:
        """`callback(done, total)`, in tokens through all layers, is called as the prompt is read."""
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

    def processes_report(self) -> list[dict]:
        """None but this one."""
        return []

    def close(self) -> None:
        if self._background is not None:
            self._background.close()
        self._builder.close()


def build(config: RunConfig, prepared: Prepared, prompt_ids: list[int], max_new_tokens: int, seed: int) -> Engine:
    """Plans the memory, then loads weights and makes the caches. Raises ConfigError."""
    max_tokens = len(prompt_ids) + max_new_tokens
    pace = make_pace(config, len(prompt_ids))
    config = with_known_budget(config, len(prompt_ids), notes := list(prepared.notes))
    plan = memory_plan(config, prepared, max_tokens, max_new_tokens)
    in_this_process = [plan.totals["host"], plan.totals["device"] if prepared.device.type != "cuda" else 0]
    process_planned_bytes = process_bytes()[0] + sum(in_this_process)
    notes.append(plan.reason)
    with memory_shortage_as_config_error(config):
        how = {"seed": seed, "in_threads": config.overlaps}
        builder = RoleBuilder(config, prepared.target, prepared.device, plan, on_locked=prepared.on_locked, **how)
        target = builder.load_target()
        verifier, target_model = builder.verifier(target)
        background = InBackground(verifier, prepared.device) if config.overlaps else None
        hierarchy = make_hierarchy(
            config,
            make_session(config, prepared, prompt_ids, max_new_tokens),
            pace=pace,
            verifier=background or verifier,
            retriever=builder.retriever(target) if config.uses_retrieval else None,
            drafter=builder.drafter(prepared.drafter, target.vocab_size) if config.uses_drafter else None,
        )
    if builder.tiers.link.gb_per_s is not None:
        notes.append(f"the link from host to device is emulated: {builder.tiers.link.gb_per_s:g} GB/s")
    return Engine(
        hierarchy=hierarchy,
        plan=plan,
        notes=notes + builder.notes,
        process_planned_bytes=process_planned_bytes,
        _builder=builder,
        _target=target_model,
        _background=background,
    )


def memory_plan(config: RunConfig, prepared: Prepared, max_tokens: int, max_new_tokens: int) -> MemoryPlan:
    """For this process, of what is free now. Raises ConfigError."""
    inputs = plan_input_for(
        config, prepared, max_tokens=max_tokens, max_new_tokens=max_new_tokens, free=_free_bytes(config, prepared)
    )
    return make_plan(inputs, config.cache)


@contextmanager
def memory_shortage_as_config_error(config: RunConfig) -> Iterator[None]:
    try:
        yield
    except OutOfTierMemoryError as error:
        raise ConfigError(
            f"{error}. A smaller prompt.max_tokens (it is {config.prompt.max_tokens}) needs less. "
            f"{host_free_bytes() / 2**30:.2f} GiB of host memory are free; `ulimit -l` is {lockable_memory()}"
        ) from error


def make_session(config: RunConfig, prepared: Prepared, prompt_ids: list[int], max_new_tokens: int) -> Session:
    decode = partial(prepared.tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Session(
        prompt=prompt_ids,
        max_new_tokens=max_new_tokens,
        text_stream=TextStream(decode, config.generation.stop),
        eos_ids=frozenset() if config.generation.ignore_eos else prepared.eos_ids,
    )


def make_pace(config: RunConfig, num_prompt_tokens: int) -> AdaptivePace | None:
    """Chooses what is `auto`; None where nothing is."""
    of_budget = budgets(config, num_prompt_tokens)
    chooses = AUTO in (config.decoding.gamma1, config.decoding.gamma2) or len(of_budget) > 1
    drafts = config.uses_drafter or config.uses_retrieval
    return AdaptivePace(gammas1(config), gammas2(config), of_budget) if chooses and drafts else None


def make_hierarchy(config: RunConfig, session: Session, *, pace: AdaptivePace | None = None, **roles) -> Hierarchy:
    """`roles`: see Hierarchy; those of this process, or what stands for them."""
    rebuild = config.cache.retrieval.rebuild
    return Hierarchy(
        session=session,
        gamma1=config.decoding.most_gamma1,
        gamma2=config.decoding.most_gamma2,
        pace=pace,
        overlap=config.decoding.overlap,
        rebuild_policy=RebuildPolicy(int(rebuild) if rebuild.isdigit() else rebuild),
        **roles,
    )


def _free_bytes(config: RunConfig, prepared: Prepared) -> FreeBytes:
    free = FreeBytes(
        device=device_free_bytes(prepared.device),
        host=host_free_bytes(),
        disk=disk_free_bytes(disk_folder(config)),
        device_is_host=prepared.device.type != "cuda",
    )
    return available_bytes(config.placement, free)


def plan_input_for(config: RunConfig, prepared: Prepared, **tokens_and_free) -> PlanInput:
    """See launch.assembly.sizing.plan_input."""
    drafter = _size_of(prepared.drafter) if prepared.drafter else None
    return plan_input(config, _size_of(prepared.target), drafter, **tokens_and_free)


def _size_of(facts: ModelFacts) -> ModelSize:
    text_config = facts.config.get_text_config()
    return ModelSize(
        cache_shape=facts.cache_shape,
        num_weight_bytes=facts.num_weight_bytes,
        hidden_size=text_config.hidden_size,
        intermediate_size=getattr(text_config, "intermediate_size", None) or 4 * text_config.hidden_size,
    )
