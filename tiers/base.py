"""The words of this folder: what a tier gives, what a cache holds, how many bytes that takes. Loads without CUDA.

Shape letters everywhere in tiers/ and workers/attention/:
    H kv heads   G query heads of one kv head   T new tokens   N keys   D head dimension   B tokens of a block
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

QUANTUM = 64
"""Growing segments are padded to a multiple of so many keys: matrix libraries prepare a kernel for each new shape, at
0.5 ms each (oneDNN, bf16), which costs as much as the attention itself where every step has one key more."""


PAGE_BYTES = 4096
"""Bytes of which offsets, lengths and addresses of direct reads from a disk are multiples."""


def padded(num_tokens: int) -> int:
    """The next multiple of QUANTUM tokens."""
    return -(-num_tokens // QUANTUM) * QUANTUM


def oldest_seen(position: int, window: int | None) -> int:
    """Position of the oldest key that the token at `position` sees through a sliding `window`, in tokens, or None."""
    return 0 if window is None else max(0, position - window + 1)


def padded_to_pages(num_bytes: int) -> int:
    """Bytes that a block of `num_bytes` takes in a file: whole pages."""
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES


@dataclass(kw_only=True, frozen=True, slots=True)
class CacheShape:
    """Shape of one token's keys and values in all layers of a model."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def bytes_per_token_and_layer(self) -> int:
        """Bytes of one token's keys and values in one layer."""
        return 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return self.num_layers * self.bytes_per_token_and_layer


@dataclass(kw_only=True, frozen=True, slots=True)
class BlockShape:
    """Keys and values of one layer for `num_tokens` consecutive tokens, stored and streamed as one piece."""

    num_kv_heads: int
    num_tokens: int
    head_dim: int
    dtype: torch.dtype

    @property
    def size(self) -> tuple[int, int, int, int]:
        """Size [2, H, B, D] of the tensor: keys, then values."""
        return 2, self.num_kv_heads, self.num_tokens, self.head_dim

    @property
    def num_bytes(self) -> int:
        """Bytes of the block's keys and values."""
        return 2 * self.num_kv_heads * self.num_tokens * self.head_dim * self.dtype.itemsize


class Tier(Protocol):
    """A kind of memory. Tensors come from `allocate`, uninitialised, and count until `free`."""

    name: str
    used_bytes: int
    peak_bytes: int

    def allocate(self, *size: int, dtype: torch.dtype) -> torch.Tensor:
        """A tensor of `size`, its values undefined. Raises OutOfTierMemoryError."""

    def free(self, tensor: torch.Tensor) -> None:
        """Counts the tensor's bytes as given back."""


class BlockSource(Protocol):
    """Source of a streamed block."""

    @property
    def nbytes(self) -> int:
        """Bytes of the block's keys and values."""

    @property
    def memory(self) -> torch.Tensor | None:
        """The block itself, where it lies in memory of the host and is not checked as it is read; else None."""

    def read_into(self, buffer: torch.Tensor) -> None:
        """Fills `buffer`, on the host. Raises DamagedBlockError."""


@dataclass(frozen=True, slots=True)
class BlockInMemory:
    """A BlockSource that copies from `memory` on the host."""

    memory: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the block's keys and values."""
        return self.memory.nbytes

    def read_into(self, buffer: torch.Tensor) -> None:
        """Fills `buffer`, on the host."""
        buffer.copy_(self.memory)


class BlockStore(Protocol):
    """The complete blocks of one layer in a tier off the device."""

    shape: BlockShape

    def write(self, index: int, rows: torch.Tensor) -> None:
        """Stores `rows` [2, H, B, D], of any device, as block `index`."""

    def source(self, index: int) -> BlockSource:
        """Source from which a streamer copies block `index`."""

    def read(self, index: int, begin: int, end: int) -> torch.Tensor:
        """Tokens `begin` to `end` of block `index`, [2, H, end - begin, D], on the host. Raises DamagedBlockError."""

    def gather(self, heads: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Keys and values [2, n, D] on the host: of head `heads[i]` the token at position `tokens[i]`.

        Raises DamagedBlockError.
        """


@dataclass(slots=True)
class Segment:
    """Some keys and values of one layer, on the device, [H, N, D] each.

    `start` is the position of the first key where they are contiguous; else `positions` [H, N] has one for each.
    The last `num_new` keys belong to the tokens being read now, which see each other causally. Behind them come
    `num_pad` slots of no meaning but finite: with them the number of keys takes few values (see QUANTUM).
    `bias` [H, N] is added to the scores of every query: the logarithm of how many tokens a key stands for.
    `hidden` [1 or H, T, N], true where a new token must not see a key, stands for all that: positions do not matter.
    """

    k: torch.Tensor
    v: torch.Tensor
    start: int | None = None
    positions: torch.Tensor | None = None
    num_new: int = 0
    num_pad: int = 0
    bias: torch.Tensor | None = None
    hidden: torch.Tensor | None = None


class PassCache(Protocol):
    """A cache as a forward pass uses it.

    A pass over T new tokens calls `begin(T)`, then for each layer `append` and `segments`, then `end()`, with which the
    tokens count. The segments of a layer cover what the level sees, the new tokens in the last of them.
    """

    def begin(self, num_new: int) -> None:
        """Begins a forward pass over `num_new` tokens."""

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Takes keys and values [H, T, D] of the new tokens."""

    def segments(self, layer: int) -> Iterator[Segment]:
        """Yields what the level sees of a layer; a segment is valid until the next one is asked for."""

    def end(self) -> None:
        """Ends the pass: from now on its tokens count."""

    def abort(self) -> None:
        """Undoes a pass that failed, as if it had not begun."""


class KVCache(PassCache, Protocol):
    """Keys and values of a sequence's first `length` tokens, or of some of them: what every level's cache can do."""

    @property
    def length(self) -> int:
        """Number of tokens that count: the position of the next one."""

    def truncate(self, length: int) -> None:
        """Rolls back to the first `length` tokens."""

    def reset(self) -> None:
        """Empties it: the same as a new one."""


def page_aligned(num_bytes: int) -> torch.Tensor:
    """Bytes in ordinary memory that begin at a page: a disk is read straight into them."""
    memory = torch.empty(num_bytes + PAGE_BYTES, dtype=torch.uint8)
    first = -memory.data_ptr() % PAGE_BYTES
    return memory[first : first + num_bytes]


def gather_chunks(rows: torch.Tensor, chunk_ids: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """Rows [H, m * chunk_size, D] of the chunks of `rows` [H, N, D] that `chunk_ids` [H, m] choose per head."""
    tokens = tokens_of_chunks(chunk_ids, chunk_size)
    return rows.gather(1, tokens[..., None].expand(-1, -1, rows.shape[-1]))


def tokens_of_chunks(chunk_ids: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """Positions [H, m * chunk_size] of the tokens of the chunks `chunk_ids` [H, m]."""
    return (chunk_ids[..., None] * chunk_size + torch.arange(chunk_size, device=chunk_ids.device)).flatten(1)
