"""Sizes of what a process holds, in tokens, slots and counts: the plan counts their bytes, the builders allocate them.

They are worked out once. Who plans and who builds reads them here, so that neither can think of a size of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from conf.schema import RetrievalRuleName
from tiers.base import BlockShape, CacheShape
from tiers.retrieval.context_summary import groups_within


class TierName(StrEnum):
    """Kind of memory, as reports name it."""

    device = "device"
    host = "host"
    disk = "disk"


@dataclass(kw_only=True, frozen=True, slots=True)
class RetrievalSizes:
    """Level 2: the retrieval cache, and what chooses its chunks."""

    budget: int
    """Tokens of chosen chunks, per layer and kv head."""
    tail_tokens: int
    """Room behind them for newer tokens, per layer."""
    chunk_size: int = 8
    """Tokens that are chosen together."""
    rule: RetrievalRuleName = RetrievalRuleName.attention
    """Rule that chunks are chosen by; it keeps something of every chunk."""
    bits: int | None = None
    """Bits of a value of the chosen chunks; None: as many as the model's."""
    summary_tokens: int = 0
    """Tokens of one group of those that are not chosen; 0: there are no groups."""
    is_rebuilt: bool = False
    """Chunks are chosen again and again, and where memory allows an update ahead."""


@dataclass(kw_only=True, frozen=True, slots=True)
class StreamingSizes:
    """Level 1: the drafter's StreamingLLM cache."""

    sinks: int
    """First tokens of the context, always kept."""
    window: int
    """Newest tokens kept, at least."""
    slack: int
    """Tokens on top of them before the window is read anew."""

    @property
    def num_slots(self) -> int:
        """Tokens that it has room for."""
        return self.sinks + self.window + self.slack


@dataclass(kw_only=True, frozen=True, slots=True)
class Sizes:
    """All sizes of a plan. The first layers of the full cache are on disk, then come those on the host."""

    max_tokens: int
    """Prompt and generated tokens."""
    slack_tokens: int
    """Tentative tokens on top of them, of one round."""
    piece_tokens: int
    """Tokens of the prompt that pass through a layer together."""
    num_device_layers: int
    num_host_layers: int
    num_disk_layers: int
    block_tokens: int
    """Tokens of one block of a layer that is not on the device."""
    stream_buffers: int
    """Blocks in flight to the device."""
    stages_blocks: bool = False
    """Blocks are checked on the host, and reach a GPU through page-locked buffers there."""
    hidden_tier: TierName = TierName.device
    """Tier in which a prompt's hidden states wait between layers: device or host."""
    retrieval: RetrievalSizes | None = None
    """None: there is no retrieval level."""
    chooses_ahead: bool = False
    """Chunks of layers in blocks are chosen an update ahead, and copied as the blocks pass."""
    streaming: StreamingSizes | None = None
    """None: there is no model that drafts."""

    @property
    def capacity(self) -> int:
        """Tokens that a layer of the full cache holds at most."""
        return self.max_tokens + self.slack_tokens

    @property
    def num_layers(self) -> int:
        """Layers of the full cache."""
        return self.num_device_layers + self.num_layers_in_blocks

    @property
    def num_layers_in_blocks(self) -> int:
        """Layers of the full cache that are not on the device."""
        return self.num_host_layers + self.num_disk_layers

    @property
    def num_blocks(self) -> int:
        """Complete blocks of a layer that is not on the device."""
        return self.max_tokens // self.block_tokens

    def block_shape(self, shape: CacheShape) -> BlockShape:
        """Shape of one block of a cache of this shape."""
        return BlockShape(
            num_kv_heads=shape.num_kv_heads, num_tokens=self.block_tokens, head_dim=shape.head_dim, dtype=shape.dtype
        )

    @property
    def num_groups(self) -> int:
        """Groups of tokens that the retrieval cache sees as a summary; 0 without it."""
        return 0 if self.retrieval is None else groups_within(self.capacity, self.retrieval.summary_tokens)


@dataclass(kw_only=True, frozen=True, slots=True)
class PlanInput:
    """Models, tokens and levels to plan for, and the memory that there is."""

    target_shape: CacheShape
    target_weight_bytes: int
    hidden_bytes_per_token: int = 0
    max_tokens: int
    """Prompt and generated tokens."""
    slack_tokens: int
    """Tentative tokens on top of them, of one round."""
    piece_tokens: int
    """Tokens of the prompt that pass through a layer together."""
    retrieval: RetrievalSizes | None = None
    """None: there is no retrieval level."""
    streaming: StreamingSizes | None = None
    """None: there is no model that drafts."""
    drafter_shape: CacheShape | None = None
    drafter_weight_bytes: int = 0
    activation_bytes: int = 0
    device_free_bytes: int
    host_free_bytes: int
    disk_free_bytes: int = 0
    checks_host: bool = False
    """Blocks on the host have checksums, and reach a device through buffers, as those on disk do."""
    device_is_host: bool
    """No GPU: both tiers share one memory."""
