"""The table of what takes memory: the bytes of each part of a plan, in each tier, from its sizes.

Each part is counted as its owner allocates it; a test builds engines of many shapes and compares every allocation.
"""

from __future__ import annotations

from enum import StrEnum

from tiers.base import PAGE_BYTES, CacheShape, padded, padded_to_pages
from tiers.block_layer import tail_slots
from tiers.planning.sizes import PlanInput, RetrievalSizes, Sizes, TierName
from tiers.quantisation import quantised_bytes
from tiers.retrieval.rule import rule_class


class Part(StrEnum):
    """Something that takes memory, as a plan's table names it."""

    target_weights = "target weights"
    drafter_weights = "drafter weights"
    full_cache = "full cache"
    activations = "activations"
    tails = "full cache tails"
    """Newest tokens of the layers in blocks, on the device."""
    stream_buffers = "stream buffers"
    """Blocks on the device that attention reads as others are copied."""
    staging_buffers = "staging buffers"
    """Page-locked blocks through which those from disk reach a GPU."""
    page_buffers = "page buffers"
    """Blocks on their way to disk and back."""
    hidden_states = "hidden states"
    """Hidden states of a prompt that wait on the host between layers; on the device they are part of the workspace."""
    retrieval_cache = "retrieval cache"
    dequantised_chunks = "dequantised chunks"
    """Chosen chunks of one layer in the model's dtype, as attention reads them."""
    chunk_scores = "chunk scores"
    """Memory of the rule that chooses chunks: something of each."""
    chunks_ahead = "chunks ahead"
    """Keys and values of chunks that were chosen an update ahead."""
    places_of_chunks_ahead = "places of chunks ahead"
    group_means = "means of groups"
    """Mean keys and values of groups of all tokens; the summary of those that are not chosen is made of them."""
    workspace = "workspace"
    """Memory that reading a prompt, or an update of the retrieval cache, takes and gives back."""
    streaming_cache = "streaming cache"


RETRIEVAL_PARTS = (Part.retrieval_cache, Part.dequantised_chunks)
"""Parts on the device that are the retrieval cache's own."""

INDEX_BYTES, POSITION_BYTES, SMALL_POSITION_BYTES, FLOAT_BYTES = 8, 8, 4, 4


def device_parts(inputs: PlanInput, sizes: Sizes) -> dict[Part, int]:
    """Bytes of each part on the device."""
    shape = inputs.target_shape
    parts = {
        Part.target_weights: inputs.target_weight_bytes,
        Part.drafter_weights: inputs.drafter_weight_bytes,
        Part.full_cache: sizes.num_device_layers * padded(sizes.capacity) * shape.bytes_per_token_and_layer,
        Part.activations: inputs.activation_bytes,
    }
    if sizes.num_layers_in_blocks:
        num_slots = tail_slots(sizes.block_tokens, sizes.slack_tokens)
        parts[Part.tails] = sizes.num_layers_in_blocks * num_slots * shape.bytes_per_token_and_layer
        parts[Part.stream_buffers] = sizes.stream_buffers * sizes.block_shape(shape).num_bytes
    if sizes.retrieval is not None:
        parts |= _retrieval_parts(shape, sizes, sizes.retrieval)
    # A layer of the prompt and its hidden states are there in prefill alone, an update in decoding alone.
    parts[Part.workspace] = max(_prefill_bytes(inputs, sizes), _update_bytes(shape, sizes))
    if inputs.drafter_shape is not None and sizes.streaming is not None:
        parts[Part.streaming_cache] = padded(sizes.streaming.num_slots) * inputs.drafter_shape.bytes_per_token
    return parts


def host_parts(inputs: PlanInput, sizes: Sizes) -> dict[Part, int]:
    """Bytes of each part on the host; none where all layers are on the device."""
    if not sizes.num_layers_in_blocks:
        return {}
    block_bytes = sizes.block_shape(inputs.target_shape).num_bytes
    parts = {Part.full_cache: sizes.num_host_layers * sizes.num_blocks * block_bytes}
    if sizes.num_disk_layers:
        # One for the thread that writes blocks and one for that which fetches chunks. Those that stream read straight
        # into the buffers, unless a block does not fill its pages: then each block in flight has one, too.
        in_flight = sizes.stream_buffers if block_bytes % PAGE_BYTES else 0
        parts[Part.page_buffers] = (2 + in_flight) * padded_to_pages(block_bytes)
    if sizes.hidden_tier is TierName.host:
        parts[Part.hidden_states] = _hidden_bytes(inputs, sizes)
    if not inputs.device_is_host:
        parts[Part.staging_buffers] = sizes.stream_buffers * block_bytes if sizes.stages_blocks else 0
    return parts


def disk_parts(inputs: PlanInput, sizes: Sizes) -> dict[Part, int]:
    """Bytes of each part on disk, where blocks begin at pages; none where all layers are on the device."""
    if not sizes.num_layers_in_blocks:
        return {}
    block_bytes = padded_to_pages(sizes.block_shape(inputs.target_shape).num_bytes)
    return {Part.full_cache: sizes.num_disk_layers * sizes.num_blocks * block_bytes}


def _hidden_bytes(inputs: PlanInput, sizes: Sizes) -> int:
    """Hidden states of a whole prompt, or of all tokens when they are read again."""
    return sizes.max_tokens * inputs.hidden_bytes_per_token


# ---- Parts of the retrieval level. ----


def _retrieval_parts(shape: CacheShape, sizes: Sizes, retrieval: RetrievalSizes) -> dict[Part, int]:
    """Bytes of the retrieval cache, and of what chooses and fetches its chunks."""
    parts = {Part.retrieval_cache: _held_bytes(shape, retrieval, retrieval.bits) + _summary_bytes(shape, sizes)}
    if retrieval.bits is not None:
        parts[Part.dequantised_chunks] = padded(retrieval.budget) * shape.bytes_per_token_and_layer
    num_chunks = -(-sizes.capacity // retrieval.chunk_size)
    parts[Part.chunk_scores] = rule_class(retrieval.rule).planned_bytes(shape, num_chunks)
    if sizes.chooses_ahead:
        num_tokens = sizes.num_layers_in_blocks * retrieval.budget
        parts[Part.chunks_ahead] = num_tokens * shape.bytes_per_token_and_layer
        # Of each token its head, its position, and its slot in what is collected.
        parts[Part.places_of_chunks_ahead] = num_tokens * shape.num_kv_heads * 3 * INDEX_BYTES
    if sizes.num_groups:
        # A mean key and value of each group, and of each layer the sums of the group that is not complete.
        begun = _num_heads(shape) * 2 * shape.head_dim * FLOAT_BYTES
        parts[Part.group_means] = sizes.num_groups * shape.bytes_per_token + begun
    return parts


def _held_bytes(shape: CacheShape, retrieval: RetrievalSizes, bits: int | None) -> int:
    """Bytes of chosen chunks, in values of `bits`, and of newer tokens, all with their positions."""
    budget, tail = retrieval.budget, retrieval.tail_tokens
    exact_token_bytes = shape.bytes_per_token + _num_heads(shape) * POSITION_BYTES
    if bits is None:
        return padded(budget + tail) * exact_token_bytes
    chunks = quantised_bytes(shape, budget, bits) + padded(budget) * _num_heads(shape) * SMALL_POSITION_BYTES
    return chunks + padded(tail) * exact_token_bytes


def _summary_bytes(shape: CacheShape, sizes: Sizes) -> int:
    """Bytes of the groups that the retrieval cache sees, each with a bias."""
    return padded(sizes.num_groups) * (shape.bytes_per_token + _num_heads(shape) * FLOAT_BYTES)


def _num_heads(shape: CacheShape) -> int:
    """Number of kv heads of all layers."""
    return shape.num_layers * shape.num_kv_heads


# ---- Parts that pass. ----


def _prefill_bytes(inputs: PlanInput, sizes: Sizes) -> int:
    """Bytes on the device while a prompt is read: of a layer in blocks all keys and values, and hidden states."""
    bytes_of_layer = padded(sizes.max_tokens) * inputs.target_shape.bytes_per_token_and_layer
    of_hidden = _hidden_bytes(inputs, sizes) if sizes.hidden_tier is TierName.device else 0
    return (bytes_of_layer if sizes.num_layers_in_blocks else 0) + of_hidden


def _update_bytes(shape: CacheShape, sizes: Sizes) -> int:
    """Bytes while a rebuild brings one layer: what it brings, unquantised, and as much to put it together.

    Chunks are quantised in fp32, first keys, then values: that is two times as much again.
    """
    if sizes.retrieval is None:
        return 0
    brought = _held_bytes(shape, sizes.retrieval, None) + _summary_bytes(shape, sizes)
    return (2 if sizes.retrieval.bits is None else 4) * brought // shape.num_layers
