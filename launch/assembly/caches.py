"""Caches as the memory plan sizes them: every number of tokens, slots and blocks here is read from the plan's sizes.

level       cache                           its memory
drafter     StreamingLLM cache              device
retrieval   retrieval cache                 device, or what a verifier in another process writes to
target      full cache                      device, host and disk, layer by layer
            selection for the retrieval     device
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from tiers.base import BlockStore, CacheShape, Tier
from tiers.block_layer import BlockLayer
from tiers.block_writer import BlockWriter
from tiers.device_layer import DeviceLayer
from tiers.device_tier import DeviceTier
from tiers.disk_tier import DiskTier
from tiers.full_cache import CacheLayer, FullCache
from tiers.link import Link
from tiers.pinned_host_tier import PinnedHostTier
from tiers.planning.sizes import RetrievalSizes, Sizes, StreamingSizes
from tiers.quantised_retrieval_cache import make_retrieval_cache
from tiers.retrieval.context_summary import ContextSummary
from tiers.retrieval.rule import Pool, rule_class
from tiers.retrieval.selection import RetrievalSelection
from tiers.retrieval_cache import RetrievalCache
from tiers.streaming_llm_cache import StreamingLLMCache
from tiers.transfer import make_streamer


@dataclass(kw_only=True, frozen=True, slots=True)
class Tiers:
    """Memory of one process, and the link from its host to its device."""

    device: DeviceTier
    host: PinnedHostTier
    disk: DiskTier
    link: Link


def streaming_cache(sizes: StreamingSizes, shape: CacheShape, tier: Tier) -> StreamingLLMCache:
    """The drafter's cache, in `tier`."""
    return StreamingLLMCache(shape, sizes.sinks, sizes.window, sizes.slack, tier)


def retrieval_cache(sizes: Sizes, shape: CacheShape, tier: Tier) -> RetrievalCache:
    """The retrieval cache, in `tier`."""
    retrieval = known(sizes.retrieval)
    of_tokens = (retrieval.budget, retrieval.tail_tokens, sizes.slack_tokens)
    return make_retrieval_cache(retrieval.bits, shape, *of_tokens, tier, sizes.num_groups)


def full_cache(
    sizes: Sizes, shape: CacheShape, windows: list[int | None], tiers: Tiers, device: torch.device, num_readers: int
) -> FullCache:
    """The target's cache; `num_readers` reads from disk are in flight at once."""
    # 1. Layers in blocks come first, the slowest first of all: their stream starts with the pass.
    block = sizes.block_shape(shape)
    stores: list[BlockStore] = []
    stores += [tiers.disk.blocks(block, sizes.num_blocks) for _ in range(sizes.num_disk_layers)]
    stores += [tiers.host.blocks(block, sizes.num_blocks) for _ in range(sizes.num_host_layers)]
    layers: list[CacheLayer] = [
        BlockLayer(shape, store, sizes.slack_tokens, tiers.device, tiers.link) for store in stores
    ]
    layers += [DeviceLayer(shape, sizes.capacity, tiers.device) for _ in range(sizes.num_device_layers)]
    if not stores:
        return FullCache(layers, windows)
    streamer = make_streamer(
        block.size,
        shape.dtype,
        sizes.stream_buffers,
        tiers.device,
        device,
        num_threads=num_readers,
        link=tiers.link,
        staging_tier=tiers.host if sizes.stages_blocks else None,
    )
    # 2. A prompt is read with one layer at a time on the device, whose memory is given back.
    return FullCache(layers, windows, streamer, BlockWriter(device), partial(_space, shape, tiers.device))


@contextmanager
def _space(shape: CacheShape, tier: DeviceTier, num_tokens: int) -> Iterator[DeviceLayer]:
    """A layer on the device, while a prompt is read."""
    layer = DeviceLayer(shape, num_tokens, tier)
    try:
        yield layer
    finally:
        tier.free(layer.kv)


def selection(
    sizes: Sizes,
    cache: FullCache,
    shape: CacheShape,
    windows: list[int | None],
    newest_share: float,
    tier: Tier,
    pool: Pool,
) -> RetrievalSelection:
    """The choice of those chunks of the full cache that the retrieval cache gets; see RetrievalSelection."""
    retrieval = known(sizes.retrieval)
    rule = rule_class(retrieval.rule)(shape, sizes.capacity, retrieval.chunk_size, tier, pool)
    summary = ahead = None
    if retrieval.summary_tokens:
        summary = ContextSummary(shape, sizes.capacity, retrieval.summary_tokens, tier)
    if sizes.chooses_ahead:
        slots = shape.num_kv_heads * retrieval.budget
        ahead = tier.allocate(sizes.num_layers_in_blocks, 2, slots, shape.head_dim, dtype=shape.dtype).zero_()
    return RetrievalSelection(cache, rule, windows, retrieval.budget, newest_share, summary, ahead)


def known(sizes: RetrievalSizes | None) -> RetrievalSizes:
    """The sizes of the retrieval level, which was planned for."""
    assert sizes is not None, "the plan has no retrieval level"
    return sizes
