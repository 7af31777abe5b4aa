"""launch/command_line/streams.py and program.py: who reads the output may go, the program goes on."""

import io
import os
import subprocess
import sys

import pytest

from launch.command_line.streams import LastingStream, lasting_streams, reason_output_is_lost

PROGRAM = """
import sys
from functools import partial
from pathlib import Path
from launch.command_line.program import program

def body(argv):
    for _ in range(3):
        print("x" * 70_000, flush=True)
    print("not flushed", end="")
    Path("done").write_text("file")
    print("said", file=sys.stderr)
    return 0

sys.exit(partial(program, prints_result="result" in sys.argv)(body)())
"""


class FullDisk(io.StringIO):
    """Takes two writes."""

    def __init__(self):
        super().__init__()
        self.num_tries = 0

    def write(self, text: str) -> int:
        self.num_tries += 1
        if self.num_tries > 2:
            raise OSError(28, "No space left on device")
        return super().write(text)


def test_a_stream_takes_all_and_tries_no_more_after_its_first_failure():
    full = FullDisk()
    stream = LastingStream(full)
    assert [stream.write(text) for text in ("a", "b", "ccc", "dd")] == [1, 1, 3, 2]
    stream.writelines(["e", "f"])
    stream.flush()
    assert (full.getvalue(), full.num_tries) == ("ab", 3)
    assert stream.failure is not None and stream.failure.errno == 28
    assert not stream.isatty() and not stream.closed


def test_the_streams_come_back(monkeypatch):
    mine, errors = FullDisk(), FullDisk()
    monkeypatch.setattr(sys, "stdout", mine)
    monkeypatch.setattr(sys, "stderr", errors)
    with lasting_streams() as output:
        for _ in range(3):
            assert reason_output_is_lost() is None
            sys.stdout.write("x")
        assert reason_output_is_lost() == "No space left on device" and output.failure is not None
    assert sys.stdout is mine and sys.stderr is errors and reason_output_is_lost() is None


def ended(tmp_path, redirection: str, *arguments: str) -> subprocess.CompletedProcess:
    """Of PROGRAM, started by a shell, with the exit code of the program and not of who reads."""
    command = f'"$0" -c "$1" {" ".join(arguments)} {redirection}'
    shell = ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}", sys.executable, PROGRAM]
    return subprocess.run(shell, cwd=tmp_path, capture_output=True, text=True, timeout=60, env=dict(os.environ))


@pytest.mark.parametrize(
    ("redirection", "says"),
    [
        ("| head -c 1", "said\n"),
        (">&-", "said\n"),
        ("> /dev/full", "said\ntierforce: standard output was not written: No space left on device\n"),
        ("> /dev/full 2> /dev/full", ""),
        (">&- 2>&-", ""),
        ("<&- >&- 2>&-", ""),
        ("2>&1 | head -c 1", ""),
    ],
)
def test_a_program_whose_output_is_gone_does_its_work(tmp_path, redirection, says):
    done = ended(tmp_path, redirection)
    assert (done.returncode, done.stderr) == (0, says)
    assert (tmp_path / "done").read_text() == "file"


def test_where_the_output_is_the_result_a_full_disk_is_a_failure_and_a_reader_who_leaves_is_none(tmp_path):
    assert ended(tmp_path, "> /dev/full", "result").returncode == 1
    assert ended(tmp_path, "| head -c 1", "result").returncode == 0
