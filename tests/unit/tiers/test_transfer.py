"""The CPU streamer: a block is handed out only when its copy is done, and overwritten only when it is given back.

Copies are made slow and visible: a buffer is poisoned with NaN when a copy into it begins, and filled when it ends.
"""

from __future__ import annotations

import threading
import time
from contextlib import closing

import pytest
import torch

from tests.support.all_caches import PoisonedDeviceTier
from tiers.base import BlockInMemory
from tiers.block_writer import BlockWriter
from tiers.link import Link
from tiers.transfer import COPY_THREAD, CpuBlockStreamer, StreamStats, make_streamer

BLOCK_SIZE = (2, 2, 8, 4)
BLOCK_BYTES = 2 * 2 * 8 * 4 * 4
COPY_SECONDS = 0.004


class SlowBuffer(torch.Tensor):
    """A copy into it takes COPY_SECONDS, in which it holds NaN; it notes the copies that began."""

    def copy_(self, block):
        self.log.append(threading.current_thread().name)
        if block.flatten()[0] == BROKEN:
            raise OSError("the block cannot be read")
        self.fill_(torch.nan)
        time.sleep(COPY_SECONDS)
        return super().copy_(block)


BROKEN = -1.0


class SlowTier(PoisonedDeviceTier):
    """Its tensors are slow to copy to; `copies` lists the copies that began."""

    def __init__(self):
        super().__init__()
        self.copies: list[str] = []

    def allocate(self, *size, dtype):
        tensor = super().allocate(*size, dtype=dtype).as_subclass(SlowBuffer)
        tensor.log = self.copies
        return tensor


def blocks(count: int, first: int = 1) -> list[BlockInMemory]:
    """Different ones: filled with first, first + 1, ..."""
    return [BlockInMemory(torch.full(BLOCK_SIZE, float(value))) for value in range(first, first + count)]


def slow_streamer(kind=CpuBlockStreamer, num_buffers: int = 2) -> tuple[CpuBlockStreamer, SlowTier]:
    tier = SlowTier()
    return kind(BLOCK_SIZE, torch.float32, num_buffers, tier), tier


def values_taken(streamer, count: int, *, seconds_per_block: float = 0.0) -> list[float]:
    """What a consumer reads that works for a while on each block and then looks at it; NaN: parts of it differ."""
    values = []
    for block in streamer.take(count):
        time.sleep(seconds_per_block)
        is_uniform = bool((block == block.flatten()[0]).all())
        values.append(float(block.flatten()[0]) if is_uniform else float("nan"))
    return values


def numbers(count: int, first: int = 1) -> list[float]:
    return [float(value) for value in range(first, first + count)]


@pytest.mark.parametrize("num_buffers", [2, 3, 5])
@pytest.mark.parametrize("num_blocks", [0, 1, 2, 3, 7])
def test_consumer_sees_every_block_whole_and_in_order(num_buffers, num_blocks):
    streamer, _ = slow_streamer(num_buffers=num_buffers)
    with closing(streamer):
        streamer.begin(blocks(num_blocks))
        assert values_taken(streamer, num_blocks) == numbers(num_blocks)


def test_a_block_stays_until_the_next_is_asked_for_however_slow_the_consumer():
    streamer, _ = slow_streamer()
    with closing(streamer):
        streamer.begin(blocks(6))
        assert values_taken(streamer, 6, seconds_per_block=3 * COPY_SECONDS) == numbers(6)


def test_a_pass_may_be_taken_in_parts_as_layers_do():
    streamer, _ = slow_streamer()
    with closing(streamer):
        streamer.begin(blocks(7))
        parts = [values_taken(streamer, count, seconds_per_block=COPY_SECONDS) for count in (3, 0, 1, 3)]
        assert sum(parts, []) == numbers(7)


def test_passes_follow_each_other_without_mixing():
    streamer, _ = slow_streamer()
    with closing(streamer):
        for first in (1, 100, 200):
            streamer.begin(blocks(5, first))
            assert values_taken(streamer, 5) == numbers(5, first)


class HandsOutEarly(CpuBlockStreamer):
    """Wrong: does not wait for the copy."""

    def take(self, count):
        for _ in range(count):
            self._copies.popleft()
            buffer = self._buffers[self._num_taken % len(self._buffers)]
            self._num_taken += 1
            yield buffer
            if self._num_taken + len(self._copies) < len(self._blocks):
                self._issue()


class OverwritesEarly(CpuBlockStreamer):
    """Wrong: does not wait until the consumer is done with a buffer."""

    def begin(self, blocks):
        super().begin(blocks)
        while len(self._copies) < len(blocks):
            self._issue()


@pytest.mark.parametrize("wrong", [HandsOutEarly, OverwritesEarly])
def test_negative_control_a_streamer_that_does_not_wait_is_found_out(wrong):
    streamer, _ = slow_streamer(wrong)
    with closing(streamer):
        streamer.begin(blocks(6))
        seconds = 3 * COPY_SECONDS if wrong is OverwritesEarly else 0.0
        assert values_taken(streamer, 6, seconds_per_block=seconds) != numbers(6)


def test_copies_run_ahead_by_the_number_of_buffers_and_no_further():
    streamer, tier = slow_streamer(num_buffers=3)
    with closing(streamer):
        streamer.begin(blocks(8))
        taken = streamer.take(8)
        for num_copies in (3, 4, 5):
            next(taken)
            while len(tier.copies) < num_copies:
                time.sleep(COPY_SECONDS)
            time.sleep(3 * COPY_SECONDS)
            assert len(tier.copies) == num_copies
        streamer.cancel()


def test_copies_are_made_by_the_copy_thread():
    streamer, tier = slow_streamer()
    with closing(streamer):
        streamer.begin(blocks(3))
        values_taken(streamer, 3)
    assert all(name.startswith(COPY_THREAD) for name in tier.copies) and len(tier.copies) == 3


def test_there_is_no_way_to_a_buffer_but_take():
    streamer, _ = slow_streamer()
    public = {name for name in dir(streamer) if not name.startswith("_")}
    assert public == {"begin", "take", "end", "cancel", "close", "stats"}
    assert streamer.begin([]) is None


@pytest.mark.parametrize("num_taken", [0, 1, 2, 4, 6])
def test_a_pass_after_a_cancelled_one_sees_its_own_blocks_alone(num_taken):
    streamer, _ = slow_streamer()
    with closing(streamer):
        for first in (1, 100, 200):
            streamer.begin(blocks(6, first))
            values_taken(streamer, num_taken)
            streamer.cancel()
            streamer.begin(blocks(4, first + 50))
            assert values_taken(streamer, 4, seconds_per_block=COPY_SECONDS / 2) == numbers(4, first + 50)


def test_cancel_stops_the_copies_of_the_pass():
    streamer, tier = slow_streamer()
    with closing(streamer):
        streamer.begin(blocks(50))
        values_taken(streamer, 2)
        streamer.cancel()
        streamer.begin(blocks(1))
        values_taken(streamer, 1)
        assert len(tier.copies) <= 2 + 2 + 1 + 1  # taken, ahead, one given back, the second pass


@pytest.mark.parametrize("num_good", [0, 1, 3])
def test_error_of_a_copy_reaches_the_consumer_at_its_block_and_the_next_pass_works(num_good):
    streamer, _ = slow_streamer()
    with closing(streamer):
        bad = BlockInMemory(torch.full(BLOCK_SIZE, BROKEN))
        streamer.begin([*blocks(num_good), bad, *blocks(2)])
        taken = streamer.take(num_good + 3)
        for number in numbers(num_good):
            assert float(next(taken).flatten()[0]) == number
        with pytest.raises(OSError, match="cannot be read"):
            next(taken)
        streamer.cancel()
        streamer.begin(blocks(3))
        assert values_taken(streamer, 3) == numbers(3)


def test_a_pass_cannot_begin_before_the_last_one_was_taken():
    streamer, _ = slow_streamer()
    with closing(streamer):
        streamer.begin(blocks(3))
        values_taken(streamer, 2)
        with pytest.raises(AssertionError, match="1 blocks of the last one not taken"):
            streamer.begin(blocks(3))


def test_counts_bytes_exactly_and_seconds_and_stalls_of_slow_copies():
    streamer, _ = slow_streamer()
    with closing(streamer):
        began = time.perf_counter()
        for _ in range(2):
            streamer.begin(blocks(5))
            values_taken(streamer, 5)
        passed = time.perf_counter() - began
        stats = streamer.stats
        assert stats.num_bytes == 10 * BLOCK_BYTES
        assert 10 * COPY_SECONDS <= stats.seconds <= passed
        # The consumer does nothing but wait.
        assert 8 * COPY_SECONDS <= stats.stall_seconds <= passed


def test_a_consumer_slower_than_the_copies_hardly_stalls():
    streamer, _ = slow_streamer()
    with closing(streamer):
        streamer.begin(blocks(6))
        values_taken(streamer, 6, seconds_per_block=10 * COPY_SECONDS)
        stats = streamer.stats
        assert stats.stall_seconds < 0.8 * stats.seconds
        assert stats.hidden_share == pytest.approx(1 - stats.stall_seconds / stats.seconds)
    assert StreamStats().hidden_share is None


def test_counts_of_a_part_are_the_difference_of_those_of_the_whole():
    part = StreamStats(5_000_000_000, 7.0, 3.0).since(StreamStats(1_000_000_000, 3.0, 2.0))
    assert part == StreamStats(4_000_000_000, 4.0, 1.0)
    assert (part.gb_per_s, part.hidden_share) == (1.0, 0.75)
    assert StreamStats().gb_per_s == 0.0


def alive_copy_threads() -> int:
    return sum(thread.name.startswith(COPY_THREAD) for thread in threading.enumerate())


@pytest.mark.parametrize("num_taken", [None, 0, 2, 6])
def test_close_ends_the_thread_also_in_mid_pass(num_taken):
    before = alive_copy_threads()
    streamer, _ = slow_streamer()
    if num_taken is not None:
        streamer.begin(blocks(6))
        values_taken(streamer, num_taken)
        assert alive_copy_threads() == before + 1
    streamer.close()
    assert alive_copy_threads() == before
    streamer.close()


def test_there_is_no_thread_before_the_first_pass():
    before = alive_copy_threads()
    slow_streamer()
    assert alive_copy_threads() == before


def test_the_copy_thread_leaves_the_compute_threads_alone():
    before = torch.get_num_threads()
    streamer, _ = slow_streamer()
    with closing(streamer):
        streamer.begin(blocks(2))
        values_taken(streamer, 2)
        assert torch.get_num_threads() == before


def test_buffers_are_counted_by_their_tier():
    tier = PoisonedDeviceTier()
    streamer = make_streamer(BLOCK_SIZE, torch.float32, 3, tier, torch.device("cpu"))
    assert isinstance(streamer, CpuBlockStreamer)
    assert tier.used_bytes == 3 * BLOCK_BYTES


def test_more_blocks_than_the_pass_has_are_refused_at_once():
    streamer, _ = slow_streamer()
    streamer.begin(blocks(2))
    values_taken(streamer, 2)
    failures = []

    def ask():
        try:
            values_taken(streamer, 1)
        except AssertionError as error:
            failures.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(timeout=1)
    assert failures, "the consumer waits for a copy that nobody will make"
    streamer.close()


@pytest.mark.parametrize("num_threads", [1, 2, 4])
def test_blocks_copied_by_several_threads_come_in_order(num_threads):
    tier = SlowTier()
    streamer = CpuBlockStreamer(BLOCK_SIZE, torch.float32, 4, tier, num_threads=num_threads)
    with closing(streamer):
        streamer.begin(blocks(11))
        assert values_taken(streamer, 11) == numbers(11)


def test_time_in_which_several_copies_are_under_way_counts_once():
    streamer = CpuBlockStreamer(BLOCK_SIZE, torch.float32, 4, SlowTier(), num_threads=4)
    with closing(streamer):
        for span in ((1.0, 3.0), (2.0, 4.0), (2.5, 3.5), (6.0, 7.0)):
            streamer._count(100, *span)
        assert (streamer.stats.num_bytes, streamer.stats.seconds) == (400, 4.0)


class Clock:
    """In the place of the module `time`: sleeping is what makes time pass."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("tiers.link.time", clock)
    return clock


def test_copies_over_an_emulated_link_take_as_long_as_their_bytes(clock):
    link = Link(2.0)
    link.pace(clock.now, 3_000_000_000)
    assert clock.now == pytest.approx(101.5)
    clock.now += 0.0005  # a break so short that it is the sleep's own inexactness
    link.pace(clock.now, 2_000_000_000)
    assert clock.now == pytest.approx(102.5)
    clock.now += 5
    link.pace(clock.now, 2_000_000_000)
    assert clock.now == pytest.approx(108.5)


def test_copies_over_an_emulated_link_take_turns(clock):
    link = Link(1.0)
    for count in (1, 2, 3):  # all of them begin at once
        link.pace(100.0, 1_000_000_000)
        assert clock.now == pytest.approx(100.0 + count)


def test_a_copy_slower_than_the_emulated_link_does_not_wait(clock):
    link, began = Link(1.0), clock.now
    clock.now += 2
    link.pace(began, 1_000_000_000)
    assert clock.now == pytest.approx(102.0)


def test_without_a_link_nothing_waits(clock):
    Link(None).pace(clock.now, 10**15)
    assert clock.now == 100.0


def test_streamed_blocks_go_over_the_link():
    seconds = 0.01
    link = Link(BLOCK_BYTES / seconds / 1e9)
    streamer = CpuBlockStreamer(BLOCK_SIZE, torch.float32, 2, PoisonedDeviceTier(), link=link)
    with closing(streamer):
        streamer.begin(blocks(5))
        began = time.perf_counter()
        assert values_taken(streamer, 5) == numbers(5)
        assert time.perf_counter() - began > 3 * seconds
        assert streamer.stats.seconds > 4 * seconds


def test_writer_does_all_that_was_submitted_before_drain_returns():
    writer, written = BlockWriter(torch.device("cpu"), num_threads=3), []
    for index in range(20):
        writer.submit(lambda index=index: (time.sleep(0.001), written.append(index)))
    writer.drain()
    assert sorted(written) == list(range(20))
    writer.close()


def test_error_of_a_write_reaches_drain_and_the_next_writes_work():
    writer, written = BlockWriter(torch.device("cpu")), []

    def fail():
        raise OSError("the disk is full")

    writer.submit(fail)
    with pytest.raises(OSError, match="the disk is full"):
        writer.drain()
    writer.submit(lambda: written.append(1))
    writer.drain()
    assert written == [1]
    writer.close()


def test_cancelled_writes_are_over_when_cancel_returns():
    writer, written = BlockWriter(torch.device("cpu")), []
    for index in range(50):
        writer.submit(lambda index=index: (time.sleep(0.002), written.append(index)))
    writer.cancel()
    before = list(written)
    assert len(before) < 50
    time.sleep(0.01)
    assert written == before
    writer.drain()
    writer.close()
