"""Stands for torch.cuda's streams, events and graphs on a CPU, where everything is done at once and in order.

So what is to run on a card is run, and typing errors and wrong calls are found; races are not.
"""

from __future__ import annotations

import inspect
from contextlib import contextmanager, nullcontext

import torch

from tests.support.recorded_operations import OperationRecorder


class FakeStream:
    def __init__(self, device=None): ...
    def wait_stream(self, stream: FakeStream) -> None: ...
    def wait_event(self, event: FakeEvent) -> None: ...
    def synchronize(self) -> None: ...


class FakeEvent:
    """Recorded at the number of events recorded before, in milliseconds."""

    num_recorded = 0

    def __init__(self, enable_timing: bool = False): ...
    def record(self, stream: FakeStream | None = None) -> None:
        FakeEvent.num_recorded += 1
        self.at = FakeEvent.num_recorded

    def synchronize(self) -> None: ...
    def elapsed_time(self, end: FakeEvent) -> float:
        return float(end.at - self.at)


class FakeGraph:
    def replay(self) -> None:
        self.operations()


REAL_SIGNATURE = inspect.signature(torch.cuda.graph)


@contextmanager
def fake_capture(graph: FakeGraph, *args, **kwargs):
    """torch.cuda.graph, with the arguments that the real one has."""
    REAL_SIGNATURE.bind(graph, *args, **kwargs)
    with OperationRecorder.notes() as notes:
        yield
    graph.operations = lambda: OperationRecorder.do_again(notes)


def install(monkeypatch) -> None:
    current = FakeStream()
    fakes = {
        "Stream": FakeStream,
        "Event": FakeEvent,
        "CUDAGraph": FakeGraph,
        "graph": fake_capture,
        "graph_pool_handle": lambda: (0, 1),
        "current_stream": lambda device=None: current,
        "stream": lambda stream: nullcontext(),
        "device": lambda device: nullcontext(),
        "synchronize": lambda device=None: None,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
