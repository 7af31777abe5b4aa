"""Resolves a configuration against this machine and its models, before any weight is read: device, threads, dtype."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from conf.schema import LOOKUP_DRAFTER, ConfigError, CudaGraphs, Dtype, RunConfig
from launch.assembly.sizing import check_drafter_window
from tiers.planning.memory import cpu_computes_bf16, num_idle_cores
from workers.checkpoint.facts import ModelFacts, describe
from workers.checkpoint.shared_vocabulary import SharedVocabulary, shared_vocabulary
from workers.models.model_rules import ModelRules, make_rules

DTYPES = {Dtype.float32: torch.float32, Dtype.bfloat16: torch.bfloat16, Dtype.float16: torch.float16}


@dataclass(kw_only=True)
class Prepared:
    """A configuration resolved against this machine and its models; no weights are read yet."""

    device: torch.device
    """The device of a run in one process; over several, each process has one of its own."""
    num_threads: int
    """Threads that torch computes with on a CPU."""
    target: ModelFacts
    drafter: ModelFacts | None
    """None for a run without a drafter, or with one that looks up n-grams."""
    rules: ModelRules
    """What is taken from the target's generation_config.json."""
    vocabulary: SharedVocabulary | None = None
    """The ids that target and drafter share; None where there is no model that drafts."""
    notes: list[str] = field(default_factory=list)
    """Lines for the user about what was chosen."""
    on_locked: Callable[[int, int], None] = lambda done, total: None
    """Called as `on_locked(done, total)` while host memory is page-locked; both are in bytes."""

    @property
    def tokenizer(self) -> Any:
        """The target's tokenizer, of transformers."""
        return self.target.tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of token ids that the target can read: rows of its embedding."""
        size: int = self.target.config.get_text_config().vocab_size
        return size

    @property
    def max_positions(self) -> int:
        """Number of positions that the target knows."""
        return self.target.max_positions

    @property
    def eos_ids(self) -> frozenset[int]:
        """Token ids of the target that end a text."""
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
    _check_tokenizer(target)
    drafter, vocabulary = None, None
    if config.uses_drafter and config.model.drafter != LOOKUP_DRAFTER:
        drafter = describe("model.drafter", config.model.drafter, dtype)
        vocabulary = shared_vocabulary(target, drafter)
        check_drafter_window(config, drafter.source, drafter.max_positions)
    where = f"device {device}" + (f", threads: {num_threads}" if device.type == "cpu" else "")
    rules = rules_of(config, target)
    notes = [f"{where}, {str(dtype).split('.')[-1]}", *rules.notes, *(vocabulary.notes() if vocabulary else [])]
    return Prepared(
        device=device,
        num_threads=num_threads,
        target=target,
        drafter=drafter,
        vocabulary=vocabulary,
        rules=rules,
        notes=notes,
    )


def rules_of(config: RunConfig, target: ModelFacts) -> ModelRules:
    """What a run takes from its target's generation_config.json. Raises ConfigError."""
    return make_rules(
        target.generation,
        name=config.model.target,
        vocab_size=target.config.get_text_config().vocab_size,
        eos_ids=target.rule_eos_ids,
        sampling=config.sampling,
        are_wanted=config.generation.use_model_rules,
    )


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
    """Sets torch's number of threads and returns it.

    `auto` is OMP_NUM_THREADS where the user set it (torchrun may, to 1), else the number of idle cores.
    """
    of_user = os.environ.get("OMP_NUM_THREADS")
    if threads != "auto":
        torch.set_num_threads(int(threads))
    elif not of_user or (of_user == "1" and os.environ.get("TORCHELASTIC_RUN_ID")):
        torch.set_num_threads(num_idle_cores())
    return torch.get_num_threads()


def _choose_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    if dtype is not Dtype.auto:
        return DTYPES[dtype]
    computes_bf16 = device.type == "cuda" or cpu_computes_bf16()
    return torch.bfloat16 if computes_bf16 else torch.float32


def _check_tokenizer(target: ModelFacts) -> None:
    """Raises ConfigError for a tokenizer that does not tell where in a text its tokens begin."""
    if not target.tokenizer.is_fast:
        raise ConfigError(
            f"{target.key} is {target.source!r}, whose tokenizer {type(target.tokenizer).__name__} is in Python only; "
            "it must be a fast one, which tells where in the text each token begins: one with a tokenizer.json"
        )
