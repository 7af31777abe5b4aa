"""transformers' generate as contenders of launch/bench.py: see launch/benchmark/peers.py for how time is measured."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache, StaticCache
from transformers.generation import BaseStreamer

from conf.schema import SamplingConfig
from launch.benchmark.contenders import WORKSPACE_BYTES, Cell, NotHereError, Segment, kv_bytes
from workers.process.openmp import release_pool


def sampling_options(config: SamplingConfig) -> dict[str, Any]:
    """Arguments of generate for the same distribution."""
    if config.is_greedy:
        return {"do_sample": False}
    plain = {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}
    return {"do_sample": True, **plain}


class ArrivalClock(BaseStreamer):
    """When tokens arrive, and how many; the prompt, which arrives first, is left out."""

    def __init__(self):
        self.arrivals: list[tuple[float, int]] = []
        self._has_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if self._has_prompt:
            self.arrivals.append((time.perf_counter(), value.numel()))
        self._has_prompt = True

    def end(self) -> None:
        pass


@dataclass(kw_only=True)
class GeneratePeer:
    """Decoding one token at a time; see launch.benchmark.contenders.Contender."""

    shared: Any
    """See launch.benchmark.peers.SharedModels."""
    make_cache: Callable[[GeneratePeer], Any]
    needs_cuda: bool = False
    _ids: list[int] = field(default_factory=list)
    _cache: Any = None

    @property
    def cell(self) -> Cell:
        return self.shared.cell

    @property
    def num_positions(self) -> int:
        return len(self.cell.prompt) + self.cell.num_new_tokens

    def needed_bytes(self) -> int:
        """A layer of its cache is copied for each token; the prompt passes through a layer as a whole."""
        prepared = self.cell.prepared
        if self.needs_cuda and prepared.device.type != "cuda":
            raise NotHereError(f"needs a CUDA device; this run is on {prepared.device}")
        facts = prepared.target
        text_config = facts.config.get_text_config()
        widths = 4 * text_config.hidden_size + 3 * (getattr(text_config, "intermediate_size", None) or 0)
        activations = widths * facts.dtype.itemsize * len(self.cell.prompt)
        kv = kv_bytes(prepared, self.num_positions)
        return facts.num_weight_bytes + kv + 2 * kv // facts.cache_shape.num_layers + activations + WORKSPACE_BYTES

    def load(self) -> None:
        self._cache = self.make_cache(self)

    @torch.inference_mode()
    def start(self) -> list[int]:
        """One plain forward pass; generate goes on with its cache."""
        self._ids, model = list(self.cell.prompt), self.shared.target
        torch.manual_seed(self.cell.seed)
        # Read into directly, a static cache would want a mask of prompt x positions.
        read = dynamic_cache(self) if isinstance(self._cache, StaticCache) else self._cache
        if len(self._ids) > 1:
            ids = torch.tensor([self._ids[:-1]], device=model.device)
            model(input_ids=ids, past_key_values=read, use_cache=True, logits_to_keep=1)
        if read is not self._cache:
            for index, layer in enumerate(read.layers):
                self._cache.update(layer.keys, layer.values, index)
                layer.keys = layer.values = None
        return self.decode(1).tokens

    @torch.inference_mode()
    def decode(self, count: int) -> Segment:
        """The first token's arrival starts the clock: what is set up before it is not counted."""
        clock, ids = ArrivalClock(), torch.tensor([self._ids], device=self.shared.target.device)
        output = self.shared.target.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=self._cache,
            max_new_tokens=count,
            streamer=clock,
            **sampling_options(self.cell.config.sampling),
        )
        tokens = output[0, len(self._ids) :].tolist()
        self._ids += tokens
        (began, num_first), (ended, _) = clock.arrivals[0], clock.arrivals[-1]
        return Segment(tokens=tokens, num_timed=len(tokens) - num_first, seconds=ended - began)

    def begin_counting(self) -> None:
        pass

    def facts(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        self._cache = None


def dynamic_cache(peer: GeneratePeer):
    """The default of generate."""
    return DynamicCache(config=peer.shared.target.config)


def static_cache(peer: GeneratePeer):
    return StaticCache(config=peer.shared.target.config, max_cache_len=peer.num_positions)


def offloaded_cache(peer: GeneratePeer):
    """Each layer's keys and values wait on the host for their turn."""
    return DynamicCache(config=peer.shared.target.config, offloading=True)


class NotWantedError(Exception):
    """A generation is not wanted any more."""


class Gate(BaseStreamer):
    """Lets a generation in another thread write so many tokens, then holds it up until more are wanted."""

    def __init__(self):
        self.tokens: list[int] = []
        self.is_over = False
        self._has_prompt = self._is_closed = False
        self._wanted = self._num_taken = 0
        self._changed = threading.Condition()

    def put(self, value: torch.Tensor) -> None:
        if not self._has_prompt:
            self._has_prompt = True
            return
        with self._changed:
            self.tokens += value.flatten().tolist()
            if len(self.tokens) >= self._wanted:
                release_pool()
            self._changed.notify_all()
            self._changed.wait_for(lambda: len(self.tokens) < self._wanted or self._is_closed)
        if self._is_closed:
            raise NotWantedError

    def end(self) -> None:
        pass

    def over(self) -> None:
        """No more tokens will come."""
        with self._changed:
            self.is_over = True
            self._changed.notify_all()

    def let_through(self, count: int) -> list[int]:
        """Until `count` more are there. A round may bring more than that, and the next call waits for as many less."""
        with self._changed:
            self._wanted += count
            self._changed.notify_all()
            self._changed.wait_for(lambda: len(self.tokens) >= self._wanted or self.is_over)
            new, self._num_taken = self.tokens[self._num_taken :], len(self.tokens)
            return new

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()


@dataclass(kw_only=True)
class SpeculatingPeer(GeneratePeer):
    """Assisted generation and prompt lookup, which cannot go on with a cache that is filled already: so it is one
    generation, in a thread of its own, held up between turns. `options(shared)` are its arguments."""

    options: Callable[[Any], dict[str, Any]]
    needs_drafter: bool = False
    _gate: Gate = field(default_factory=Gate)
    _thread: threading.Thread | None = None
    _error: BaseException | None = None

    def needed_bytes(self) -> int:
        drafter, num_bytes = self.cell.prepared.drafter, super().needed_bytes()
        if not self.needs_drafter:
            return num_bytes
        if drafter is None:
            raise NotHereError("needs a drafter model: set model.drafter to one")
        return num_bytes + drafter.num_weight_bytes + drafter.cache_shape.bytes_per_token * self.num_positions

    def load(self) -> None:
        super().load()
        self.options(self.shared)  # an assistant is loaded by being asked for

    def start(self) -> list[int]:
        torch.manual_seed(self.cell.seed)
        self._thread = threading.Thread(target=self._generate, args=(torch.get_num_threads(),), daemon=True)
        self._thread.start()
        return self.decode(1).tokens

    def _generate(self, num_threads: int) -> None:
        try:
            torch.set_num_threads(num_threads)
            ids = torch.tensor([self.cell.prompt], device=self.shared.target.device)
            with torch.inference_mode():
                self.shared.target.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    past_key_values=self._cache,
                    max_new_tokens=self.cell.num_new_tokens,
                    streamer=self._gate,
                    **sampling_options(self.cell.config.sampling),
                    **self.options(self.shared),
                )
        except NotWantedError:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._gate.over()

    def decode(self, count: int) -> Segment:
        release_pool()  # two pools would slow down the one that computes
        began = time.perf_counter()
        tokens = self._gate.let_through(count)
        seconds = time.perf_counter() - began
        if self._error is not None:
            raise self._error
        return Segment(tokens=tokens, num_timed=len(tokens), seconds=seconds)

    def close(self) -> None:
        self._gate.close()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        super().close()
