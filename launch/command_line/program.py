"""The one way to start a program of launch/:

@program
def main(argv: list[str]) -> int: ...

if __name__ == "__main__":
    sys.exit(main())
"""

from __future__ import annotations

import functools
import io
import os
import sys
from collections.abc import Callable

from conf.schema import ConfigError
from launch.command_line.outcome import ExitCode, refuse


def program(body: Callable[[list[str]], int]) -> Callable[..., int]:
    """Makes a program's `main` of `body`, which takes the command line without the program's name.

    `main(argv=None)` takes the process's own command line if there is no `argv`, and returns the exit code. A
    ConfigError becomes one message and ExitCode.refused, Ctrl-C ExitCode.interrupted.
    """

    @functools.wraps(body)
    def main(argv: list[str] | None = None) -> int:
        if argv is None and isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # text may hold what the terminal's encoding does not
        # transformers' advice to its callers is no message to the user.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        try:
            return body(sys.argv[1:] if argv is None else argv)
        except ConfigError as error:
            return refuse(error)
        except KeyboardInterrupt:
            return ExitCode.interrupted

    return main
