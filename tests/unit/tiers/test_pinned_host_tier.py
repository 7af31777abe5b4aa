"""Page-locked host memory is exact in size, locked in pieces of whole blocks, and unlocked before it is given back.

CUDA is played by a module of two functions; what the real one does is tested in tests/gpu.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import sys
from types import SimpleNamespace

import pytest
import torch

from tiers import pinned_host_tier
from tiers.base import BlockShape
from tiers.errors import OutOfTierMemoryError
from tiers.pinned_host_tier import PinnedHostTier

BLOCK = BlockShape(num_kv_heads=2, num_tokens=48, head_dim=16, dtype=torch.bfloat16)
PIECE_BYTES = 40_000
"""Neither of whole blocks nor of whole pages."""


class FakeRuntime:
    """Knows which memory is locked; fails at the piece number `fails_at`."""

    def __init__(self, fails_at: int | None = None):
        self.pieces: dict[int, int] = {}
        self.num_calls, self.unlocked, self._fails_at = itertools.count(), [], fails_at

    def hostRegister(self, address: int, num_bytes: int, flags: int) -> None:  # noqa: N802
        if next(self.num_calls) == self._fails_at:
            raise RuntimeError("out of memory")
        self.pieces[address] = num_bytes

    def hostUnregister(self, address: int) -> None:  # noqa: N802
        ctypes.string_at(address, self.pieces[address])  # still mapped, or this is a crash
        self.unlocked.append(address)


@pytest.fixture
def runtime(monkeypatch):
    monkeypatch.setattr(pinned_host_tier, "PIECE_BYTES", PIECE_BYTES)
    return use(monkeypatch, FakeRuntime())


def use(monkeypatch, runtime: FakeRuntime) -> FakeRuntime:
    monkeypatch.setitem(sys.modules, "cupy.cuda", SimpleNamespace(runtime=runtime))
    return runtime


def test_pieces_are_whole_blocks_and_pages_and_cover_the_memory_once(runtime):
    progress = []
    tier = PinnedHostTier(pin=True, on_locked=progress.append)
    blocks = tier.blocks(BLOCK, 37)
    starts, memory = sorted(runtime.pieces), blocks.source(0).memory
    assert starts[0] == memory.data_ptr() and len(starts) > 3
    for start, following in itertools.pairwise(starts):
        assert start + runtime.pieces[start] == following
        assert runtime.pieces[start] % BLOCK.num_bytes == runtime.pieces[start] % 4096 == 0
    assert sum(runtime.pieces.values()) == 37 * BLOCK.num_bytes == tier.used_bytes == progress[-1]
    assert progress == sorted(progress) and len(progress) == len(starts)


def test_other_memory_is_locked_in_one_piece_of_the_size_asked_for(runtime):
    tensor = PinnedHostTier(pin=True).allocate(3, 5, 100_003, dtype=torch.bfloat16)
    assert runtime.pieces == {tensor.data_ptr(): tensor.nbytes} and tensor.nbytes == 3 * 5 * 100_003 * 2
    assert PinnedHostTier(pin=True).allocate(0, 5, dtype=torch.float32).shape == (0, 5)


def test_memory_stays_locked_as_long_as_a_tensor_has_it_and_not_longer(runtime):
    blocks = PinnedHostTier(pin=True).blocks(BLOCK, 9)
    rows = torch.randn(BLOCK.size).to(BLOCK.dtype)
    blocks.write(3, rows)
    block = blocks.source(3).memory
    del blocks
    gc.collect()
    assert torch.equal(block, rows) and not runtime.unlocked
    del block
    gc.collect()
    assert sorted(runtime.unlocked) == sorted(runtime.pieces)


def test_where_a_piece_cannot_be_locked_the_others_are_unlocked(monkeypatch):
    monkeypatch.setattr(pinned_host_tier, "PIECE_BYTES", PIECE_BYTES)
    runtime = use(monkeypatch, FakeRuntime(fails_at=2))
    tier = PinnedHostTier(pin=True)
    with pytest.raises(OutOfTierMemoryError, match="out of memory"):
        tier.blocks(BLOCK, 37)
    gc.collect()
    assert tier.used_bytes == 0 and sorted(runtime.unlocked) == sorted(runtime.pieces)
