"""tiers/shared_memory.py: the same memory in two processes, counted, and gone with them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tiers import shared_memory
from tiers.errors import OutOfTierMemoryError
from tiers.shared_memory import ALIGNMENT, AttachedPart, SharedArena, arena_bytes, attached

CPU, ROOT = torch.device("cpu"), Path(__file__).resolve().parents[3]
OTHER_PROCESS = """
import json, sys, torch
from tiers.shared_memory import attached
first, second = attached(json.loads(sys.argv[1]))
assert first.tolist() == [1.0, 2.0] and second.shape == (2, 3), (first, second)
first += 1
second[1] = 7
"""


def test_another_process_sees_and_changes_the_same_memory():
    arena = SharedArena(4096, CPU)
    first = arena.allocate(2, dtype=torch.float32).copy_(torch.tensor([1.0, 2.0]))
    second = arena.allocate(2, 3, dtype=torch.int64).zero_()
    description = json.dumps(arena.description())
    subprocess.run([sys.executable, "-c", OTHER_PROCESS, description], cwd=ROOT, check=True, timeout=60)
    assert first.tolist() == [2.0, 3.0] and second.tolist() == [[0, 0, 0], [7, 7, 7]]


def test_tensors_are_apart_and_aligned():
    arena = SharedArena(4096, CPU)
    tensors = [arena.allocate(count, dtype=torch.uint8) for count in (1, 513, 7)]
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    assert all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in tensors)
    assert all((tensor == number).all() for number, tensor in enumerate(tensors))
    assert arena.used_bytes == arena.peak_bytes == 2 * ALIGNMENT + ALIGNMENT + 7


def test_arena_bytes_is_what_tensors_take():
    sizes = (1, 513, 7, 512)
    arena = SharedArena(arena_bytes(*sizes), CPU)
    for size in sizes:
        arena.allocate(size, dtype=torch.uint8)
    with pytest.raises(OutOfTierMemoryError, match="has 2560 bytes, needed 2561"):
        arena.allocate(1, dtype=torch.uint8)


def test_it_is_nowhere_that_someone_could_leave_it(tmp_path):
    before = set(os.listdir("/dev/shm"))
    arena = SharedArena(1 << 20, CPU)
    assert set(os.listdir("/dev/shm")) == before
    assert arena.description()["memory"]["pid"] == os.getpid()


def test_memory_that_cannot_be_had_is_said(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shared_memory.os, "posix_fallocate", full)
    open_files = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OutOfTierMemoryError, match="shared memory of 2.00 GiB cannot be had: .*No space left"):
        SharedArena(2 << 30, CPU)
    assert len(os.listdir("/proc/self/fd")) == open_files


def test_a_rank_gets_its_heads_of_each_tensor():
    arena = SharedArena(1 << 16, CPU)
    kv = arena.allocate(2, 2, 5, 8, 3, dtype=torch.float32).zero_()
    bias = arena.allocate(2, 5, 8, dtype=torch.float32).zero_()
    part = AttachedPart(arena.description(), first_head=3)
    part.allocate(2, 2, 2, 8, 3, dtype=torch.float32).fill_(1)
    part.allocate(2, 2, 8, dtype=torch.float32).fill_(2)
    assert kv[:, :, 3:].eq(1).all() and kv[:, :, :3].eq(0).all()
    assert bias[:, 3:].eq(2).all() and bias[:, :3].eq(0).all()


def test_all_heads_are_the_whole():
    arena = SharedArena(1 << 12, CPU)
    whole = arena.allocate(2, 3, dtype=torch.int64)
    AttachedPart(arena.description(), first_head=0).allocate(2, 3, dtype=torch.int64).fill_(4)
    assert whole.eq(4).all()


@pytest.mark.parametrize(("size", "dtype"), [((1, 2), torch.int64), ((2, 3), torch.int32)])
def test_what_is_no_part_is_found_out(size, dtype):
    arena = SharedArena(1 << 12, CPU)
    arena.allocate(2, 3, dtype=torch.int64)
    with pytest.raises(AssertionError, match="is no part of"):
        AttachedPart(arena.description(), first_head=0).allocate(*size, dtype=dtype)


def test_attached_memory_outlives_the_makers_handle():
    arena = SharedArena(4096, CPU)
    tensor = arena.allocate(4, dtype=torch.int32).fill_(9)
    (other,) = attached(arena.description())
    del arena, tensor
    assert other.eq(9).all()
