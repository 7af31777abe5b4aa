"""What a user would run instead, as contenders of launch/bench.py: transformers' generate, and llama.cpp.

Time between tokens is that of a turn over the tokens that came in it, the prompt being read before the first turn:
- transformers, one token at a time: generate goes on, in each turn, with the text so far and its cache; the first token
  of a turn starts the clock. The prompt is read by one plain forward pass.
- assisted generation and prompt lookup: one generation, held up between turns by its streamer.
- llama.cpp (llama-cpp-python): one generation, which waits for its next token to be asked for. The weights are
  converted to GGUF, keys and values f16, flash attention. Its sampler cuts by top_p before the temperature is applied,
  so sampled tokens follow another law there.
All of transformers' attention is sdpa. Peers have the whole cache on the device, transformers_offloaded on the host.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig

from conf.schema import Dtype
from launch.benchmark.config import PEER_NAMES, PeerSettings
from launch.benchmark.contenders import Cell
from launch.benchmark.gguf_export import export
from launch.benchmark.llama_cpp_peer import LlamaCppPeer
from launch.benchmark.transformers_peers import (
    GeneratePeer,
    SpeculatingPeer,
    dynamic_cache,
    offloaded_cache,
    static_cache,
)
from workers.models.facts import ModelFacts


class SharedModels:
    """transformers' models of a pair, loaded once for all peers, and the GGUF file."""

    def __init__(self, cell: Cell, settings: PeerSettings, folder: Path):
        self.cell, self.settings, self._folder = cell, settings, folder

    @cached_property
    def target(self):
        return self._load(self.cell.prepared.target)

    @cached_property
    def assistant(self):
        model = self._load(self.cell.prepared.drafter)
        model.generation_config = GenerationConfig(
            pad_token_id=0,
            num_assistant_tokens=self.settings.num_assistant_tokens,
            num_assistant_tokens_schedule=self.settings.num_assistant_tokens_schedule,
            assistant_confidence_threshold=self.settings.assistant_confidence_threshold,
        )
        return model

    @cached_property
    def gguf_path(self) -> Path:
        path, dtype = self._folder / "target.gguf", self.settings.llama_cpp_weights
        facts = self.cell.prepared.target
        export(self.target, facts.tokenizer, path, facts.dtype if dtype is Dtype.auto else getattr(torch, dtype))
        return path

    def _load(self, facts: ModelFacts):
        """With the positions that `facts` were stretched to."""
        transformers.utils.logging.disable_progress_bar()
        model = AutoModelForCausalLM.from_pretrained(
            facts.source,
            config=copy.deepcopy(facts.config),
            dtype=facts.dtype,
            device_map={"": self.cell.prepared.device},
            attn_implementation="sdpa",
            trust_remote_code=False,
        )
        # The model's own one would fill in an end of sequence, and a top_k.
        model.generation_config = GenerationConfig(pad_token_id=0)
        return model.eval()

    def close(self) -> None:
        (self._folder / "target.gguf").unlink(missing_ok=True)
        for name in ("target", "assistant", "gguf_path"):
            self.__dict__.pop(name, None)


def _assisted(shared: SharedModels) -> dict[str, Any]:
    return {"assistant_model": shared.assistant}


def _lookup(shared: SharedModels) -> dict[str, Any]:
    return {"prompt_lookup_num_tokens": shared.settings.prompt_lookup_num_tokens}


PEERS: dict[str, Callable[[SharedModels], Any]] = {
    "transformers": lambda shared: GeneratePeer(shared=shared, make_cache=dynamic_cache),
    "transformers_static": lambda shared: GeneratePeer(shared=shared, make_cache=static_cache),
    "transformers_offloaded": lambda shared: GeneratePeer(shared=shared, make_cache=offloaded_cache, needs_cuda=True),
    "assisted": lambda shared: SpeculatingPeer(
        shared=shared, make_cache=dynamic_cache, options=_assisted, needs_drafter=True
    ),
    "prompt_lookup": lambda shared: SpeculatingPeer(shared=shared, make_cache=dynamic_cache, options=_lookup),
    "llama_cpp": lambda shared: LlamaCppPeer(shared=shared),
    "llama_cpp_lookup": lambda shared: LlamaCppPeer(shared=shared, uses_lookup=True),
}
assert tuple(PEERS) == PEER_NAMES
