"""Every cache in every tier, in one table, and the plain reference that each is compared with.

The tiers of these caches hand out poisoned memory: a slot that is read before it was written shows up as NaN.
Shapes as in tiers/base.py: H kv heads, T new tokens, N keys, D head dimension.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from tiers.base import BlockShape, CacheShape, Segment, padded
from tiers.block_layer import BlockLayer
from tiers.block_writer import BlockWriter
from tiers.device_layer import DeviceLayer
from tiers.device_tier import DeviceTier
from tiers.disk_tier import DiskTier
from tiers.full_cache import FullCache
from tiers.pinned_host_tier import PinnedHostTier
from tiers.quantisation import allocate_quantised, dequantise, quantise
from tiers.quantised_retrieval_cache import make_retrieval_cache
from tiers.retrieval_cache import LayerUpdate, RetrievalCache, RetrievalUpdate
from tiers.streaming_llm_cache import StreamingLLMCache
from tiers.transfer import make_streamer

CPU = torch.device("cpu")
SHAPE = CacheShape(num_layers=2, num_kv_heads=2, head_dim=4, dtype=torch.float32)


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fills it with values that no test writes, and that arithmetic carries on."""
    if tensor.is_floating_point():
        return tensor.fill_(torch.nan)
    return tensor.fill_(-(2**40) if tensor.dtype == torch.int64 else torch.iinfo(tensor.dtype).max)


class PoisonedDeviceTier(DeviceTier):
    """Its memory is poisoned until it is written."""

    def __init__(self):
        super().__init__(CPU)

    def allocate(self, *size, dtype):
        return poison(super().allocate(*size, dtype=dtype))


class PoisonedHostTier(PinnedHostTier):
    """Its memory is poisoned until it is written."""

    def __init__(self):
        super().__init__(pin=False)

    def allocate(self, *size, dtype):
        return poison(super().allocate(*size, dtype=dtype))


def full_cache(
    tiers: str,
    *,
    capacity: int = 96,
    block_tokens: int = 16,
    slack: int = 6,
    windows: list[int | None] | None = None,
    num_buffers: int = 2,
    shape: CacheShape | None = None,
) -> FullCache:
    """A full cache with a layer for each letter of `tiers`: d on the device, h on the host, s on disk."""
    shape = shape or CacheShape(num_layers=len(tiers), num_kv_heads=2, head_dim=4, dtype=torch.float32)
    device_tier, windows = PoisonedDeviceTier(), windows or [None] * len(tiers)
    block = BlockShape(
        num_kv_heads=shape.num_kv_heads, num_tokens=block_tokens, head_dim=shape.head_dim, dtype=shape.dtype
    )
    block_tiers = {"h": PoisonedHostTier(), "s": DiskTier(tempfile.gettempdir())}
    layers = [
        DeviceLayer(shape, capacity + slack, device_tier)
        if letter == "d"
        else BlockLayer(shape, block_tiers[letter].blocks(block, capacity // block_tokens), slack, device_tier)
        for letter in tiers
    ]
    if set(tiers) == {"d"}:
        return FullCache(layers, windows)
    num_threads = 3 if "s" in tiers else 1
    streamer = make_streamer(block.size, shape.dtype, num_buffers, device_tier, CPU, num_threads=num_threads)
    cache = FullCache(layers, windows, streamer, BlockWriter(CPU), partial(space_on, device_tier, shape))
    close_cache = cache.close
    cache.close = lambda: (close_cache(), block_tiers["s"].close())
    return cache


@contextmanager
def space_on(tier, shape: CacheShape, num_tokens: int) -> Iterator[DeviceLayer]:
    """Where a layer of a prompt is while it is read."""
    yield DeviceLayer(shape, num_tokens, tier)


def read_prompt(cache: FullCache, kv: list[tuple[torch.Tensor, torch.Tensor]], piece_tokens: int) -> None:
    """Empties `cache` and reads a prompt of keys and values `kv` [layer] (k, v), layer by layer, in pieces."""
    num_tokens = kv[0][0].shape[1]
    with cache.prefill(num_tokens) as make_layer_cache:
        for layer, (k, v) in enumerate(kv):
            layer_cache = make_layer_cache(layer)
            for start in range(0, num_tokens, piece_tokens):
                k_piece, v_piece = k[:, start : start + piece_tokens], v[:, start : start + piece_tokens]
                layer_cache.begin(k_piece.shape[1])
                layer_cache.append(layer, k_piece, v_piece)
                (segment,) = layer_cache.segments(layer)
                end = segment.k.shape[1] - segment.num_pad
                assert segment.num_new == k_piece.shape[1]
                assert torch.equal(segment.k[:, :end], k[:, segment.start : start + k_piece.shape[1]])
                layer_cache.end()
            layer_cache.finish()


def streaming_llm_cache() -> StreamingLLMCache:
    return StreamingLLMCache(SHAPE, sinks=4, window=80, slack=18, tier=PoisonedDeviceTier())


def retrieval_cache(num_retrieved: int, bits: int | None = None) -> RetrievalCache:
    """Its first chunks are loaded by `prepare`, as the verifier would."""
    sizes = {"budget": num_retrieved, "tail_tokens": 102, "slack": 6}
    return make_retrieval_cache(bits, SHAPE, **sizes, tier=PoisonedDeviceTier())


def rounded(rows: torch.Tensor, bits: int | None) -> torch.Tensor:
    """Rows [H, N, D] as they come back from `bits` a value; None: as they are."""
    num_tokens = rows.shape[1]
    if bits is None or num_tokens == 0:
        return rows
    stored = allocate_quantised(PoisonedDeviceTier(), replace(SHAPE, num_layers=1), num_tokens, bits).part(0, 0)
    out = torch.empty(SHAPE.num_kv_heads, padded(num_tokens), SHAPE.head_dim)
    quantise(rows, stored, bits)
    dequantise(stored, out)
    return out[:, :num_tokens]


@dataclass(frozen=True)
class CacheCase:
    """A row of the table: a cache that holds up to 96 tokens, of which 6 at a time may be tentative."""

    name: str
    make: Callable
    num_layers: int = SHAPE.num_layers
    num_retrieved: int = 0
    bits: int | None = None
    """Of a value of what is retrieved."""

    def new(self) -> tuple[object, Reference]:
        """An empty cache and the reference that goes with it."""
        cache = self.make()
        reference = Reference(self.num_layers)
        self.prepare(cache, reference)
        return cache, reference

    def prepare(self, cache, reference: Reference) -> None:
        """Brings an empty cache, new or reset, to where tokens can be appended."""
        reference.__init__(self.num_layers)
        if self.num_retrieved:
            reference.append(self.num_retrieved, seed=-1)
            positions = torch.arange(self.num_retrieved).expand(SHAPE.num_kv_heads, -1)
            cache.load(
                RetrievalUpdate(
                    is_rebuild=True,
                    start=0,
                    length=self.num_retrieved,
                    layers=[
                        LayerUpdate(*reference.read(layer, 0, self.num_retrieved), positions)
                        for layer in range(self.num_layers)
                    ],
                )
            )
            reference.round(self.num_retrieved, self.bits)


FULL_CACHES = [
    CacheCase("full, device", lambda: full_cache("dd")),
    CacheCase("full, host", lambda: full_cache("hh")),
    CacheCase("full, host and device", lambda: full_cache("hd")),
    CacheCase("full, disk", lambda: full_cache("ss")),
    CacheCase("full, disk and host", lambda: full_cache("sh")),
    CacheCase("full, disk, blocks of whole pages", lambda: full_cache("sd", block_tokens=64, capacity=128)),
    CacheCase("full, device and host", lambda: full_cache("dh")),
    CacheCase("full, host, blocks of one token", lambda: full_cache("hh", block_tokens=1)),
    CacheCase("full, host, no complete block", lambda: full_cache("hh", block_tokens=128)),
    CacheCase("full, host, three buffers", lambda: full_cache("hh", block_tokens=8, num_buffers=3)),
]
RETRIEVAL_CACHES = [
    CacheCase("retrieval, nothing retrieved", lambda: retrieval_cache(0)),
    CacheCase("retrieval, 20 tokens retrieved", lambda: retrieval_cache(20), num_retrieved=20),
    *(
        CacheCase(f"retrieval, {bits} bits", partial(retrieval_cache, 20, bits), num_retrieved=20, bits=bits)
        for bits in (8, 4)
    ),
]
STREAMING_LLM_CACHES = [CacheCase("streaming", streaming_llm_cache)]
ALL_CACHES = FULL_CACHES + RETRIEVAL_CACHES + STREAMING_LLM_CACHES


def random_kv(num_tokens: int, seed: int, shape: CacheShape = SHAPE) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [H, T, D]; no two seeds give the same."""
    generator = torch.Generator().manual_seed(seed % 2**31)
    size = (2, shape.num_kv_heads, num_tokens, shape.head_dim)
    k, v = torch.randn(size, generator=generator).to(shape.dtype)
    return k, v


@dataclass
class Reference:
    """What a cache must hold: per layer a list of tokens, each (key [H, D], value [H, D])."""

    num_layers: int
    tokens: list[list[tuple[torch.Tensor, torch.Tensor]]] = field(init=False)

    def __post_init__(self):
        self.tokens = [[] for _ in range(self.num_layers)]

    @property
    def length(self) -> int:
        return len(self.tokens[0])

    def append(self, num_new: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Makes up `num_new` tokens, for each layer others; returns their keys and values [H, T, D]."""
        new = [random_kv(num_new, seed * self.num_layers + layer) for layer in range(self.num_layers)]
        for tokens, (k, v) in zip(self.tokens, new, strict=True):
            tokens += [(k[:, at].clone(), v[:, at].clone()) for at in range(num_new)]
        return new

    def round(self, num_tokens: int, bits: int | None) -> None:
        """The first tokens are as they come back from `bits` a value."""
        for layer, tokens in enumerate(self.tokens):
            k, v = (rounded(rows, bits) for rows in self.read(layer, 0, num_tokens))
            tokens[:num_tokens] = [(k[:, at], v[:, at]) for at in range(num_tokens)]

    def truncate(self, length: int) -> None:
        for tokens in self.tokens:
            del tokens[length:]

    def read(self, layer: int, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [H, end - start, D]."""
        if start == end:
            return torch.empty(2, 0, SHAPE.head_dim), torch.empty(2, 0, SHAPE.head_dim)
        k, v = zip(*self.tokens[layer][start:end], strict=True)
        return torch.stack(k, dim=1), torch.stack(v, dim=1)


def kept(segment: Segment) -> Segment:
    """A copy, which stays when the next segment comes; checks what attention relies on."""
    k, v = segment.k.clone(), segment.v.clone()
    end = k.shape[1] - segment.num_pad
    assert k.shape == v.shape
    assert 0 <= segment.num_pad < padded(1) and segment.num_new <= end
    assert k[:, end:].isfinite().all() and v[:, end:].isfinite().all(), "padding of a segment must be finite"
    positions = None if segment.positions is None else segment.positions.clone()
    return Segment(k, v, segment.start, positions, segment.num_new, segment.num_pad)


def forward(cache, new_kv) -> list[list[Segment]]:
    """One pass over new tokens, `new_kv` [layer] (k, v): the segments that each layer saw, kept."""
    num_new = new_kv[0][0].shape[1]
    cache.begin(num_new)
    seen = []
    for layer, (k, v) in enumerate(new_kv):
        cache.append(layer, k, v)
        seen.append([kept(segment) for segment in cache.segments(layer)])
        assert [segment.num_new for segment in seen[-1]] == [0] * (len(seen[-1]) - 1) + [num_new]
    cache.end()
    return seen


def joined(segments: list[Segment]) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [H, N, D] of segments one after another, without padding."""
    ends = [segment.k.shape[1] - segment.num_pad for segment in segments]
    k = torch.cat([segment.k[:, :end] for segment, end in zip(segments, ends, strict=True)], dim=1)
    v = torch.cat([segment.v[:, :end] for segment, end in zip(segments, ends, strict=True)], dim=1)
    return k, v


def positions_of(segments: list[Segment]) -> torch.Tensor:
    """Positions [H, N] of the keys of `joined`."""
    positions = []
    for segment in segments:
        end = segment.k.shape[1] - segment.num_pad
        contiguous = segment.positions is None
        start = segment.start if contiguous else 0
        rows = torch.arange(start, start + end).expand(segment.k.shape[0], -1)
        positions.append(rows if contiguous else segment.positions[:, :end])
    return torch.cat(positions, dim=1)


def assert_same_tokens(got: tuple[torch.Tensor, torch.Tensor], wanted: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Bit by bit."""
    assert got[0].shape == wanted[0].shape, f"{got[0].shape} instead of {wanted[0].shape}"
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


def assert_sees_all(seen: list[list[Segment]], reference: Reference) -> None:
    """Every layer saw all tokens of the reference, in order, at their positions."""
    for layer, segments in enumerate(seen):
        assert_same_tokens(joined(segments), reference.read(layer, 0, reference.length))
        wanted = torch.arange(reference.length).expand(SHAPE.num_kv_heads, -1)
        assert torch.equal(positions_of(segments), wanted)


def assert_same_view(got: list[list[Segment]], wanted: list[list[Segment]]) -> None:
    """The same segments with the same bytes; padding has none."""
    for got_layer, wanted_layer in zip(got, wanted, strict=True):
        for one, other in zip(got_layer, wanted_layer, strict=True):
            assert (one.start, one.num_new, one.num_pad) == (other.start, other.num_new, other.num_pad)
            assert_same_tokens(joined([one]), joined([other]))
            assert torch.equal(positions_of([one]), positions_of([other]))


HISTORY = [20, 1, 6, -3, 2, -5, 5, 30, 3, -25, 4, -1, 6, 6, -6, 1]
"""Tokens appended, or (negative) rolled back: prefill, tentative tokens, a truncation deep into the past."""


def replay(cache, reference: Reference, history: list[int] = HISTORY) -> list[list[list[Segment]]]:
    """The views of all its passes."""
    views = []
    floor = reference.length  # a retrieval cache is not rolled back to before its rebuild
    for index, step in enumerate(history):
        if step > 0:
            views.append(forward(cache, reference.append(step, seed=index)))
            assert_sees_all(views[-1], reference)
        else:
            reference.truncate(max(floor, reference.length + step))
            cache.truncate(reference.length)
        assert cache.length == reference.length
    return views


def check_history(case: CacheCase) -> None:
    """Appending and rolling back in any order, a cache shows the tokens that it should hold and no others."""
    cache, reference = case.new()
    replay(cache, reference)
    close(cache)


def check_reset(case: CacheCase) -> None:
    """A replay after `reset` shows what it does on a new cache, byte for byte."""
    used, reference = case.new()
    replay(used, reference, [50, 3, -2, 6])
    used.reset()
    assert used.length == 0
    case.prepare(used, reference)
    new, new_reference = case.new()
    assert_same_view(
        [layer for view in replay(used, reference) for layer in view],
        [layer for view in replay(new, new_reference) for layer in view],
    )
    close(used)
    close(new)


def check_abort(case: CacheCase) -> None:
    """A pass that fails after any of its layers leaves the cache as if it had not begun."""
    for num_done in range(case.num_layers + 1):
        cache, reference = case.new()
        replay(cache, reference, [40, 6, -2])
        length = reference.length
        new = reference.append(6, seed=77)
        cache.begin(6)
        for layer in range(num_done):
            cache.append(layer, *new[layer])
            for _ in cache.segments(layer):
                pass
        cache.abort()
        reference.truncate(length)
        assert cache.length == length
        assert_sees_all(forward(cache, reference.append(4, seed=78)), reference)
        close(cache)


def close(cache) -> None:
    """Ends the copy thread, if it has one."""
    if isinstance(cache, FullCache):
        cache.close()
