"""One layer of the full cache whose keys and values are in blocks off the device.

A layer in blocks, of `length` tokens:

    tokens              where                                              who writes
    [0, n * B)          n complete blocks [2, H, B, D] in their tier       once, when its tokens are final
    [n * B, length)     the tail [2, H, B + 2 * slack, D] on the device    append; truncate drops from its end

A block is one contiguous copy. Only the tail is ever written in small pieces, and roll back touches nothing else,
but for a truncation deep into the past, which reads a block back.

Chunks that the retrieval cache wants of a layer in blocks are copied as its blocks pass (tiers.collection): fetched for
that alone they would take the link's time, and from disk nearly as many bytes as the pass itself.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

import torch

from tiers.base import BlockSource, BlockStore, CacheShape, Segment, Tier, padded, tokens_of_chunks
from tiers.block_writer import BlockWriter
from tiers.collection import Collection
from tiers.device_layer import DeviceLayer, LayerPrefill
from tiers.link import AS_FAST_AS_IT_IS, Link
from tiers.transfer import BlockStreamer


def tail_slots(block_tokens: int, slack: int) -> int:
    """Number of tokens that a tail has room for, padded.

    Those of one block, `slack` tentative ones, and as many that a roll back may still reach.
    """
    return padded(block_tokens + 2 * slack)


class BlockLayer:
    """Keys and values of one layer in blocks off the device, the newest in a tail on the device.

    In the full cache it is a tiers.full_cache.CacheLayer.
    """

    is_in_blocks = True

    def __init__(
        self, shape: CacheShape, store: BlockStore, slack: int, device_tier: Tier, link: Link = AS_FAST_AS_IT_IS
    ):
        self.block_tokens = store.shape.num_tokens
        self._store, self._slack, self._link = store, slack, link
        size = (2, shape.num_kv_heads, tail_slots(self.block_tokens, slack), shape.head_dim)
        self._tail = device_tier.allocate(*size, dtype=shape.dtype).zero_()
        self.num_blocks = 0

    @property
    def tail_start(self) -> int:
        """Position of the first token that is not in a block."""
        return self.num_blocks * self.block_tokens

    def append(self, length: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Writes keys and values [H, T, D] of a few tokens behind `length` others; for a prompt see `store_prompt`."""
        held, num_new = length - self.tail_start, k.shape[1]
        assert held + num_new <= self._tail.shape[2], (
            f"{held} + {num_new} tokens exceed the tail of {self._tail.shape[2]}"
        )
        self._tail[0, :, held : held + num_new] = k
        self._tail[1, :, held : held + num_new] = v

    def segments(
        self, first_seen: int, end: int, num_new: int, streamer: BlockStreamer | None, collection: Collection | None
    ) -> Iterator[Segment]:
        """Yields the blocks from the one with token `first_seen` on, as they come, and then the tail."""
        assert streamer is not None, "a layer in blocks, and no streamer"
        first = self._first_block(first_seen)
        for index, block in enumerate(streamer.take(self.num_blocks - first), start=first):
            if collection is not None:
                collection.take_block(index, block)
            yield Segment(block[0], block[1], start=index * self.block_tokens)
        if collection is not None:
            collection.take_tail(self.num_blocks, self._tail)
        yield self._tail_segment(end, num_new)
        self._settle(end)

    def _first_block(self, first_seen: int) -> int:
        """Number of the first block with tokens from position `first_seen` on."""
        return min(first_seen // self.block_tokens, self.num_blocks)

    def _tail_segment(self, end: int, num_new: int) -> Segment:
        """Tokens `tail_start` to `end`, of which the last `num_new` are new, and padding."""
        num_tokens = end - self.tail_start
        k, v = self._tail[:, :, : padded(num_tokens)]
        return Segment(k, v, start=self.tail_start, num_new=num_new, num_pad=k.shape[1] - num_tokens)

    def _settle(self, length: int) -> None:
        """Stores the blocks of the tail that no roll back reaches."""
        newest = self._tail[:, :, : length - self.tail_start]
        num_stored = max(0, newest.shape[2] - self._slack) // self.block_tokens
        for index in range(num_stored):
            self._store.write(self.num_blocks, self._block_of(newest, index))
            self.num_blocks += 1
        if num_stored:
            rest = newest[:, :, num_stored * self.block_tokens :]
            # The two may overlap, and copies to the host above are queued before this on the same stream.
            self._tail[:, :, : rest.shape[2]] = rest.clone()

    def _block_of(self, rows: torch.Tensor, index: int) -> torch.Tensor:
        return rows[:, :, index * self.block_tokens : (index + 1) * self.block_tokens]

    def store_prompt(self, kv: torch.Tensor, length: int, writer: BlockWriter) -> None:
        """Gives `writer` the complete blocks of a prompt whose first `length` tokens are in `kv` [2, H, N, D]."""
        while self.tail_start + self.block_tokens <= length:
            write, index = self._store.write, self.num_blocks
            writer.submit(partial(write, index, self._block_of(kv, index)))
            self.num_blocks += 1

    def finish_prompt(self, kv: torch.Tensor, length: int) -> None:
        """Writes the prompt's tokens behind its complete blocks, which were stored, to the tail."""
        rest = kv[:, :, self.tail_start : length]
        self._tail[:, :, : rest.shape[2]] = rest

    def truncate(self, length: int) -> None:
        """Rolls back to the first `length` tokens."""
        if length >= self.tail_start:
            return
        self.num_blocks = length // self.block_tokens
        kept = length - self.tail_start
        if kept:
            self._tail[:, :, :kept] = self._to_device(self._read_block(self.num_blocks, 0, kept))

    def read(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [H, end - start, D] of these tokens on the device; a copy where blocks are touched."""
        pieces = []
        for index in range(start // self.block_tokens, self.num_blocks):
            first = index * self.block_tokens
            if first >= end:
                break
            begin, stop = max(start - first, 0), min(end - first, self.block_tokens)
            pieces.append(self._to_device(self._read_block(index, begin, stop)))
        if end > self.tail_start:
            pieces.append(self._tail[:, :, max(0, start - self.tail_start) : end - self.tail_start])
        kv = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)
        return kv[0], kv[1]

    def gather(self, chunk_ids: torch.Tensor, chunk_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [H, m * chunk_size, D] of the chunks `chunk_ids` [H, m].

        They are gathered on the host and copied in one piece; what of a chunk lies in the tail is read from there.
        """
        heads, dim, device = chunk_ids.shape[0], self._tail.shape[-1], self._tail.device
        tokens = tokens_of_chunks(chunk_ids, chunk_size)
        is_stored = tokens < self.tail_start
        kv = torch.empty(2, *tokens.shape, dim, dtype=self._tail.dtype, device=device)
        head_ids = torch.arange(heads, device=device)[:, None].expand_as(tokens)
        self._synchronize()
        stored = self._to_device(self._store.gather(head_ids[is_stored].cpu(), tokens[is_stored].cpu()))
        tail_tokens = tokens[~is_stored] - self.tail_start
        for side in (0, 1):
            kv[side][is_stored] = stored[side]
            kv[side][~is_stored] = self._tail[side][head_ids[~is_stored], tail_tokens]
        return kv[0], kv[1]

    def collection(self, chunk_ids: torch.Tensor, chunk_size: int, out: torch.Tensor) -> Collection:
        """Copies these chunks to `out` as the blocks of a pass go by."""
        return Collection(chunk_ids, chunk_size, self.block_tokens, out)

    def stream_sources(self, first_seen: int) -> list[BlockSource]:
        """Sources of the blocks that `segments` takes from the streamer."""
        return [self._store.source(index) for index in range(self._first_block(first_seen), self.num_blocks)]

    def prefill(self, window: int | None, space: DeviceLayer | None, writer: BlockWriter | None) -> LayerPrefill:
        """The cache that pieces of a prompt are read into: `space`, from which `writer` stores the blocks."""
        assert space is not None and writer is not None, "a layer in blocks, and no space to read a prompt into"
        return BlockLayerPrefill(space, window, self, writer)

    def _read_block(self, index: int, begin: int, end: int) -> torch.Tensor:
        self._synchronize()
        return self._store.read(index, begin, end)

    def _to_device(self, rows: torch.Tensor) -> torch.Tensor:
        began = time.perf_counter()
        moved = rows.to(self._tail.device)
        self._link.pace(began, rows.nbytes)
        return moved

    def _synchronize(self) -> None:
        """Waits for the device, so that the processor can read what it wrote."""
        if self._tail.device.type == "cuda":
            torch.cuda.current_stream(self._tail.device).synchronize()


class BlockLayerPrefill(LayerPrefill):
    """A LayerPrefill of a layer in blocks: `writer` stores each block behind the computation."""

    def __init__(self, space: DeviceLayer, window: int | None, layer: BlockLayer, writer: BlockWriter):
        super().__init__(space, window)
        self._layer, self._writer = layer, writer

    def end(self) -> None:
        super().end()
        self._layer.store_prompt(self._space.kv, self.length, self._writer)

    def finish(self) -> None:
        """Waits until the blocks are stored; the rest goes to the layer's tail."""
        self._writer.drain()
        self._layer.finish_prompt(self._space.kv, self.length)
