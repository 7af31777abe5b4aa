"""transformers' generate as contenders of launch/bench.py: see launch/benchmark/peers.py for how time is measured."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Cache, DynamicCache, GenerationMixin, StaticCache
from transformers.cache_utils import CacheLayerMixin
from transformers.generation.streamers import BaseStreamer

from conf.schema import SamplingConfig
from launch.benchmark.contender import WORKSPACE_BYTES, Cell, NotHereError, Turn
from launch.benchmark.shared_models import SharedModels
from launch.command_line.timing import Stopwatch, now
from workers.process.openmp import release_pool


def sampling_options(config: SamplingConfig) -> dict[str, Any]:
    """Arguments of transformers' generate for the distribution that our engine draws from."""
    if config.is_greedy:
        return {"do_sample": False}
    plain = {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}
    return {"do_sample": True, **plain}


class ArrivalClock(BaseStreamer):
    """A streamer that notes when tokens arrive, and how many; the prompt, which arrives first, is left out."""

    def __init__(self) -> None:
        self.arrivals: list[tuple[float, int]] = []
        """Second of the clock, and number of tokens."""
        self._has_prompt = False

    def put(self, value: torch.Tensor) -> None:
        """Takes token ids from generate."""
        if self._has_prompt:
            self.arrivals.append((now(), value.numel()))
        self._has_prompt = True

    def end(self) -> None:
        """The last token has arrived."""


@dataclass(kw_only=True)
class GeneratePeer:
    """Decoding one token at a time; see launch.benchmark.contender.Contender."""

    shared: SharedModels
    make_cache: Callable[[SharedModels], Cache]
    needs_cuda: bool = False
    copies_prompt: bool = False
    """The prompt is read into another cache, and copied from there."""
    _ids: list[int] = field(default_factory=list)
    """Prompt and continuation so far."""
    _cache: Cache | None = None

    @property
    def cell(self) -> Cell:
        """The task, which all contenders share."""
        return self.shared.cell

    def needed_bytes(self) -> int:
        """Weights, cache and activations, about. Raises NotHereError.

        A layer of its cache is copied for each token; the prompt passes through a layer as a whole.
        """
        prepared = self.cell.prepared
        if self.needs_cuda and prepared.device.type != "cuda":
            raise NotHereError(f"needs a CUDA device; this run is on {prepared.device}")
        facts = prepared.target
        text_config = facts.config.get_text_config()
        widths = 4 * text_config.hidden_size + 3 * (getattr(text_config, "intermediate_size", None) or 0)
        activations = widths * facts.dtype.itemsize * len(self.cell.prompt)
        num_kv_bytes = self.cell.kv_bytes
        num_copied_bytes = 2 * num_kv_bytes // facts.cache_shape.num_layers
        return int(facts.num_weight_bytes + num_kv_bytes + num_copied_bytes + activations + WORKSPACE_BYTES)

    def load(self) -> None:
        """Makes the cache, and loads the model if no other peer has."""
        self._cache = self.make_cache(self.shared)

    @torch.inference_mode()
    def start(self) -> list[int]:
        """Reads the prompt by one plain forward pass, whose cache generate goes on with; returns the first token."""
        self._ids = list(self.cell.prompt)
        torch.manual_seed(self.cell.seed)
        if len(self._ids) > 1:
            self._read_prompt(self._ids[:-1])
        return self.decode(1).tokens

    def _read_prompt(self, tokens: list[int]) -> None:
        """Fills the cache by one plain forward pass."""
        model, cache = self.shared.target, self._cache
        assert cache is not None, "a contender is loaded before it takes part"
        # Read into directly, a static cache would want a mask of prompt x positions.
        read = dynamic_cache(self.shared) if self.copies_prompt else cache
        ids = torch.tensor([tokens], device=model.device)
        model(input_ids=ids, past_key_values=read, use_cache=True, logits_to_keep=1)
        if self.copies_prompt:
            for index, layer in enumerate(read.layers):
                assert isinstance(layer, CacheLayerMixin) and layer.keys is not None and layer.values is not None
                cache.update(layer.keys, layer.values, index)
                layer.keys = layer.values = None

    def decode(self, count: int) -> Turn:
        """Generates `count` tokens. The first one's arrival starts the clock: what is set up before is not counted."""
        clock = ArrivalClock()
        tokens = self._generate(self._ids, count, clock)
        self._ids += tokens
        (began, num_first), (ended, _) = clock.arrivals[0], clock.arrivals[-1]
        return Turn(tokens=tokens, num_timed=len(tokens) - num_first, seconds=ended - began)

    @torch.inference_mode()
    def _generate(self, tokens: list[int], count: int, streamer: BaseStreamer, **options: Any) -> list[int]:
        """The `count` tokens by which transformers' generate goes on from `tokens`; `options` are more arguments."""
        model, ids = self.shared.target, torch.tensor([tokens], device=self.shared.target.device)
        assert isinstance(model, GenerationMixin)
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=self._cache,
            max_new_tokens=count,
            streamer=streamer,
            **sampling_options(self.cell.config.sampling),
            **options,
        )
        assert isinstance(output, torch.Tensor)
        new: list[int] = output[0, len(tokens) :].tolist()
        return new

    def begin_counting(self) -> None:
        """Nothing is counted but what turns bring."""

    def facts(self) -> dict[str, Any]:
        """None: generate tells nothing but its tokens."""
        return {}

    def close(self) -> None:
        """Gives the cache back; models are shared."""
        self._cache = None


def dynamic_cache(shared: SharedModels) -> Cache:
    """The default of generate, which grows with each token."""
    return DynamicCache(config=shared.target.config)


def static_cache(shared: SharedModels) -> Cache:
    """A cache with room for all positions from the start."""
    return StaticCache(config=shared.target.config, max_cache_len=shared.cell.num_positions)


def offloaded_cache(shared: SharedModels) -> Cache:
    """A cache whose layers wait on the host for their turn."""
    return DynamicCache(config=shared.target.config, offloading=True)


class NotWantedError(Exception):
    """A generation is not wanted any more."""


class Gate(BaseStreamer):
    """A streamer that holds up a generation in another thread while no more of its tokens are wanted."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        """All new tokens so far."""
        self.is_over = False
        self._has_prompt = self._is_closed = False
        self._wanted = self._num_taken = 0
        self._changed = threading.Condition()

    def put(self, value: torch.Tensor) -> None:
        """Takes token ids from generate; returns when more are wanted. Raises NotWantedError once it is closed."""
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
        """The generation is at its end; `over` says so to whoever waits."""

    def over(self) -> None:
        """No more tokens will come."""
        with self._changed:
            self.is_over = True
            self._changed.notify_all()

    def let_through(self, count: int) -> list[int]:
        """The new tokens, when `count` more are there.

        A round may bring more than that, and the next call waits for as many less.
        """
        with self._changed:
            self._wanted += count
            self._changed.notify_all()
            self._changed.wait_for(lambda: len(self.tokens) >= self._wanted or self.is_over)
            new, self._num_taken = self.tokens[self._num_taken :], len(self.tokens)
            return new

    def close(self) -> None:
        """The generation ends with the next tokens it brings."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()


@dataclass(kw_only=True)
class SpeculatingPeer(GeneratePeer):
    """Assisted generation and prompt lookup, which cannot go on with a cache that is filled already.

    So it is one generation, in a thread of its own, held up between turns.
    """

    options: Callable[[SharedModels], dict[str, Any]]
    """Arguments of generate that make it speculate."""
    needs_drafter: bool = False
    _gate: Gate = field(default_factory=Gate)
    _thread: threading.Thread | None = None
    _error: BaseException | None = None

    def needed_bytes(self) -> int:
        """The bytes of plain generation, and of the assistant where there is one. Raises NotHereError."""
        drafter, num_bytes = self.cell.prepared.drafter, super().needed_bytes()
        if not self.needs_drafter:
            return num_bytes
        if drafter is None:
            raise NotHereError("needs a drafter model: set model.drafter to one")
        vocabulary = self.cell.prepared.vocabulary
        if vocabulary is not None and not vocabulary.is_whole:
            raise NotHereError("needs a drafter whose token ids are the target's")
        return num_bytes + drafter.num_weight_bytes + drafter.cache_shape.bytes_per_token * self.cell.num_positions

    def load(self) -> None:
        """Makes the cache, and loads the models if no other peer has."""
        super().load()
        self.options(self.shared)  # an assistant is loaded by being asked for

    def start(self) -> list[int]:
        """Starts the generation; returns the first tokens."""
        torch.manual_seed(self.cell.seed)
        self._thread = threading.Thread(target=self._generate_all, args=(torch.get_num_threads(),), daemon=True)
        self._thread.start()
        return self.decode(1).tokens

    def _generate_all(self, num_threads: int) -> None:
        """Runs in the thread, with the number of threads of the one that made it."""
        try:
            torch.set_num_threads(num_threads)
            options = self.options(self.shared)
            self._generate(self.cell.prompt, self.cell.num_new_tokens, self._gate, **options)
        except NotWantedError:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._gate.over()

    def decode(self, count: int) -> Turn:
        """Lets the generation go on for `count` tokens. Raises what has failed in its thread."""
        release_pool()  # two pools would slow down the one that computes
        with Stopwatch() as watch:
            tokens = self._gate.let_through(count)
        if self._error is not None:
            raise self._error
        return Turn(tokens=tokens, num_timed=len(tokens), seconds=watch.seconds)

    def close(self) -> None:
        """Ends the generation and its thread."""
        self._gate.close()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        super().close()
