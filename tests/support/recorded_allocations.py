"""Every allocation that tiers make, with the part of the memory plan that it belongs to.

The stack says whose an allocation is: the first frame, from the allocation outward, of a class or a function that
OWNERS knows. Nothing in the product is asked, so that a size that only its owner knows of shows.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from types import CodeType, FrameType

import torch

from launch.assembly import caches
from tiers import disk_tier
from tiers.block_layer import BlockLayer
from tiers.device_tier import DeviceTier
from tiers.disk_tier import DiskTier
from tiers.pinned_host_tier import PinnedHostTier
from tiers.planning.parts import Part
from tiers.planning.sizes import TierName
from tiers.retrieval.context_summary import ContextSummary
from tiers.retrieval.rule import RetrievalRule
from tiers.retrieval_cache import RetrievalCache
from tiers.streaming_llm_cache import StreamingLLMCache
from tiers.transfer import CpuBlockStreamer, CudaBlockStreamer, make_streamer
from workers.models.target_model import TargetModel

OWNERS: dict[type | CodeType, Part] = {
    StreamingLLMCache: Part.streaming_cache,
    RetrievalCache: Part.retrieval_cache,
    RetrievalRule: Part.chunk_scores,
    ContextSummary: Part.group_means,
    caches.selection.__code__: Part.chunks_ahead,
    BlockLayer: Part.tails,
    CpuBlockStreamer: Part.stream_buffers,
    CudaBlockStreamer: Part.stream_buffers,
    make_streamer.__code__: Part.staging_buffers,
    caches._space.__wrapped__.__code__: Part.workspace,
    caches.full_cache.__code__: Part.full_cache,
    TargetModel: Part.hidden_states,
}
Where = tuple[TierName, Part]


def frames_outward(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def owner_of(frame: FrameType) -> Part:
    """Raises AssertionError where nobody in the plan has asked for this."""
    for caller in frames_outward(frame):
        if caller.f_code in OWNERS:
            return OWNERS[caller.f_code]
        for kind in type(caller.f_locals.get("self")).__mro__:
            if kind in OWNERS:
                return OWNERS[kind]
    names = [caller.f_code.co_qualname for caller in frames_outward(frame)][:6]
    raise AssertionError(f"an allocation that no part of the plan stands for, by {' < '.join(names)}")


class Allocations:
    """Bytes in use and at their peak, by tier and part, of all tiers made while it is installed."""

    def __init__(self, monkeypatch):
        self.used: Counter[Where] = Counter()
        self.peak: Counter[Where] = Counter()
        self._owners: dict[int, Where] = {}
        allocate_device, allocate_host = DeviceTier.allocate, PinnedHostTier._allocate
        blocks_on_disk, page_aligned = DiskTier.blocks, disk_tier.page_aligned

        def device(tier, *size, dtype):
            return self._note(TierName.device, allocate_device(tier, *size, dtype=dtype))

        def host(tier, size, dtype, piece_bytes):
            return self._note(TierName.host, allocate_host(tier, size, dtype, piece_bytes))

        def disk(tier, shape, count):
            before = tier.used_bytes
            blocks = blocks_on_disk(tier, shape, count)
            self._add((TierName.disk, owner_of(sys._getframe(1))), tier.used_bytes - before)
            return blocks

        def pages(num_bytes):
            self._add((TierName.host, Part.page_buffers), num_bytes)
            return page_aligned(num_bytes)

        def free(tier, tensor):
            tier.used_bytes -= tensor.nbytes
            self._add(self._owners.pop(tensor.data_ptr()), -tensor.nbytes)

        monkeypatch.setattr(DeviceTier, "allocate", device)
        monkeypatch.setattr(PinnedHostTier, "_allocate", host)
        monkeypatch.setattr(DiskTier, "blocks", disk)
        monkeypatch.setattr(disk_tier, "page_aligned", pages)
        monkeypatch.setattr(DeviceTier, "free", free)
        monkeypatch.setattr(PinnedHostTier, "free", free)

    def _note(self, tier: TierName, tensor: torch.Tensor) -> torch.Tensor:
        part = owner_of(sys._getframe(2))
        if (tier, part) == (TierName.device, Part.hidden_states):
            part = Part.workspace  # on the device they are part of it
        self._owners[tensor.data_ptr()] = (tier, part)
        self._add((tier, part), tensor.nbytes)
        return tensor

    def _add(self, where: Where, num_bytes: int) -> None:
        self.used[where] += num_bytes
        self.peak[where] = max(self.peak[where], self.used[where])
