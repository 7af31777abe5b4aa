"""A draft level's forward pass, recorded once as a CUDA graph for each number of tokens and replayed at every step.

A pass over a few tokens is dozens of kernels a layer, each of which the host launches, which takes longer than they do.
A graph is launched at once. It repeats the same kernels on the same addresses, so the pass must not
depend on anything the host knows: tokens, positions and slots come in a tensor (`_Step`), and the cache is seen with
all of its slots (tiers.fixed_slots). The same pass runs on a CPU, unrecorded; there it is tested.

What could go wrong, and why it does not:
- An operation that waits for the device, or whose shape depends on data, breaks a capture: the pass is watched once
  before (`_Watch`), and a model that has one is not recorded.
- Libraries prepare themselves at first use: the pass runs a few times before, on the stream of the capture.
- Memory of the graphs is a pool of their own, in which every graph's results stay; graphs of one recorder replay on one
  stream one after another, so they may share the rest. Logits are copied out before the next replay.
- Other threads may use the device meanwhile: the capture is strict with its own thread alone.
- The first replay is held against the pass itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tiers.fixed_slots import FixedSlots, SlotCache
from tiers.transfer import cuda_stream
from workers.models.causal_model import CausalModel

logger = logging.getLogger(__name__)

NUM_WARM_UPS = 3
REPLAY_TOLERANCE = 0.05
"""Largest difference of a replay's probabilities that passes.

A library may choose another kernel for it; a wrong graph is far off.
"""

Run = Callable[[], torch.Tensor]
"""Computes a pass from inputs at fixed addresses; returns its logits [T, V]."""


class Recorder(Protocol):
    """Records a pass, once for each number of tokens."""

    def __call__(self, run: Run) -> Run:
        """A function that does again what `run` does, from the same inputs' addresses. Raises NotRecordableError."""


class NotRecordableError(RuntimeError):
    """The pass has an operation that depends on data in a way that no graph can repeat."""


class RecordedModel:
    """`model` on `cache` alone: passes over up to `max_rows` tokens are recorded, longer ones computed as ever.

    `is_on` may be set: without it, all passes are computed as ever.
    """

    def __init__(self, model: CausalModel, cache: SlotCache, max_rows: int, record: Recorder):
        self._model, self._cache, self._max_rows, self._record = model, cache, max_rows, record
        self.vocab_size, self.start_sequence = model.vocab_size, model.start_sequence
        self._steps: dict[int, _Step] = {}
        self.is_on = True

    @torch.inference_mode()
    def forward(self, tokens: list[int], cache: SlotCache, num_logits: int) -> torch.Tensor:
        """Reads `tokens` after those in `cache`; logits [num_logits, V] after the last ones."""
        assert cache is self._cache, "another cache than the one that was recorded"
        if not self.is_on or len(tokens) > self._max_rows:
            return self._model.forward(tokens, cache, num_logits)
        step = self._steps.get(len(tokens))
        if step is None:
            step = self._steps[len(tokens)] = _Step(self._model, cache, len(tokens))
        cache.begin(len(tokens))
        try:
            logits = step.take(tokens, cache.length, cache.next_slot, self._record)
        except NotRecordableError as error:
            cache.abort()
            self.is_on = False
            logger.warning("forward passes are not recorded: %s", error)
            return self._model.forward(tokens, cache, num_logits)
        except BaseException:
            cache.abort()
            raise
        cache.end()
        return logits[-num_logits:]


class _Step:
    """The pass over `num_tokens` tokens: what it reads is at the same addresses each time."""

    def __init__(self, model: CausalModel, cache: SlotCache, num_tokens: int):
        self._model, self._cache = model, cache
        self._inputs = torch.zeros(3, num_tokens, dtype=torch.int64, device=model.device)
        self._replay: Run | None = None

    def take(self, tokens: list[int], first_position: int, first_slot: int, record: Recorder) -> torch.Tensor:
        """Computes the pass; logits [T, V] in memory of their own, so that the next replay leaves them as they are."""
        starts = (first_position, first_slot)
        self._inputs.copy_(torch.tensor([tokens, *(range(start, start + len(tokens)) for start in starts)]))
        if self._replay is None:
            self._replay = record(self._run)
        logits = self._replay().clone()
        self._model.progress.num_layers += 1  # a replay does not count its layers
        return logits

    def _run(self) -> torch.Tensor:
        ids, positions, places = self._inputs
        return self._model.read(ids[None], positions[None], FixedSlots(self._cache, places), len(places))


class CudaRecorder:
    """Records CUDA graphs on one device."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = cuda_stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Run) -> Run:
        """Records `run` as a graph; the current stream is waited for, where its inputs may still be under way."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                with _Watch():
                    run()
                for _ in range(NUM_WARM_UPS):
                    wanted = run()
        finally:
            current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.device(self._device),
            torch.inference_mode(False),  # what a graph keeps of the generators' state is to be updated by anybody
            torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"),
            torch.inference_mode(),
        ):
            result = run()

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        error = float((torch.softmax(replay().float(), -1) - torch.softmax(wanted.float(), -1)).abs().max())
        if not error <= REPLAY_TOLERANCE:
            raise RuntimeError(
                f"a recorded forward pass differs by a probability of {error:.2g}; set decoding.cuda_graphs=off"
            )
        return replay


def run_anew(run: Run) -> Run:
    """A Recorder for where there are no graphs: the same pass, computed each time."""
    with _Watch():
        run()
    return run


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch gives the class no types
    """Within it, what a capture forbids raises NotRecordableError."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above

    def __torch_dispatch__(
        self,
        func: Any,  # an overload of an operation, for which torch has no public type
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        tags = set(func.tags)
        if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default):
            depends = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        else:
            depends = bool(tags & {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})
        if depends:
            raise NotRecordableError(f"{func} depends on data")
        out = func(*args, **(kwargs or {}))
        inputs = {arg.device for arg in args if isinstance(arg, torch.Tensor) and arg.dim()}
        if isinstance(out, torch.Tensor) and out.dim() and inputs and out.device not in inputs | {torch.device("meta")}:
            raise NotRecordableError(f"{func} copies from one device to another")
        return out
