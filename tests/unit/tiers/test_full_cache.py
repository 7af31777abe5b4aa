"""The full cache holds what a plain list of tokens would, wherever its layers live and whatever was done to it."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.all_caches import (
    FULL_CACHES,
    Reference,
    assert_same_tokens,
    assert_same_view,
    assert_sees_all,
    check_abort,
    check_history,
    check_reset,
    forward,
    full_cache,
    joined,
    kept,
    poison,
    positions_of,
    random_kv,
    read_prompt,
)
from tiers.base import BlockShape, CacheShape
from tiers.block_layer import BlockLayer
from tiers.device_tier import DeviceTier
from tiers.disk_tier import DiskBlocks
from tiers.full_cache import FullCache
from tiers.pinned_host_tier import PinnedHostTier

REPEATABLE = settings(derandomize=True, deadline=None, max_examples=60)
EVERY_FULL_CACHE = pytest.mark.parametrize("case", FULL_CACHES, ids=lambda case: case.name)


@EVERY_FULL_CACHE
def test_shows_exactly_the_tokens_appended_and_not_rolled_back(case):
    check_history(case)


@EVERY_FULL_CACHE
def test_replay_after_reset_equals_a_new_cache(case):
    check_reset(case)


@EVERY_FULL_CACHE
def test_failed_pass_leaves_no_trace(case):
    check_abort(case)


@dataclass(frozen=True)
class Layout:
    """How a cache is built; `windows` has one entry for each layer."""

    tiers: str
    capacity: int
    block_tokens: int
    slack: int
    num_buffers: int
    windows: list[int | None]

    def make(self) -> FullCache:
        return full_cache(
            self.tiers,
            capacity=self.capacity,
            block_tokens=self.block_tokens,
            slack=self.slack,
            num_buffers=self.num_buffers,
            windows=self.windows,
        )


@st.composite
def layouts(draw, *, with_windows: bool) -> Layout:
    tiers = draw(st.sampled_from(["d", "h", "s", "hd", "dh", "hh", "shd", "ds"]))
    window = st.none() | st.integers(1, 90) if with_windows else st.none()
    return Layout(
        tiers=tiers,
        capacity=draw(st.integers(60, 300)),
        block_tokens=draw(st.sampled_from([1, 2, 4, 5, 8, 16, 24, 64, 100])),
        slack=draw(st.integers(1, 14)),
        num_buffers=draw(st.integers(2, 4)),
        windows=[draw(window) for _ in tiers],
    )


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["append", "append", "append", "append", "prompt", "roll back", "truncate", "abort", "reset"]),
        st.integers(0, 10**6),
    ),
    max_size=25,
)


class Pair:
    """A cache and its reference, driven alike; what the cache must not read is poisoned after every step."""

    def __init__(self, layout: Layout):
        self.layout, self.cache = layout, layout.make()
        self.reference = Reference(len(layout.tiers))
        self._num_passes = 0

    def close(self) -> None:
        self.cache.close()

    def step(self, what: str, number: int) -> list | None:
        """Does it, if it is within the contract: the view of a pass, if it was one."""
        view, layout, length = None, self.layout, self.reference.length
        if what in ("append", "abort"):  # tentative tokens: on top of the capacity, but never more than the slack
            num_new = min(1 + number % layout.slack, layout.capacity + layout.slack - length)
            if num_new and what == "append":
                view = self.forward(num_new)
            elif num_new:
                self.abort(num_new, number % (len(layout.tiers) + 1))
        elif what == "prompt":  # in place of all that was held
            self.prompt(min(number % 150, layout.capacity), piece_tokens=1 + number % 40)
        else:
            most = {"roll back": layout.slack, "truncate": length, "reset": length}[what]
            back = length if what == "reset" else min(length, number % (most + 1))
            self.reference.truncate(length - back)
            if what == "reset":
                self.cache.reset()
            else:
                self.cache.truncate(length - back)
        assert self.cache.length == self.reference.length
        self._poison_rest()
        return view

    def prompt(self, num_tokens: int, piece_tokens: int) -> None:
        self._num_passes += 1
        self.reference.truncate(0)
        read_prompt(self.cache, self.reference.append(num_tokens, seed=self._num_passes), piece_tokens)

    def forward(self, num_new: int) -> list:
        self._num_passes += 1
        return forward(self.cache, self.reference.append(num_new, seed=self._num_passes))

    def abort(self, num_new: int, num_done: int) -> None:
        self._num_passes += 1
        length, new = self.reference.length, self.reference.append(num_new, seed=self._num_passes)
        self.cache.begin(num_new)
        for layer in range(num_done):
            self.cache.append(layer, *new[layer])
            for _ in self.cache.segments(layer):
                pass
        self.cache.abort()
        self.reference.truncate(length)

    def _poison_rest(self) -> None:
        for layer in self.cache._layers:
            if isinstance(layer, BlockLayer) and isinstance(layer._store, DiskBlocks):
                layer._store._checksums[layer.num_blocks :] = [None] * (len(layer._store._checksums) - layer.num_blocks)
            elif isinstance(layer, BlockLayer):
                poison(layer._store._memory[layer.num_blocks :])


@REPEATABLE
@given(layout=layouts(with_windows=False), steps=STEPS)
def test_any_history_shows_exactly_the_tokens_held(layout, steps):
    with closing(Pair(layout)) as pair:
        for what, number in steps:
            view = pair.step(what, number)
            if view is not None:
                assert_sees_all(view, pair.reference)


@REPEATABLE
@given(layout=layouts(with_windows=True), steps=STEPS)
def test_with_sliding_windows_no_visible_token_is_missing_and_no_block_before_them_is_streamed(layout, steps):
    with closing(Pair(layout)) as pair:
        for what, number in steps:
            first_new = pair.reference.length
            view = pair.step(what, number)
            for layer, segments in enumerate(view or []):
                window, length = layout.windows[layer], pair.reference.length
                if what == "append":
                    first_seen = 0 if window is None else max(0, first_new - window + 1)
                    start = int(positions_of(segments)[0, 0])
                    assert start <= first_seen
                    assert_same_tokens(joined(segments), pair.reference.read(layer, start, length))
                    assert torch.equal(positions_of(segments)[0], torch.arange(start, length))
                    for segment in segments[:-1]:
                        assert segment.start + segment.k.shape[1] > first_seen


@REPEATABLE
@given(layout=layouts(with_windows=False), steps=STEPS, ranges=st.lists(st.tuples(*[st.integers(0, 10**6)] * 2)))
def test_any_range_can_be_read_at_any_time(layout, steps, ranges):
    with closing(Pair(layout)) as pair:
        for index, (what, number) in enumerate([("prompt", 99), *steps]):
            pair.step(what, number)
            for one, other in ranges[index::2][:3]:
                if pair.reference.length:
                    start = one % pair.reference.length
                    end = start + 1 + other % (pair.reference.length - start)
                    for layer in range(len(layout.tiers)):
                        got = pair.cache.read(layer, start, end)
                        assert_same_tokens(got, pair.reference.read(layer, start, end))


@REPEATABLE
@given(
    layout=layouts(with_windows=False),
    steps=STEPS,
    chunk_size=st.integers(1, 12),
    choices=st.lists(st.lists(st.integers(0, 10**6), min_size=2, max_size=2), max_size=8),
)
def test_any_chunks_can_be_gathered_different_ones_for_each_head(layout, steps, chunk_size, choices):
    with closing(Pair(layout)) as pair:
        for what, number in [("prompt", 99), *steps]:
            pair.step(what, number)
            num_chunks = pair.reference.length // chunk_size
            if not num_chunks:
                continue
            ids = torch.tensor(choices, dtype=torch.int64).reshape(-1, 2).T % num_chunks
            for layer in range(len(layout.tiers)):
                k, v = pair.cache.gather(layer, ids, chunk_size)
                assert k.shape == v.shape == (2, ids.shape[1] * chunk_size, 4)
                for head, chunk in enumerate(ids.tolist()):
                    for at, chunk_id in enumerate(chunk):
                        rows = slice(at * chunk_size, (at + 1) * chunk_size)
                        start = chunk_id * chunk_size
                        k_wanted, v_wanted = pair.reference.read(layer, start, start + chunk_size)
                        assert_same_tokens((k[head, rows], v[head, rows]), (k_wanted[head], v_wanted[head]))


@REPEATABLE
@given(layout=layouts(with_windows=True), before=STEPS, steps=STEPS)
def test_replay_after_reset_equals_a_new_cache_after_any_history(layout, before, steps):
    with closing(Pair(layout)) as used, closing(Pair(layout)) as new:
        for what, number in before:
            used.step(what, number)
        used.step("reset", 0)
        used._num_passes = 0  # the same tokens in both
        for what, number in steps:
            view, view_of_new = used.step(what, number), new.step(what, number)
            if view is not None:
                assert_same_view(view, view_of_new)


def run_to_capacity(cache: FullCache, reference: Reference, capacity: int, slack: int) -> None:
    """Rounds of `slack` tentative tokens, all but one accepted, until only one more final token fits."""
    seed = 100
    while reference.length < capacity:
        assert_sees_all(forward(cache, reference.append(slack, seed=seed)), reference)
        reference.truncate(min(capacity, reference.length - 1))
        cache.truncate(reference.length)
        seed += 1


@pytest.mark.parametrize("block_tokens", [1, 2, 4, 7, 8, 16, 128])
@pytest.mark.parametrize("capacity", [102, 122, 144])
def test_tentative_tokens_fit_up_to_the_last_position_whatever_the_block_size(block_tokens, capacity):
    slack = 12
    with closing(full_cache("h", capacity=capacity, block_tokens=block_tokens, slack=slack)) as cache:
        reference = Reference(1)
        read_prompt(cache, reference.append(40, seed=1), 16)
        run_to_capacity(cache, reference, capacity, slack)


@pytest.mark.parametrize("block_tokens", [2, 4, 8, 16])
def test_tentative_tokens_are_not_moved_to_the_host(block_tokens):
    slack = 12
    with closing(full_cache("h", capacity=200, block_tokens=block_tokens, slack=slack)) as cache:
        reference, layer = Reference(1), cache._layers[0]
        read_prompt(cache, reference.append(40, seed=1), 16)
        for seed in range(2, 16):
            forward(cache, reference.append(slack, seed=seed))
            reference.truncate(reference.length - 1)
            cache.truncate(reference.length)
            assert layer.tail_start <= reference.length - slack + 1, "tokens that may be rolled back were moved"


def test_windowed_layer_streams_only_the_blocks_that_its_window_reaches():
    capacity, block_tokens, window = 400, 16, 40
    with closing(full_cache("hh", capacity=capacity, block_tokens=block_tokens, windows=[window, None])) as cache:
        reference = Reference(2)
        read_prompt(cache, reference.append(320, seed=1), 100)
        before = cache.stream_stats.num_bytes
        seen = forward(cache, reference.append(1, seed=2))
        # 320 tokens are 20 blocks; the new one, at position 320, sees from 281 on: blocks 17, 18, 19.
        assert [segment.start for segment in seen[0]] == [272, 288, 304, 320]
        assert len(seen[1]) == 21
        block_bytes = 2 * 2 * block_tokens * 4 * 4
        assert cache.stream_stats.num_bytes - before == (3 + 20) * block_bytes


def test_nothing_is_streamed_where_all_layers_are_on_the_device():
    cache, reference = full_cache("dd"), Reference(2)
    forward(cache, reference.append(80, seed=1))
    forward(cache, reference.append(3, seed=2))
    assert (cache.stream_stats.num_bytes, cache.stream_stats.seconds) == (0, 0.0)
    cache.close()


def test_long_prompt_in_pieces_equals_one_piece():
    for tiers in ("d", "h", "s"):
        with (
            closing(full_cache(tiers, capacity=600)) as in_pieces,
            closing(full_cache(tiers, capacity=600)) as in_one,
        ):
            reference = Reference(1)
            ((k, v),) = reference.append(500, seed=1)
            read_prompt(in_one, [(k, v)], 500)
            read_prompt(in_pieces, [(k, v)], 77)
            assert_same_tokens(in_pieces.read(0, 0, 500), in_one.read(0, 0, 500))


def test_device_memory_of_a_host_layer_does_not_grow_with_the_context():
    shape = CacheShape(num_layers=1, num_kv_heads=2, head_dim=4, dtype=torch.float32)
    used = []
    for capacity in (100, 10_000):
        device_tier = DeviceTier(torch.device("cpu"))
        block = BlockShape(num_kv_heads=2, num_tokens=16, head_dim=4, dtype=torch.float32)
        BlockLayer(shape, PinnedHostTier(pin=False).blocks(block, capacity // 16), 6, device_tier)
        used.append(device_tier.used_bytes)
    assert used[0] == used[1]


def test_keys_and_values_of_other_types_keep_their_bits():
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        shape = CacheShape(num_layers=1, num_kv_heads=2, head_dim=4, dtype=dtype)
        with closing(full_cache("h", shape=shape)) as cache:
            reference = Reference(1)
            ((k, v),) = reference.append(70, seed=1)
            k, v = k.to(dtype), v.to(dtype)
            read_prompt(cache, [(k, v)], 32)
            assert_same_tokens(cache.read(0, 0, 70), (k, v))


def test_failed_prompt_leaves_an_empty_cache_that_can_be_used():
    for tiers in ("d", "h", "s", "shd"):
        with closing(full_cache(tiers, capacity=300)) as cache:
            reference = Reference(len(tiers))
            forward(cache, reference.append(6, seed=1))
            with pytest.raises(ZeroDivisionError), cache.prefill(200) as make_layer_cache:
                layer_cache = make_layer_cache(0)
                layer_cache.begin(100)
                layer_cache.append(0, *random_kv(100, seed=2))
                layer_cache.end()
                raise ZeroDivisionError
            assert cache.length == 0
            reference.truncate(0)
            read_prompt(cache, reference.append(250, seed=3), 60)
            assert_sees_all(forward(cache, reference.append(3, seed=4)), reference)


def test_blocks_of_a_prompt_are_written_once_and_none_is_read_while_it_comes():
    with closing(full_cache("h", capacity=300)) as cache:
        store, written = cache._layers[0]._store, []
        write = store.write
        store.write = lambda index, rows: (written.append(index), write(index, rows))
        read_prompt(cache, Reference(1).append(290, seed=1), 60)
        assert sorted(written) == list(range(290 // 16))
        assert cache.stream_stats.num_bytes == 0


def test_segment_is_valid_until_the_next_is_asked_for():
    with closing(full_cache("h", capacity=300, num_buffers=2)) as cache:
        reference = Reference(1)
        read_prompt(cache, reference.append(290, seed=1), 64)
        (new,) = reference.append(1, seed=2)
        cache.begin(1)
        cache.append(0, *new)
        for segment in cache.segments(0):
            first = kept(segment)
            torch.zeros(200_000).exp_()  # the copy thread has time to run ahead
            assert_same_tokens((segment.k, segment.v), (first.k, first.v))
        cache.end()


@pytest.mark.parametrize(("start", "end"), [(0, 0), (3, 3), (-1, 2), (0, 41), (41, 42)])
def test_reading_what_is_not_held_is_refused(start, end):
    with closing(full_cache("hd")) as cache:
        forward(cache, Reference(2).append(40, seed=1))
        with pytest.raises(AssertionError):
            cache.read(0, start, end)


def test_more_tokens_than_the_capacity_are_refused():
    cache = full_cache("d", capacity=64, slack=0)
    forward(cache, Reference(1).append(64, seed=1))
    with pytest.raises(AssertionError, match="exceed the capacity"):
        forward(cache, Reference(1).append(1, seed=2))
    with pytest.raises(AssertionError, match="truncate to 65 of 64"):
        cache.truncate(65)
