"""llama.cpp, through llama-cpp-python, as a contender of launch/bench.py: see launch/benchmark/peers.py."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch

from launch.benchmark.contender import WORKSPACE_BYTES, NotHereError, Turn
from launch.benchmark.shared_models import SharedModels
from launch.command_line.timing import Stopwatch


@dataclass(kw_only=True)
class LlamaCppPeer:
    """One generation, which waits between turns; see launch.benchmark.contender.Contender."""

    shared: SharedModels
    uses_lookup: bool = False
    """Tokens are drafted by looking up in the prompt what followed the last ones."""
    _llama: Any = None  # llama_cpp publishes no types
    _tokens: Iterator[int] = field(default_factory=lambda: iter(()))

    def needed_bytes(self) -> int:
        """Weights, keys and values, and the logits that lookup decoding keeps. Raises NotHereError."""
        missing = [name for name in ("llama_cpp", "gguf") if importlib.util.find_spec(name) is None]
        if missing:
            raise NotHereError(f"{' and '.join(missing)} not installed: pip install 'tierforce[bench]'")
        cell = self.shared.cell
        facts = cell.prepared.target
        num_bytes = facts.num_weight_bytes + cell.kv_bytes + WORKSPACE_BYTES
        # Its lookup decoding keeps the logits of all positions, in fp32.
        num_logits_bytes = 4 * cell.num_positions * int(facts.config.get_text_config().vocab_size)
        return num_bytes + (num_logits_bytes if self.uses_lookup else 0)

    def load(self) -> None:
        """Reads the GGUF file, which is written if no other peer has asked for it yet."""
        import llama_cpp
        from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

        lookup: dict[str, Any] = {}
        if self.uses_lookup:
            # Without logits_all it keeps room for fewer rows of logits than its lookup decoding writes.
            num_tokens = self.shared.settings.prompt_lookup_num_tokens
            lookup = {"draft_model": LlamaPromptLookupDecoding(num_pred_tokens=num_tokens), "logits_all": True}
        cell, num_threads = self.shared.cell, torch.get_num_threads()
        self._llama = llama_cpp.Llama(
            str(self.shared.gguf_path),
            n_ctx=cell.num_positions,
            n_threads=num_threads,
            n_threads_batch=num_threads,
            n_gpu_layers=-1 if cell.prepared.device.type == "cuda" else 0,
            flash_attn=True,
            seed=cell.seed % 2**32,
            verbose=False,
            **lookup,
        )

    def start(self) -> list[int]:
        """Reads the prompt; returns the first token."""
        cell = self.shared.cell
        sampling = cell.config.sampling
        self._tokens = self._llama.generate(
            cell.prompt,
            temp=0.0 if sampling.is_greedy else sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=0.0,
            repeat_penalty=1.0,
        )
        return self.decode(1).tokens

    def decode(self, count: int) -> Turn:
        """The next `count` tokens."""
        with Stopwatch() as watch:
            tokens = [int(token) for token in islice(self._tokens, count)]
        return Turn(tokens=tokens, num_timed=len(tokens), seconds=watch.seconds)

    def begin_counting(self) -> None:
        """Nothing is counted but what turns bring."""

    def facts(self) -> dict[str, Any]:
        """None: llama.cpp tells nothing of how it drafts."""
        return {}

    def close(self) -> None:
        """Ends the generation and frees the model."""
        self._tokens = iter(())  # a generation that nobody asks any more ends with its last reference
        if self._llama is not None:
            self._llama.close()
            self._llama = None
