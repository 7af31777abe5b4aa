"""transformers' models of a pair, and the GGUF file of llama.cpp: loaded or written once, for all peers of a cell."""

from __future__ import annotations

import copy
from functools import cached_property
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from conf.schema import Dtype
from launch.benchmark.config import PeerSettings
from launch.benchmark.contender import Cell
from launch.benchmark.gguf_export import export
from workers.checkpoint.facts import ModelFacts

GGUF_FILE = "target.gguf"


class SharedModels:
    """The models of a cell's peers, each made when it is first asked for."""

    def __init__(self, cell: Cell, settings: PeerSettings, folder: Path):
        self.cell, self.settings = cell, settings
        self._gguf_path = folder / GGUF_FILE

    @cached_property
    def target(self) -> PreTrainedModel:
        """The target with its weights."""
        return self._load(self.cell.prepared.target)

    @cached_property
    def assistant(self) -> PreTrainedModel:
        """The drafter with its weights, and the settings of assisted generation."""
        facts = self.cell.prepared.drafter
        assert facts is not None, "a peer that needs a drafter says so before it is loaded"
        model = self._load(facts)
        model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]  # transformers gives it no types
            pad_token_id=0,
            num_assistant_tokens=self.settings.num_assistant_tokens,
            num_assistant_tokens_schedule=self.settings.num_assistant_tokens_schedule,
            assistant_confidence_threshold=self.settings.assistant_confidence_threshold,
        )
        return model

    @cached_property
    def gguf_path(self) -> Path:
        """The target's weights as a file for llama.cpp."""
        facts, dtype = self.cell.prepared.target, self.settings.llama_cpp_weights
        weights_dtype = facts.dtype if dtype is Dtype.auto else getattr(torch, dtype)
        export(self.target, facts.tokenizer, self._gguf_path, weights_dtype)
        return self._gguf_path

    def _load(self, facts: ModelFacts) -> PreTrainedModel:
        """The model with the positions that `facts` were stretched to, sdpa attention, greedy unless told otherwise."""
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers gives it no types
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            facts.source,
            config=copy.deepcopy(facts.config),
            dtype=facts.dtype,
            device_map={"": self.cell.prepared.device},
            attn_implementation="sdpa",
            trust_remote_code=False,
        )
        # The model's own one would fill in an end of sequence, and a top_k.
        model.generation_config = GenerationConfig(pad_token_id=0)  # type: ignore[no-untyped-call]  # transformers gives it no types
        model.train(False)
        return model

    def close(self) -> None:
        """Gives the memory back, and removes the GGUF file."""
        self._gguf_path.unlink(missing_ok=True)
        for name in ("target", "assistant", "gguf_path"):
            self.__dict__.pop(name, None)
