"""Level 3: the full cache. Layers on the device are plain tensors; those on host or disk stream through it in blocks.

A layer in blocks, of `length` tokens:

    tokens              where                                              who writes
    [0, n * B)          n complete blocks [2, H, B, D] in their tier       once, when its tokens are final
    [n * B, length)     the tail [2, H, B + 2 * slack, D] on the device    append; truncate drops from its end

A block is one contiguous copy. Only the tail is ever written in small pieces, and roll back touches nothing else,
but for a truncation deep into the past, which reads a block back.

Chunks that the retrieval cache wants of a layer in blocks are copied as its blocks pass (`collect`): fetched for that
alone they would take the link's time, and from disk nearly as many bytes as the pass itself.

A prompt is read layer by layer (`prefill`): while the pieces of the prompt pass through a layer, its keys and
values are all on the device; those of a layer in blocks leave for their tier behind the computation, once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial

import torch

from tiers.base import BlockStore, CacheShape, Segment, Tier, gather_chunks, padded, tokens_of_chunks
from tiers.transfer import AS_FAST_AS_IT_IS, BlockWriter, Link, StreamStats


class DeviceLayer:
    """Keys and values of one layer on the device: one segment [H, capacity, D] each, padded."""

    def __init__(self, shape: CacheShape, capacity: int, tier: Tier):
        self.kv = tier.allocate(2, shape.num_kv_heads, padded(capacity), shape.head_dim, dtype=shape.dtype).zero_()

    def append(self, length: int, k: torch.Tensor, v: torch.Tensor) -> None:
        end = length + k.shape[1]
        assert end <= self.kv.shape[2], f"{length} + {k.shape[1]} tokens exceed the capacity {self.kv.shape[2]}"
        self.kv[0, :, length:end] = k
        self.kv[1, :, length:end] = v

    def read(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [H, end - start, D] of these tokens; views."""
        return self.kv[0, :, start:end], self.kv[1, :, start:end]

    def segment(self, start: int, end: int, num_new: int) -> Segment:
        """Tokens from `start` on to `end`, the last `num_new` of them new, and padding."""
        stop = min(start + padded(end - start), self.kv.shape[2])
        k, v = self.read(start, stop)
        return Segment(k, v, start=start, num_new=num_new, num_pad=stop - end)

    def gather(self, chunk_ids: torch.Tensor, chunk_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the chunks `chunk_ids` [H, m]."""
        k, v = (gather_chunks(rows, chunk_ids, chunk_size) for rows in self.kv)
        return k, v


class BlockLayer:
    """Keys and values of one layer in blocks off the device, the newest in a tail on the device."""

    def __init__(
        self, shape: CacheShape, store: BlockStore, slack: int, device_tier: Tier, link: Link = AS_FAST_AS_IT_IS
    ):
        self.block_tokens = store.shape.num_tokens
        self._store, self._slack, self._link = store, slack, link
        size = (2, shape.num_kv_heads, padded(self.block_tokens + 2 * slack), shape.head_dim)
        self._tail = device_tier.allocate(*size, dtype=shape.dtype).zero_()
        self.num_blocks = 0

    @property
    def tail_start(self) -> int:
        """Position of the first token that is not in a block."""
        return self.num_blocks * self.block_tokens

    def append(self, length: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """A few tokens; a prompt comes by `store_prompt`."""
        held, num_new = length - self.tail_start, k.shape[1]
        assert held + num_new <= self._tail.shape[2], (
            f"{held} + {num_new} tokens exceed the tail of {self._tail.shape[2]}"
        )
        self._tail[0, :, held : held + num_new] = k
        self._tail[1, :, held : held + num_new] = v

    def segment(self, end: int, num_new: int) -> Segment:
        """Tokens from `tail_start` on to `end`, the last `num_new` of them new, and padding."""
        num_tokens = end - self.tail_start
        k, v = self._tail[:, :, : padded(num_tokens)]
        return Segment(k, v, start=self.tail_start, num_new=num_new, num_pad=k.shape[1] - num_tokens)

    def settle(self, length: int) -> None:
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
        """The prompt's first `length` tokens are in `kv` [2, H, N, D]: `writer` gets the complete blocks among them."""
        while self.tail_start + self.block_tokens <= length:
            write, index = self._store.write, self.num_blocks
            writer.submit(partial(write, index, self._block_of(kv, index)))
            self.num_blocks += 1

    def finish_prompt(self, kv: torch.Tensor, length: int) -> None:
        """All complete blocks were stored; the rest goes to the tail."""
        rest = kv[:, :, self.tail_start : length]
        self._tail[:, :, : rest.shape[2]] = rest

    def truncate(self, length: int) -> None:
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
        """Keys and values of the chunks `chunk_ids` [H, m], gathered on the host and copied in one piece.

        What of a chunk lies in the tail is read from there.
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

    def collect_tail(self, collection: Collection) -> None:
        """See Collection.take_tail."""
        collection.take_tail(self.num_blocks, self._tail)

    def stream_sources(self, first: int) -> list:
        """What a streamer takes for the blocks from `first` on."""
        return [self._store.source(index) for index in range(first, self.num_blocks)]

    def _read_block(self, index: int, begin: int, end: int) -> torch.Tensor:
        self._synchronize()
        return self._store.read(index, begin, end)

    def _to_device(self, rows: torch.Tensor) -> torch.Tensor:
        began = time.perf_counter()
        moved = rows.to(self._tail.device)
        self._link.pace(began, rows.nbytes)
        return moved

    def _synchronize(self) -> None:
        """The processor reads what the device wrote."""
        if self._tail.device.type == "cuda":
            torch.cuda.current_stream(self._tail.device).synchronize()


class Collection:
    """Chunks wanted of a layer in blocks, `chunk_ids` [H, m]; they are copied on the device as the blocks pass.

    To `out` [2, >= H * m * chunk_size, D]. Tokens that do not pass, because no query sees them any more through the
    layer's sliding window, are left as they are there: finite, but without meaning.
    """

    def __init__(self, chunk_ids: torch.Tensor, chunk_size: int, block_tokens: int, out: torch.Tensor):
        tokens = tokens_of_chunks(chunk_ids, chunk_size)
        heads = torch.arange(tokens.shape[0], device=tokens.device)[:, None].expand_as(tokens).flatten()
        self._kv = out[:, : tokens.numel()]
        self._size = (2, *tokens.shape, out.shape[-1])
        self._slots = tokens.flatten().argsort()
        self._heads, self._tokens = heads[self._slots], tokens.flatten()[self._slots]
        # Of the sorted tokens, how many lie in blocks up to each.
        self._ends = torch.bincount(self._tokens // block_tokens).cumsum(0).tolist()
        self._block_tokens = block_tokens
        self.is_complete = False

    def take_block(self, index: int, block: torch.Tensor) -> None:
        """`block` [2, H, B, D] passes."""
        if index < len(self._ends):
            self._take(self._ends[index - 1] if index else 0, self._ends[index], index * self._block_tokens, block)

    def take_tail(self, num_blocks: int, tail: torch.Tensor) -> None:
        """What is in no block, behind `num_blocks` of them: the last to pass."""
        if self._ends:
            first = self._ends[min(num_blocks, len(self._ends)) - 1] if num_blocks else 0
            self._take(first, self._ends[-1], num_blocks * self._block_tokens, tail)
        self.is_complete = True

    def _take(self, first: int, end: int, start: int, rows: torch.Tensor) -> None:
        if first < end:
            tokens = self._tokens[first:end] - start
            self._kv[:, self._slots[first:end]] = rows[:, self._heads[first:end], tokens]

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [H, m * chunk_size, D], as FullCache.gather gives them."""
        k, v = self._kv.view(self._size)
        return k, v


class LayerPrefill:
    """A layer's keys and values while the pieces of a prompt pass through it; see tiers.base.KVCache.

    `space` holds all of them. Of a layer in blocks, `writer` stores each block behind the computation.
    """

    def __init__(self, space: DeviceLayer, layer: BlockLayer | None, window: int | None, writer: BlockWriter | None):
        self._space, self._layer, self._window, self._writer = space, layer, window, writer
        self.length = self._num_new = 0

    def begin(self, num_new: int) -> None:
        self._num_new = num_new

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        self._space.append(self.length, k, v)

    def segments(self, layer: int) -> Iterator[Segment]:
        first = 0 if self._window is None else max(0, self.length - self._window + 1)
        yield self._space.segment(first, self.length + self._num_new, self._num_new)

    def end(self) -> None:
        self.length += self._num_new
        if self._layer is not None:
            self._layer.store_prompt(self._space.kv, self.length, self._writer)

    def abort(self) -> None:
        """As it is: a prompt that could not be read leaves the whole cache to be reset."""

    def finish(self) -> None:
        """All pieces were read: waits until the blocks are stored, so that `space` may be used again."""
        if self._layer is not None:
            self._writer.drain()
            self._layer.finish_prompt(self._space.kv, self.length)


class FullCache:
    """The target's whole cache; see tiers.base.KVCache.

    `windows[layer]` is the layer's sliding window in tokens, or None: blocks that lie before it are not streamed.
    Layers in blocks need a `streamer`, and to read a prompt a `writer` and `make_space`, which gives a layer on the
    device for as many tokens as a prompt has, and takes it back.
    """

    def __init__(
        self,
        layers: list[DeviceLayer | BlockLayer],
        windows: list[int | None],
        streamer=None,
        writer: BlockWriter | None = None,
        make_space: Callable[[int], AbstractContextManager[DeviceLayer]] | None = None,
    ):
        self._layers, self._windows, self._streamer = layers, windows, streamer
        self._writer, self._make_space = writer, make_space
        self._collections: dict[int, Collection] = {}
        self.length = self._num_new = 0

    @contextmanager
    def prefill(self, num_tokens: int) -> Iterator[Callable[[int], LayerPrefill]]:
        """Within it the function given takes a layer's number: what the pieces of the prompt are to be read into.

        The cache is emptied first, and holds the prompt's `num_tokens` in the end; it is empty if that failed.
        """
        self.reset()
        with ExitStack() as stack:
            space = None
            if any(isinstance(layer, BlockLayer) for layer in self._layers):
                space = stack.enter_context(self._make_space(num_tokens))

            def prefill_layer(layer: int) -> LayerPrefill:
                store, window = self._layers[layer], self._windows[layer]
                if isinstance(store, DeviceLayer):
                    return LayerPrefill(store, None, window, None)
                return LayerPrefill(space, store, window, self._writer)

            try:
                yield prefill_layer
            except BaseException:
                if self._writer is not None:
                    self._writer.cancel()
                self.reset()
                raise
        self.length = num_tokens

    def begin(self, num_new: int) -> None:
        self._num_new = num_new
        if self._streamer is not None:
            self._streamer.begin([block for layer in range(len(self._layers)) for block in self._blocks(layer)])

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        self._layers[layer].append(self.length, k, v)

    def segments(self, layer: int) -> Iterator[Segment]:
        store, end = self._layers[layer], self.length + self._num_new
        if isinstance(store, DeviceLayer):
            yield store.segment(self._first_seen(layer), end, self._num_new)
            return
        first = self._first_block(layer)
        collection = self._collections.get(layer)
        for index, block in enumerate(self._streamer.take(store.num_blocks - first), start=first):
            if collection is not None:
                collection.take_block(index, block)
            yield Segment(block[0], block[1], start=index * block.shape[2])
        if collection is not None:
            store.collect_tail(collection)
        yield store.segment(end, self._num_new)
        store.settle(end)

    def end(self) -> None:
        if self._streamer is not None:
            self._streamer.end()
        self.length += self._num_new

    def abort(self) -> None:
        if self._streamer is not None:
            self._streamer.cancel()
        self.drop_collections()
        self.truncate(self.length)

    def truncate(self, length: int) -> None:
        assert 0 <= length <= self.length, f"truncate to {length} of {self.length} tokens"
        self.length = length
        for layer in self._block_layers().values():
            layer.truncate(length)

    def reset(self) -> None:
        self.truncate(0)
        self.drop_collections()

    def read(self, layer: int, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [H, end - start, D] of these tokens, on the device."""
        assert 0 <= start < end <= self.length, f"read [{start}, {end}) of {self.length} tokens"
        return self._layers[layer].read(start, end)

    def gather(self, layer: int, chunk_ids: torch.Tensor, chunk_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [H, m * chunk_size, D] of complete chunks, chosen per head by `chunk_ids` [H, m]."""
        return self._layers[layer].gather(chunk_ids, chunk_size)

    def collect(self, layer: int, chunk_ids: torch.Tensor, chunk_size: int, out: torch.Tensor) -> None:
        """The next pass is to copy these chunks of a layer in blocks, whose tokens are final; see Collection."""
        self._collections[layer] = Collection(chunk_ids, chunk_size, self._layers[layer].block_tokens, out)

    def drop_collections(self) -> None:
        """The next pass copies no chunks."""
        self._collections.clear()

    @property
    def has_collected(self) -> bool:
        """A pass has copied the chunks of all layers in blocks."""
        collections = [self._collections.get(layer) for layer in self._block_layers()]
        return all(collection is not None and collection.is_complete for collection in collections)

    def collected(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What `gather` would give of the chunks that the last pass copied; valid until the next pass."""
        return self._collections.pop(layer).result()

    @property
    def stream_stats(self) -> StreamStats:
        return StreamStats() if self._streamer is None else self._streamer.stats

    def close(self) -> None:
        for helper in (self._streamer, self._writer):
            if helper is not None:
                helper.close()

    @property
    def layers_in_blocks(self) -> list[int]:
        """Numbers of the layers that are not on the device."""
        return list(self._block_layers())

    def _block_layers(self) -> dict[int, BlockLayer]:
        return {number: layer for number, layer in enumerate(self._layers) if isinstance(layer, BlockLayer)}

    def _first_seen(self, layer: int) -> int:
        """Position of the oldest key that the first new token sees."""
        window = self._windows[layer]
        return 0 if window is None else max(0, self.length - window + 1)

    def _first_block(self, layer: int) -> int:
        store = self._layers[layer]
        return min(self._first_seen(layer) // store.block_tokens, store.num_blocks)

    def _blocks(self, layer: int) -> list:
        """The blocks that a pass will stream for this layer."""
        store = self._layers[layer]
        if isinstance(store, DeviceLayer):
            return []
        return store.stream_sources(self._first_block(layer))
