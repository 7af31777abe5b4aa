"""Standard output and error that a program outlives: a reader that went away, a full disk, a closed terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast


class LastingStream:
    """A text stream that never fails: from the first error on nothing more is written, and `failure` is that error.

    What else a stream has, it has from the one it stands for.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        """Number of characters taken, which is all of them."""
        if self.failure is None:
            try:
                return self._stream.write(text)
            except OSError as error:
                self._give_up(error)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if self.failure is None:
            try:
                self._stream.flush()
            except OSError as error:
                self._give_up(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _give_up(self, error: OSError) -> None:
        """Sends the rest nowhere, also what the stream below still holds and would write when Python ends."""
        self.failure = error
        with suppress(OSError, AttributeError):  # a stream without a file descriptor has nothing to redirect
            descriptor = self._stream.fileno()
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, descriptor)
            os.close(null)


@contextmanager
def lasting_streams() -> Iterator[LastingStream]:
    """Within it sys.stdout, which it gives, and sys.stderr never fail; one that the caller closed goes nowhere."""
    with suppress(OSError):
        # Else the next file to be opened would be what libraries take for the standard output.
        while (lowest := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(lowest)
    earlier = sys.stdout, sys.stderr
    output, errors = (LastingStream(stream or open(os.devnull, "w")) for stream in earlier)  # noqa: SIM115
    sys.stdout, sys.stderr = cast(TextIO, output), cast(TextIO, errors)
    try:
        yield output
    finally:
        output.flush()
        errors.flush()
        sys.stdout, sys.stderr = earlier


def reason_output_is_lost() -> str | None:
    """Why nothing more can be written to the standard output; None: it can."""
    failure = sys.stdout.failure if isinstance(sys.stdout, LastingStream) else None
    return None if failure is None else failure.strerror or str(failure)
