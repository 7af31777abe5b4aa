"""Level 3: the full cache. Layers on the device are plain tensors; those on host or disk stream through it in blocks.

What a layer in blocks consists of, and how it gives chunks to the retrieval cache: tiers.block_layer.

A prompt is read layer by layer (`prefill`): while the pieces of the prompt pass through a layer, its keys and
values are all on the device; those of a layer in blocks leave for their tier behind the computation, once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import chain
from typing import Protocol

import torch

from tiers.base import BlockSource, Segment, oldest_seen
from tiers.block_writer import BlockWriter
from tiers.collection import Collection
from tiers.device_layer import DeviceLayer, LayerPrefill
from tiers.transfer import BlockStreamer, StreamStats

READ_TOKENS = 1024
"""Tokens that whoever reads a whole cache reads at once: few, so that what is needed on the device stays small."""


class CacheLayer(Protocol):
    """One layer of the full cache, wherever its keys and values are: a DeviceLayer or a BlockLayer.

    Positions count tokens of the sequence; `first_seen` is that of the oldest key that a pass sees.
    """

    is_in_blocks: bool
    """Whether its older tokens are in blocks off the device."""

    def append(self, length: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Writes keys and values [H, T, D] behind the first `length` tokens."""

    def stream_sources(self, first_seen: int) -> list[BlockSource]:
        """Sources of the blocks that a pass takes from the streamer for this layer."""

    def segments(
        self, first_seen: int, end: int, num_new: int, streamer: BlockStreamer | None, collection: Collection | None
    ) -> Iterator[Segment]:
        """Yields tokens up to `end`, of which the last `num_new` are new; `collection` sees what passes."""

    def collection(self, chunk_ids: torch.Tensor, chunk_size: int, out: torch.Tensor) -> Collection | None:
        """Copies these chunks to `out` as the next pass goes by; None where `gather` gives them without a copy."""

    def truncate(self, length: int) -> None:
        """Rolls back to the first `length` tokens."""

    def read(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [H, end - start, D] of these tokens, on the device."""

    def gather(self, chunk_ids: torch.Tensor, chunk_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [H, m * chunk_size, D] of the chunks `chunk_ids` [H, m], on the device."""

    def prefill(self, window: int | None, space: DeviceLayer | None, writer: BlockWriter | None) -> LayerPrefill:
        """The cache that pieces of a prompt are read into; a layer in blocks needs a `space` and a `writer`."""


class FullCache:
    """The target's whole cache; a tiers.base.KVCache.

    `windows[layer]` is the layer's sliding window in tokens, or None: blocks that lie before it are not streamed.
    Layers in blocks need a `streamer`, and to read a prompt a `writer` and `make_space`, which gives a layer on the
    device for as many tokens as a prompt has, and takes it back.
    """

    def __init__(
        self,
        layers: Sequence[CacheLayer],
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
            if self.layers_in_blocks:
                assert self._make_space is not None, "layers in blocks, and no space to read a prompt into"
                space = stack.enter_context(self._make_space(num_tokens))

            def prefill_layer(layer: int) -> LayerPrefill:
                return self._layers[layer].prefill(self._windows[layer], space, self._writer)

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
            sources = (layer.stream_sources(self._first_seen(number)) for number, layer in enumerate(self._layers))
            self._streamer.begin(list(chain.from_iterable(sources)))

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        self._layers[layer].append(self.length, k, v)

    def segments(self, layer: int) -> Iterator[Segment]:
        end, collection = self.length + self._num_new, self._collections.get(layer)
        first_seen = self._first_seen(layer)
        return self._layers[layer].segments(first_seen, end, self._num_new, self._streamer, collection)

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
        for layer in self._layers:
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
        collection = self._layers[layer].collection(chunk_ids, chunk_size, out)
        assert collection is not None, f"layer {layer} is not in blocks"
        self._collections[layer] = collection

    def drop_collections(self) -> None:
        """Forgets what `collect` asked for: the next pass copies no chunks."""
        self._collections.clear()

    @property
    def has_collected(self) -> bool:
        """Whether a pass has copied chunks of all layers in blocks."""
        collections = [self._collections.get(layer) for layer in self.layers_in_blocks]
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
        return [number for number, layer in enumerate(self._layers) if layer.is_in_blocks]

    def _first_seen(self, layer: int) -> int:
        """Position of the oldest key that the first new token sees."""
        return oldest_seen(self.length, self._windows[layer])
