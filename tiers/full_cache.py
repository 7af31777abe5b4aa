"""Level 3: the full cache. Layers on the device are plain tensors; those on host or disk stream through it in blocks.

What a layer in blocks consists of, and how it gives chunks to the retrieval cache: tiers.block_layer.

A prompt is read layer by layer (`prefill`): while the pieces of the prompt pass through a layer, its keys and
values are all on the device; those of a layer in blocks leave for their tier behind the computation, once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch

from tiers.base import BlockSource, Segment, oldest_seen
from tiers.block_layer import BlockLayer, Collection
from tiers.block_writer import BlockWriter
from tiers.device_layer import DeviceLayer
from tiers.transfer import BlockStreamer, StreamStats

READ_TOKENS = 1024
"""Tokens that whoever reads a whole cache reads at once: few, so that what is needed on the device stays small."""


class LayerPrefill:
    """A layer's keys and values while the pieces of a prompt pass through it; see tiers.base.KVCache.

    `space` holds all of them. `window` is the layer's sliding window in tokens, or None.
    """

    def __init__(self, space: DeviceLayer, window: int | None):
        self._space, self._window = space, window
        self.length = self._num_new = 0

    def begin(self, num_new: int) -> None:
        self._num_new = num_new

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        self._space.append(self.length, k, v)

    def segments(self, layer: int) -> Iterator[Segment]:
        first = oldest_seen(self.length, self._window)
        yield self._space.segment(first, self.length + self._num_new, self._num_new)

    def end(self) -> None:
        self.length += self._num_new

    def abort(self) -> None:
        """Does nothing: a prompt that could not be read leaves the whole cache to be reset."""

    def finish(self) -> None:
        """Ends the layer, all pieces of whose prompt were read: `space` may be used again."""


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


class FullCache:
    """The target's whole cache; a tiers.base.KVCache.

    `windows[layer]` is the layer's sliding window in tokens, or None: blocks that lie before it are not streamed.
    Layers in blocks need a `streamer`, and to read a prompt a `writer` and `make_space`, which gives a layer on the
    device for as many tokens as a prompt has, and takes it back.
    """

    def __init__(
        self,
        layers: Sequence[DeviceLayer | BlockLayer],
        windows: list[int | None],
        streamer: BlockStreamer | None = None,
        writer: BlockWriter | None = None,
        make_space: Callable[[int], AbstractContextManager[DeviceLayer]] | None = None,
    ):
        self._layers, self._windows, self._streamer = layers, windows, streamer
        self._writer, self._make_space = writer, make_space
        self._collections: dict[int, Collection] = {}
        self.length = self._num_new = 0

    @contextmanager
    def prefill(self, num_tokens: int) -> Iterator[Callable[[int], LayerPrefill]]:
        """Gives a function from a layer's number to the cache that the pieces of the prompt are to be read into.

        The whole cache is emptied first, and holds the prompt's `num_tokens` in the end; it is empty if that failed.
        """
        self.reset()
        with ExitStack() as stack:
            space = None
            if self._block_layers():
                assert self._make_space is not None, "layers in blocks, and no space to read a prompt into"
                space = stack.enter_context(self._make_space(num_tokens))

            def prefill_layer(layer: int) -> LayerPrefill:
                store, window = self._layers[layer], self._windows[layer]
                if isinstance(store, DeviceLayer):
                    return LayerPrefill(store, window)
                assert space is not None and self._writer is not None, "a layer in blocks, and no writer"
                return BlockLayerPrefill(space, window, store, self._writer)

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
            self._streamer.begin(self._blocks())

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        self._layers[layer].append(self.length, k, v)

    def segments(self, layer: int) -> Iterator[Segment]:
        store, end = self._layers[layer], self.length + self._num_new
        if isinstance(store, DeviceLayer):
            yield store.segment(self._first_seen(layer), end, self._num_new)
            return
        assert self._streamer is not None, "a layer in blocks, and no streamer"
        first = self._first_block(layer, store)
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
        """Asks the next pass to copy these chunks of a layer in blocks, whose tokens are final; see Collection."""
        self._collections[layer] = Collection(chunk_ids, chunk_size, self._block_layers()[layer].block_tokens, out)

    def drop_collections(self) -> None:
        """Forgets what `collect` asked for: the next pass copies no chunks."""
        self._collections.clear()

    @property
    def has_collected(self) -> bool:
        """Whether a pass has copied chunks of all layers in blocks."""
        collections = [self._collections.get(layer) for layer in self._block_layers()]
        return all(collection is not None and collection.is_complete for collection in collections)

    def collected(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, as of `gather`, of the chunks that the last pass copied; valid until the next pass."""
        return self._collections.pop(layer).result()

    @property
    def stream_stats(self) -> StreamStats:
        """Counts of what was streamed since the cache was made."""
        return StreamStats() if self._streamer is None else self._streamer.stats

    def close(self) -> None:
        """Ends the threads that copy."""
        if self._streamer is not None:
            self._streamer.close()
        if self._writer is not None:
            self._writer.close()

    @property
    def layers_in_blocks(self) -> list[int]:
        """Numbers of the layers that are not on the device."""
        return list(self._block_layers())

    def _block_layers(self) -> dict[int, BlockLayer]:
        """The layers in blocks, by their numbers."""
        return {number: layer for number, layer in enumerate(self._layers) if isinstance(layer, BlockLayer)}

    def _first_seen(self, layer: int) -> int:
        """Position of the oldest key that the first new token sees."""
        return oldest_seen(self.length, self._windows[layer])

    def _first_block(self, layer: int, store: BlockLayer) -> int:
        """Number of the first block of layer `layer` that the first new token sees."""
        return min(self._first_seen(layer) // store.block_tokens, store.num_blocks)

    def _blocks(self) -> list[BlockSource]:
        """The blocks that a pass will stream, of all layers in turn."""
        layers = self._block_layers().items()
        return [block for layer, store in layers for block in store.stream_sources(self._first_block(layer, store))]
