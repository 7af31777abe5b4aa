"""Clocks of measurements."""

import subprocess
import sys
from datetime import datetime

import pytest

from launch.command_line import timing


@pytest.fixture
def clock(monkeypatch):
    """A clock that its readers see one second later each time."""
    readings = iter(range(1000))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(readings)))


def test_a_stopwatch_adds_up_its_blocks_and_starts_again(clock):
    watch = timing.Stopwatch()
    for _ in range(3):
        with watch:
            pass
    assert watch.seconds == 3
    watch.reset()
    assert watch.seconds == 0


def test_a_stopwatch_counts_a_block_that_fails(clock):
    watch = timing.Stopwatch()
    with pytest.raises(RuntimeError), watch:
        raise RuntimeError
    assert watch.seconds == 1


def test_warm_up_calls_are_made_and_not_counted(clock):
    calls = []
    assert timing.repeated_seconds(lambda: calls.append(1), 3, warm_up=2) == [1, 1, 1]
    assert len(calls) == 5


def test_a_median_leaves_out_what_is_not_known():
    assert timing.median_or_none([1.0, None, 3.0]) == 2
    assert timing.median_or_none([None]) is None


def test_the_time_of_day_has_its_zone():
    assert datetime.fromisoformat(timing.utc_now()).utcoffset().total_seconds() == 0


def test_clocks_do_not_load_torch():
    code = "import sys, launch.command_line.timing, launch.command_line.tables; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
