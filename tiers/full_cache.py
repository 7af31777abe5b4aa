"""Level 3: the full cache. Layers on the device are plain tensors; layers on the host stream through it in blocks.

A host layer of `length` tokens:

    tokens              where                                              who writes
    [0, n * B)          n blocks [2, H, B, D] of host memory, complete     flush: once, when its tokens are final
    [n * B, length)     the tail [2, H, B + 2 * slack, D] on the device    append; truncate drops from its end

A block is one contiguous copy. Only the tail is ever written in small pieces, and roll back touches nothing else,
but for a truncation deep into the past, which reads a block back.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tiers.base import CacheShape, Segment, Tier, gather_chunks, padded
from tiers.transfer import StreamStats


class DeviceLayer:
    """Keys and values of one layer on the device: one segment [H, capacity, D] each, padded."""

    def __init__(self, shape: CacheShape, capacity: int, tier: Tier):
        self._kv = tier.allocate(2, shape.num_kv_heads, padded(capacity), shape.head_dim, dtype=shape.dtype).zero_()

    def append(self, length: int, k: torch.Tensor, v: torch.Tensor) -> None:
        end = length + k.shape[1]
        assert end <= self._kv.shape[2], f"{length} + {k.shape[1]} tokens exceed the capacity {self._kv.shape[2]}"
        self._kv[0, :, length:end] = k
        self._kv[1, :, length:end] = v

    def read(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [H, end - start, D] of these tokens; views."""
        return self._kv[0, :, start:end], self._kv[1, :, start:end]

    def segment(self, start: int, end: int, num_new: int) -> Segment:
        """Tokens from `start` on to `end`, the last `num_new` of them new, and padding."""
        stop = min(start + padded(end - start), self._kv.shape[2])
        k, v = self.read(start, stop)
        return Segment(k, v, start=start, num_new=num_new, num_pad=stop - end)

    def gather(self, chunk_ids: torch.Tensor, chunk_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the chunks `chunk_ids` [H, m]."""
        k, v = (gather_chunks(rows, chunk_ids, chunk_size) for rows in self._kv)
        return k, v


class HostLayer:
    """Keys and values of one layer in blocks on the host, the newest in a tail on the device."""

    def __init__(
        self, shape: CacheShape, capacity: int, block_tokens: int, slack: int, host_tier: Tier, device_tier: Tier
    ):
        heads, dim, dtype = shape.num_kv_heads, shape.head_dim, shape.dtype
        self._block_tokens, self._slack = block_tokens, slack
        self.blocks = host_tier.allocate(capacity // block_tokens, 2, heads, block_tokens, dim, dtype=dtype)
        self.num_blocks = 0
        self._tail = device_tier.allocate(2, heads, padded(block_tokens + 2 * slack), dim, dtype=dtype).zero_()
        self._piece: torch.Tensor | None = None

    @property
    def tail_start(self) -> int:
        """Position of the first token that is not in a block."""
        return self.num_blocks * self._block_tokens

    def append(self, length: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """A few tokens go to the tail; a long piece, which comes in prefill alone, is final and goes into blocks."""
        held, num_new = length - self.tail_start, k.shape[1]
        if held + num_new <= self._tail.shape[2]:
            self._tail[0, :, held : held + num_new] = k
            self._tail[1, :, held : held + num_new] = v
        else:
            self._piece = torch.cat([self._tail[:, :, :held], torch.stack([k, v])], dim=2)

    def segment(self, end: int, num_new: int) -> Segment:
        """Tokens from `tail_start` on to `end`, the last `num_new` of them new, and padding."""
        if self._piece is not None:
            return Segment(*self._piece, start=self.tail_start, num_new=num_new)
        num_tokens = end - self.tail_start
        k, v = self._tail[:, :, : padded(num_tokens)]
        return Segment(k, v, start=self.tail_start, num_new=num_new, num_pad=k.shape[1] - num_tokens)

    def settle(self, length: int) -> None:
        """Moves complete blocks to the host: after a piece, or when the tail has one that no roll back reaches."""
        newest = self._tail[:, :, : length - self.tail_start] if self._piece is None else self._piece
        # What may be rolled back stays in the tail; all of a piece is final.
        num_final = newest.shape[2] - (self._slack if self._piece is None else 0)
        num_flushed = max(0, num_final) // self._block_tokens
        for index in range(num_flushed):
            rows = newest[:, :, index * self._block_tokens : (index + 1) * self._block_tokens]
            self.blocks[self.num_blocks].copy_(rows, non_blocking=True)
            self.num_blocks += 1
        if num_flushed:
            rest = newest[:, :, num_flushed * self._block_tokens :]
            # The two may overlap, and the copies to the host above are queued before this on the same stream.
            self._tail[:, :, : rest.shape[2]] = rest.clone()
        self._piece = None

    def truncate(self, length: int) -> None:
        self._piece = None
        if length >= self.tail_start:
            return
        self.num_blocks = length // self._block_tokens
        kept = length - self.tail_start
        if kept:
            self._synchronize()
            self._tail[:, :, :kept] = self.blocks[self.num_blocks][:, :, :kept].to(self._tail.device)

    def read(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [H, end - start, D] of these tokens on the device; a copy where blocks are touched."""
        first = max(start, self.tail_start) - self.tail_start
        pieces = [self._tail[:, :, first : end - self.tail_start]] if end > self.tail_start else []
        at = min(end, self.tail_start)
        while at > start:
            block, begin = (
                (at - 1) // self._block_tokens,
                max(start, (at - 1) // self._block_tokens * self._block_tokens),
            )
            self._synchronize()
            offset = block * self._block_tokens
            pieces.insert(0, self.blocks[block][:, :, begin - offset : at - offset].to(self._tail.device))
            at = begin
        kv = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)
        return kv[0], kv[1]

    def gather(self, chunk_ids: torch.Tensor, chunk_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the chunks `chunk_ids` [H, m], gathered on the host and copied in one piece.

        A chunk of the tail, or one that reaches into it, is read from the tail.
        """
        self._synchronize()
        heads, dim, device = chunk_ids.shape[0], self._tail.shape[-1], self._tail.device
        tokens = (chunk_ids[..., None] * chunk_size + torch.arange(chunk_size, device=device)).flatten(1)
        on_host = tokens < self.tail_start
        kv = torch.empty(2, *tokens.shape, dim, dtype=self._tail.dtype, device=device)
        head_ids = torch.arange(heads, device=device)[:, None].expand_as(tokens)
        host_tokens, host_heads = tokens[on_host].cpu(), head_ids[on_host].cpu()
        block, offset = host_tokens // self._block_tokens, host_tokens % self._block_tokens
        tail_tokens = tokens[~on_host] - self.tail_start
        for side in (0, 1):
            kv[side][on_host] = self.blocks[block, side, host_heads, offset].to(device)
            kv[side][~on_host] = self._tail[side][head_ids[~on_host], tail_tokens]
        return kv[0], kv[1]

    def _synchronize(self) -> None:
        """The processor reads what the device wrote."""
        if self._tail.device.type == "cuda":
            torch.cuda.current_stream(self._tail.device).synchronize()


class FullCache:
    """The target's whole cache; see tiers.base.KVCache. `streamer` is None where no layer is on the host.

    `windows[layer]` is the layer's sliding window in tokens, or None: blocks that lie before it are not streamed.
    """

    def __init__(self, layers: list[DeviceLayer | HostLayer], windows: list[int | None], streamer):
        self._layers, self._windows, self._streamer = layers, windows, streamer
        self.length = self._num_new = 0

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
        for index, block in enumerate(self._streamer.take(store.num_blocks - first), start=first):
            yield Segment(block[0], block[1], start=index * block.shape[2])
        yield store.segment(end, self._num_new)
        store.settle(end)

    def end(self) -> None:
        self.length += self._num_new

    def abort(self) -> None:
        if self._streamer is not None:
            self._streamer.cancel()
        self.truncate(self.length)

    def truncate(self, length: int) -> None:
        assert 0 <= length <= self.length, f"truncate to {length} of {self.length} tokens"
        self.length = length
        for layer in self._host_layers():
            layer.truncate(length)

    def reset(self) -> None:
        self.truncate(0)

    def read(self, layer: int, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [H, end - start, D] of these tokens, on the device."""
        assert 0 <= start < end <= self.length, f"read [{start}, {end}) of {self.length} tokens"
        return self._layers[layer].read(start, end)

    def gather(self, layer: int, chunk_ids: torch.Tensor, chunk_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [H, m * chunk_size, D] of complete chunks, chosen per head by `chunk_ids` [H, m]."""
        return self._layers[layer].gather(chunk_ids, chunk_size)

    @property
    def stream_stats(self) -> StreamStats:
        return StreamStats() if self._streamer is None else self._streamer.stats

    def close(self) -> None:
        if self._streamer is not None:
            self._streamer.close()

    def _host_layers(self) -> list[HostLayer]:
        return [layer for layer in self._layers if isinstance(layer, HostLayer)]

    def _first_seen(self, layer: int) -> int:
        """Position of the oldest key that the first new token sees."""
        window = self._windows[layer]
        return 0 if window is None else max(0, self.length - window + 1)

    def _first_block(self, layer: int) -> int:
        store = self._layers[layer]
        return min(self._first_seen(layer) // store._block_tokens, store.num_blocks)

    def _blocks(self, layer: int) -> list[torch.Tensor]:
        """The blocks that a pass will stream for this layer."""
        store = self._layers[layer]
        if isinstance(store, DeviceLayer):
            return []
        return list(store.blocks[self._first_block(layer) : store.num_blocks])
