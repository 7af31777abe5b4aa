"""On a CUDA device: streams that race with nobody, page-locked memory of exact size, attention as on the CPU, and the
tokens of transformers' own generate. Streams are made slow with kernels that sleep, so that a missing wait shows.
"""

from __future__ import annotations

import gc
import tempfile
from contextlib import closing
from functools import partial

import pytest
import torch
import transformers

from conf.schema import (
    CacheConfig,
    CudaGraphs,
    DecodingConfig,
    Dtype,
    FullCacheConfig,
    FullCacheTier,
    GenerationConfig,
    Mode,
    ModelConfig,
    PlacementConfig,
    RetrievalCacheConfig,
    RunConfig,
    SamplingConfig,
    StreamingCacheConfig,
)
from tests.support.all_caches import read_prompt, space_on
from tests.support.tiny_models import random_prompt, save_checkpoint, tiny_config
from tiers import pinned_host_tier
from tiers.base import BlockInMemory, BlockShape, CacheShape, Segment
from tiers.block_layer import BlockLayer
from tiers.block_writer import BlockWriter
from tiers.device_layer import DeviceLayer
from tiers.device_tier import DeviceTier
from tiers.disk_tier import DiskTier
from tiers.full_cache import FullCache
from tiers.pinned_host_tier import PinnedHostTier, can_pin
from tiers.planning.memory import process_bytes
from tiers.transfer import CudaBlockStreamer, make_streamer
from workers.attention.attend import attend
from workers.attention.forward_pass import ForwardPass, active

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="Requires: a CUDA device"),
]
NEEDS_CUPY = pytest.mark.skipif(not can_pin(), reason="Requires: a CUDA device and cupy")

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
BLOCK_SIZE = (2, 4, 64, 64)
BLOCK_BYTES = 2 * 4 * 64 * 64 * 4
SLEEP_CYCLES = 20_000_000  # about 10 ms


def pinned_blocks(count: int, first: int = 1) -> list[BlockInMemory]:
    """Different ones: filled with first, first + 1, ..."""
    return [BlockInMemory(torch.full(BLOCK_SIZE, float(value)).pin_memory()) for value in range(first, first + count)]


class PoisonedDeviceTier(DeviceTier):
    """Its memory is NaN until it is written."""

    def allocate(self, *size, dtype):
        return super().allocate(*size, dtype=dtype).fill_(torch.nan)


class SlowCopies(CudaBlockStreamer):
    """A right one whose every copy comes late."""

    def _issue(self):
        with torch.cuda.stream(self._copy_stream):
            torch.cuda._sleep(SLEEP_CYCLES)
        super()._issue()


class HandsOutEarly(SlowCopies):
    """Wrong: the compute stream does not wait for the copy."""

    def take(self, count):
        stream = torch.cuda.current_stream()
        for _ in range(count):
            slot = self._num_taken % len(self._buffers)
            self._num_taken += 1
            yield self._buffers[slot]
            self._used[slot].record(stream)
            if self._num_issued < len(self._blocks):
                self._issue()


class OverwritesEarly(CudaBlockStreamer):
    """Wrong: the copy stream does not wait until the compute stream is done with a buffer."""

    def _issue(self):
        for event in self._used:
            event.record(self._copy_stream)
        super()._issue()


def streamer_of(kind, num_buffers: int = 2) -> CudaBlockStreamer:
    return kind(BLOCK_SIZE, torch.float32, num_buffers, PoisonedDeviceTier(CUDA))


def values_taken(streamer, count: int, *, slow_compute: bool = False) -> list[float]:
    """What kernels on the compute stream read of each block; the host waits for none of them. NaN: parts differ."""
    found = []
    for block in streamer.take(count):
        if slow_compute:
            torch.cuda._sleep(SLEEP_CYCLES)
        first = block.flatten()[0]
        found.append(torch.where((block == first).all(), first, torch.nan))
    torch.cuda.synchronize()
    return [float(value) for value in found]


def numbers(count: int, first: int = 1) -> list[float]:
    return [float(value) for value in range(first, first + count)]


@pytest.mark.parametrize("num_buffers", [2, 3])
@pytest.mark.parametrize("slow_compute", [False, True])
@pytest.mark.parametrize("kind", [CudaBlockStreamer, SlowCopies])
def test_kernels_see_every_block_whole_and_in_order(kind, slow_compute, num_buffers):
    with closing(streamer_of(kind, num_buffers)) as streamer:
        for first in (1, 100):
            streamer.begin(pinned_blocks(7, first))
            assert values_taken(streamer, 7, slow_compute=slow_compute) == numbers(7, first)


@pytest.mark.parametrize("wrong", [HandsOutEarly, OverwritesEarly])
def test_negative_control_a_streamer_that_does_not_wait_is_found_out(wrong):
    with closing(streamer_of(wrong)) as streamer:
        streamer.begin(pinned_blocks(7))
        assert values_taken(streamer, 7, slow_compute=wrong is OverwritesEarly) != numbers(7)


def test_a_pass_waits_for_writes_to_its_blocks_that_are_under_way():
    with closing(streamer_of(CudaBlockStreamer)) as streamer:
        blocks = pinned_blocks(3)
        torch.cuda._sleep(5 * SLEEP_CYCLES)
        for number, block in enumerate(blocks):
            block.memory.copy_(torch.full(BLOCK_SIZE, 50.0 + number, device=CUDA), non_blocking=True)
        streamer.begin(blocks)
        assert values_taken(streamer, 3) == numbers(3, 50)


def test_a_pass_does_not_overwrite_the_last_block_of_the_one_before():
    with closing(streamer_of(CudaBlockStreamer)) as streamer:
        streamer.begin(pinned_blocks(1))
        (value,) = [(torch.cuda._sleep(5 * SLEEP_CYCLES), block.clone())[1] for block in streamer.take(1)]
        streamer.begin(pinned_blocks(2, 100))
        assert values_taken(streamer, 2) == numbers(2, 100)
        assert bool((value == 1).all())


@pytest.mark.parametrize("num_taken", [0, 1, 4])
def test_a_pass_after_a_cancelled_one_sees_its_own_blocks_alone(num_taken):
    with closing(streamer_of(SlowCopies)) as streamer:
        streamer.begin(pinned_blocks(6))
        values_taken(streamer, num_taken)
        streamer.cancel()
        streamer.begin(pinned_blocks(4, 50))
        assert values_taken(streamer, 4) == numbers(4, 50)


def test_counts_bytes_exactly_and_the_seconds_of_passes():
    with closing(streamer_of(SlowCopies)) as streamer:
        for _ in range(2):
            streamer.begin(pinned_blocks(5))
            values_taken(streamer, 5)
        stats = streamer.stats
        assert stats.num_bytes == 10 * BLOCK_BYTES
        assert 0.01 < stats.seconds < 10
        assert streamer.stats.seconds == stats.seconds, "asking twice must not count twice"


def test_the_compute_stream_stalls_for_slow_copies_and_not_for_fast_ones():
    stalls = {}
    for kind, slow_compute in ((SlowCopies, False), (CudaBlockStreamer, True)):
        with closing(streamer_of(kind)) as streamer:
            for _ in range(2):
                streamer.begin(pinned_blocks(5))
                values_taken(streamer, 5, slow_compute=slow_compute)
            stalls[kind] = streamer.stats.stall_seconds
            assert streamer.stats.stall_seconds == stalls[kind], "asking twice must not count twice"
    assert stalls[SlowCopies] > 0.02 > stalls[CudaBlockStreamer]


def test_seconds_of_whole_passes_survive_a_cancelled_one():
    with closing(streamer_of(SlowCopies)) as streamer:
        streamer.begin(pinned_blocks(5))
        values_taken(streamer, 5)
        streamer.begin(pinned_blocks(5))
        values_taken(streamer, 1)
        streamer.cancel()
        assert streamer.stats.seconds > 0.01


@NEEDS_CUPY
def test_pinned_memory_has_exactly_the_size_asked_for():
    """How it is cut: tests/unit/tiers/test_pinned_host_tier.py."""
    tier, before = PinnedHostTier(pin=True), process_bytes()[0]
    tensor = tier.allocate(3, 5, 10_000_003, dtype=torch.bfloat16)
    assert tensor.shape == (3, 5, 10_000_003) and tensor.is_pinned() and tensor[2, 4, -1:].is_pinned()
    assert tier.used_bytes == tensor.nbytes == 3 * 5 * 10_000_003 * 2
    assert process_bytes()[0] - before < 1.2 * tensor.nbytes


@NEEDS_CUPY
def test_every_block_of_memory_locked_in_pieces_is_copied_as_it_is(monkeypatch):
    monkeypatch.setattr(pinned_host_tier, "PIECE_BYTES", 1 << 20)
    shape = BlockShape(num_kv_heads=4, num_tokens=64, head_dim=64, dtype=torch.float32)
    blocks = PinnedHostTier(pin=True).blocks(shape, 37)
    for index in range(37):
        blocks.write(index, torch.full(shape.size, float(index)))
    with closing(streamer_of(CudaBlockStreamer)) as streamer:
        streamer.begin([blocks.source(index) for index in range(37)])
        assert values_taken(streamer, 37) == numbers(37, 0)


@NEEDS_CUPY
def test_pinned_memory_lives_as_long_as_its_tensor_and_keeps_its_bits():
    tensor = PinnedHostTier(pin=True).allocate(1000, 257, dtype=torch.float32)
    gc.collect()
    wanted = torch.randn(1000, 257)
    tensor.copy_(wanted)
    there = tensor[10:].to(CUDA, non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(there.cpu(), wanted[10:])
    assert PinnedHostTier(pin=True).allocate(0, 5, dtype=torch.float32).shape == (0, 5)


TOLERANCE = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def random_segments(num_groups: int, num_new: int, dtype: torch.dtype, dim: int = 64, num_old: int = 90):
    """q [H, G, T, D] and segments as caches give them: an old one, and one of old, new and padded keys, strided."""
    generator = torch.Generator().manual_seed(num_groups * 1000 + num_new)
    q = torch.randn(4, num_groups, num_new, dim, generator=generator).to(dtype)
    kv = torch.randn(2, 4, num_old + num_new + 30, dim, generator=generator).to(dtype)
    end = num_old + num_new + 7

    def segments(device, dtype):
        k, v = kv.to(device, dtype)
        return [
            Segment(k[:, :64], v[:, :64], start=0),
            Segment(k[:, 64:end], v[:, 64:end], start=64, num_new=num_new, num_pad=7),
        ]

    return q, segments


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("num_groups", [1, 4])
@pytest.mark.parametrize("num_new", [1, 3, 17, 70, 130])
@pytest.mark.parametrize("options", [{}, {"window": 40}, {"softcap": 5.0}], ids=str)
def test_attention_equals_that_of_the_cpu_in_float64(options, num_new, num_groups, dtype):
    q, segments = random_segments(num_groups, num_new, dtype)
    wanted = attend(q.double(), segments(CPU, torch.float64), first_position=90, scale=0.125, **options)
    got = attend(q.to(CUDA), segments(CUDA, dtype), first_position=90, scale=0.125, **options)
    assert got.dtype == dtype and got.device == CUDA
    torch.testing.assert_close(got.cpu().double(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dim", [16, 80, 128, 256])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_attention_takes_the_head_sizes_of_current_models(dim, dtype):
    for num_new in (5, 100):
        q, segments = random_segments(2, num_new, dtype, dim)
        sinks = torch.linspace(-1, 1, 8).view(4, 2)
        options = {"first_position": 90, "scale": dim**-0.5}
        wanted = attend(q.double(), segments(CPU, torch.float64), sink_logits=sinks, **options)
        got = attend(q.to(CUDA), segments(CUDA, dtype), sink_logits=sinks.to(CUDA), **options)
        torch.testing.assert_close(got.cpu().double(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


class ResidentBlocks:
    """In the streamer's place: hands out the same blocks, copied in full before the pass goes on."""

    def begin(self, blocks):
        self._blocks = iter(blocks)

    def take(self, count):
        for _ in range(count):
            yield next(self._blocks).memory.to(CUDA)

    def close(self):
        pass


def one_layer_cache(kind: str, dtype: torch.dtype, *, num_heads: int = 4, dim: int = 64) -> FullCache:
    """kind: device; host, streamed; host, with copies that come late; host, resident; or disk."""
    shape = CacheShape(num_layers=1, num_kv_heads=num_heads, head_dim=dim, dtype=dtype)
    device_tier, host_tier = DeviceTier(CUDA), PinnedHostTier(pin=can_pin())
    if kind == "device":
        return FullCache([DeviceLayer(shape, 2100, device_tier)], [None])
    block = BlockShape(num_kv_heads=num_heads, num_tokens=64, head_dim=dim, dtype=dtype)
    block_tier = DiskTier(tempfile.gettempdir()) if kind == "disk" else host_tier
    layer = BlockLayer(shape, block_tier.blocks(block, 2000 // 64), 70, device_tier)
    poisoned = PoisonedDeviceTier(CUDA)
    streamer = {
        "host, streamed": lambda: make_streamer(block.size, dtype, 2, poisoned, CUDA),
        "host, copies late": lambda: SlowCopies(block.size, dtype, 2, poisoned),
        "host, resident": ResidentBlocks,
        "disk": lambda: make_streamer(block.size, dtype, 3, poisoned, CUDA, num_threads=3, staging_tier=host_tier),
    }[kind]()
    return FullCache([layer], [None], streamer, BlockWriter(CUDA), partial(space_on, device_tier, shape))


def outputs_over(cache: FullCache, dtype: torch.dtype, *, num_groups: int = 2) -> list[torch.Tensor]:
    """Attention of a prompt in pieces, then of rounds with roll back."""
    generator = torch.Generator().manual_seed(0)
    outs = []

    def new_tokens(num_new: int):
        q = torch.randn(4, num_groups, num_new, 64, generator=generator).to(CUDA, dtype)
        return q, *torch.randn(2, 4, num_new, 64, generator=generator).to(CUDA, dtype)

    def attend_over(level, num_new: int) -> None:
        q, k, v = new_tokens(num_new)
        first = level.length
        with active(ForwardPass(level, first), num_new):
            level.append(0, k, v)
            outs.append(attend(q, level.segments(0), first_position=first, scale=0.125))

    with cache.prefill(800) as make_layer_cache:
        layer_cache = make_layer_cache(0)
        for num_new in (500, 300):
            attend_over(layer_cache, num_new)
        layer_cache.finish()
    for num_new, num_rolled_back in ((1, 0), (9, 5), (9, 0), (70, 60), (3, 200), (17, 0)):
        attend_over(cache, num_new)
        cache.truncate(cache.length - num_rolled_back)
    cache.close()
    return [out.cpu().double() for out in outs]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("kind", ["host, streamed", "host, copies late", "disk"])
def test_streamed_keys_give_the_same_bits_as_resident_ones_cut_alike(kind, dtype):
    streamed = outputs_over(one_layer_cache(kind, dtype), dtype)
    resident = outputs_over(one_layer_cache("host, resident", dtype), dtype)
    for one, other in zip(streamed, resident, strict=True):
        assert torch.equal(one, other)


MERGING_ERROR = {torch.float32: 2e-6, torch.float16: 2**-9, torch.bfloat16: 2**-6}
"""Relative to the largest output; for 16 bits two units in its last place."""


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_streamed_keys_give_nearly_the_result_of_keys_in_one_piece(dtype):
    streamed = outputs_over(one_layer_cache("host, streamed", dtype), dtype)
    whole = outputs_over(one_layer_cache("device", dtype), dtype)
    for one, other in zip(streamed, whole, strict=True):
        assert (one - other).abs().max() / other.abs().max() < MERGING_ERROR[dtype]


@pytest.mark.parametrize("kind", ["host, streamed", "disk"])
def test_layer_in_blocks_reads_and_gathers_what_its_prompt_brought(kind):
    cache = one_layer_cache(kind, torch.float32)
    k, v = torch.randn(2, 4, 700, 64, device=CUDA)
    read_prompt(cache, [(k, v)], 300)
    for start, end in ((0, 700), (63, 65), (640, 700), (699, 700), (10, 11)):
        k_read, v_read = cache.read(0, start, end)
        assert torch.equal(k_read, k[:, start:end]) and torch.equal(v_read, v[:, start:end])
    ids = torch.stack([torch.randperm(87)[:20] for _ in range(4)]).to(CUDA)
    k_got, v_got = cache.gather(0, ids, 8)
    tokens = (ids[..., None] * 8 + torch.arange(8, device=CUDA)).flatten(1)[..., None].expand(-1, -1, 64)
    assert torch.equal(k_got, k.gather(1, tokens)) and torch.equal(v_got, v.gather(1, tokens))
    cache.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = tiny_config("llama", max_position_embeddings=2048)
    return save_checkpoint(tmp_path_factory.mktemp("models") / "llama", config)


PROMPT, NUM_TOKENS = random_prompt(300), 48


@pytest.fixture(scope="module")
def greedy_on_cuda(folder) -> list[int]:
    """What transformers' own generate gives on the device."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map={"": CUDA}, attn_implementation="eager"
    ).eval()
    ids = torch.tensor([PROMPT], device=CUDA)
    options = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=NUM_TOKENS, eos_token_id=None, pad_token_id=0, bos_token_id=None
    )
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=options)
    return out[0, len(PROMPT) :].tolist()


def generate(folder, mode: Mode, drafter: str, graphs: CudaGraphs = CudaGraphs.off, **full) -> list[int]:
    from launch.assembly.engine import build
    from tests.support.tiny_runs import task_for

    config = RunConfig(
        model=ModelConfig(target=str(folder), drafter=drafter, dtype=Dtype.float32),
        decoding=DecodingConfig(mode=mode, gamma1=2, gamma2=6, cuda_graphs=graphs),
        cache=CacheConfig(
            full=FullCacheConfig(**full),
            retrieval=RetrievalCacheConfig(budget=64),
            streaming=StreamingCacheConfig(sinks=2, window=60),
        ),
        sampling=SamplingConfig(temperature=0.0),
        generation=GenerationConfig(max_new_tokens=NUM_TOKENS, ignore_eos=True),
        placement=PlacementConfig(device="cuda"),
        output=tempfile.gettempdir(),
    )
    with closing(build(task_for(config, PROMPT, NUM_TOKENS))) as engine:
        hierarchy = engine.hierarchy
        hierarchy.start()
        while not hierarchy.session.is_finished:
            hierarchy.round()
        if full.get("tier") is not FullCacheTier.device:
            assert engine.streaming_report()["bytes"] > 0
        return list(hierarchy.session.generated)


@pytest.mark.parametrize("mode", [Mode.autoregressive, Mode.retrieval, Mode.streaming, Mode.triforce])
@pytest.mark.parametrize("drafter", ["itself", "lookup"])
@pytest.mark.parametrize(
    "full",
    [
        {"tier": FullCacheTier.device},
        {"tier": FullCacheTier.host, "block_tokens": "32"},
        {"tier": FullCacheTier.disk, "block_tokens": "32", "host_layers": "1"},
        {"device_layers": "1", "block_tokens": "64", "stream_buffers": 3},
    ],
    ids=["device", "host", "disk and host", "host and device"],
)
def test_greedy_tokens_are_those_of_transformers(folder, greedy_on_cuda, full, drafter, mode):
    drafter = str(folder) if drafter == "itself" else drafter
    assert generate(folder, mode, drafter, **full) == greedy_on_cuda
