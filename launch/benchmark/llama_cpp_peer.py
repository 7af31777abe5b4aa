"""llama.cpp, through llama-cpp-python, as a contender of launch/bench.py: see launch/benchmark/peers.py."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from launch.benchmark.contenders import WORKSPACE_BYTES, NotHereError, Segment, kv_bytes


@dataclass(kw_only=True)
class LlamaCppPeer:
    """See launch.benchmark.contenders.Contender. One generation, which waits between turns."""

    shared: Any
    """See launch.benchmark.peers.SharedModels."""
    uses_lookup: bool = False
    _llama: Any = None
    _tokens: Iterator[int] | None = None

    @property
    def _num_positions(self) -> int:
        return len(self.shared.cell.prompt) + self.shared.cell.num_new_tokens

    def needed_bytes(self) -> int:
        missing = [name for name in ("llama_cpp", "gguf") if importlib.util.find_spec(name) is None]
        if missing:
            raise NotHereError(f"{' and '.join(missing)} not installed: pip install 'tierforce[bench]'")
        facts = self.shared.cell.prepared.target
        num_bytes = facts.num_weight_bytes + kv_bytes(self.shared.cell.prepared, self._num_positions) + WORKSPACE_BYTES
        # Its lookup decoding keeps the logits of all positions, in fp32.
        logits = 4 * self._num_positions * facts.config.get_text_config().vocab_size
        return num_bytes + (logits if self.uses_lookup else 0)

    def load(self) -> None:
        import llama_cpp
        from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

        lookup = {}
        if self.uses_lookup:
            # Without logits_all it keeps room for fewer rows of logits than its lookup decoding writes.
            num_tokens = self.shared.settings.prompt_lookup_num_tokens
            lookup = {"draft_model": LlamaPromptLookupDecoding(num_pred_tokens=num_tokens), "logits_all": True}
        cell, num_threads = self.shared.cell, torch.get_num_threads()
        self._llama = llama_cpp.Llama(
            str(self.shared.gguf_path),
            n_ctx=self._num_positions,
            n_threads=num_threads,
            n_threads_batch=num_threads,
            n_gpu_layers=-1 if cell.prepared.device.type == "cuda" else 0,
            flash_attn=True,
            seed=cell.seed % 2**32,
            verbose=False,
            **lookup,
        )

    def start(self) -> list[int]:
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

    def decode(self, count: int) -> Segment:
        began = time.perf_counter()
        tokens = [int(token) for token in islice(self._tokens, count)]
        return Segment(tokens=tokens, num_timed=len(tokens), seconds=time.perf_counter() - began)

    def begin_counting(self) -> None:
        pass

    def facts(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        self._tokens = None  # a generation that nobody asks any more ends with its last reference
        if self._llama is not None:
            self._llama.close()
            self._llama = None
