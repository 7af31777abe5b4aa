"""The one way to start a program of launch/:

@program
def main(argv: list[str]) -> int: ...

if __name__ == "__main__":
    sys.exit(main())
"""

from __future__ import annotations

import errno
import functools
import io
import os
import sys
from collections.abc import Callable

from conf.schema import ConfigError
from launch.command_line.outcome import ExitCode, refuse
from launch.command_line.streams import lasting_streams


def program(body: Callable[[list[str]], int], *, prints_result: bool = False) -> Callable[..., int]:
    """Makes a program's `main` of `body`, which takes the command line without the program's name.

    `main(argv=None)` takes the process's own command line if there is no `argv`, and returns the exit code. A
    ConfigError becomes one message and ExitCode.refused, Ctrl-C ExitCode.interrupted. A standard output that is gone
    does not end it; where its result is what it prints (`prints_result`), a full disk there is ExitCode.failed.
    """

    @functools.wraps(body)
    def main(argv: list[str] | None = None) -> int:
        if argv is None and isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # text may hold what the terminal's encoding does not
        # transformers' advice to its callers is no message to the user.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        with lasting_streams() as output:
            try:
                code = body(sys.argv[1:] if argv is None else argv)
            except ConfigError as error:
                code = refuse(error)
            except KeyboardInterrupt:
                code = ExitCode.interrupted
            output.flush()
            # Whoever closed a pipe has read what he wanted.
            if output.failure is not None and output.failure.errno != errno.EPIPE:
                print(f"tierforce: standard output was not written: {output.failure.strerror}", file=sys.stderr)
                code = ExitCode.failed if prints_result and code == ExitCode.done else code
            return code

    return main
