"""What is measured of our engine beside tokens; the peer that is held up between turns; and the machine."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch

from launch.benchmark.our_engine import ForwardClock
from launch.benchmark.transformers_peers import Gate, NotWantedError
from launch.command_line.machine import describe_machine


def test_the_clock_counts_forward_passes_and_nothing_else(monkeypatch):
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr("launch.command_line.timing.time.perf_counter", lambda: now.seconds)

    def forward(tokens, *, cache):
        now.seconds += len(tokens)
        return cache

    model = SimpleNamespace(forward=forward)
    clock = ForwardClock([model])
    assert model.forward([1, 2], cache="full") == "full"
    now.seconds += 10
    model.forward([3], cache="full")
    assert clock.seconds == 3


def generate(gate: Gate, batches: list[list[int]], events: list) -> threading.Thread:
    """As generate does: the prompt first, then a batch for each round."""

    def write() -> None:
        try:
            gate.put(torch.tensor([[0, 0, 0]]))
            for batch in batches:
                gate.put(torch.tensor(batch))
            gate.end()
        except NotWantedError as error:
            events.append(error)
        gate.over()

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    return thread


def test_a_gate_lets_whole_rounds_through_and_evens_out():
    gate = Gate()
    thread = generate(gate, [[1], [2, 3, 4], [5], [6, 7]], [])
    assert gate.let_through(1) == [1]
    assert gate.let_through(2) == [2, 3, 4]
    assert gate.let_through(2) == [5]
    assert gate.let_through(9) == [6, 7]
    thread.join(timeout=10)
    assert not thread.is_alive() and gate.let_through(1) == []


def test_a_gate_that_closes_ends_the_generation():
    gate, events = Gate(), []
    thread = generate(gate, [[1], [2], [3]], events)
    assert gate.let_through(1) == [1]
    gate.close()
    thread.join(timeout=10)
    assert not thread.is_alive() and len(events) == 1 and gate.tokens == [1]


def test_a_gate_closed_before_anything_came_ends_the_generation():
    gate, events = Gate(), []
    gate.close()
    thread = generate(gate, [[1], [2]], events)
    thread.join(timeout=10)
    assert not thread.is_alive() and len(events) == 1


@pytest.mark.parametrize("key", ["cpu", "cores", "memory_bytes", "memory_free_bytes", "threads", "load_average"])
def test_the_machine_is_described(key):
    assert describe_machine(torch.device("cpu"))[key]
