"""How a program ends: its exit code, and the one message that says why."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from contextlib import suppress
from enum import IntEnum
from pathlib import Path

from conf.schema import ConfigError
from orchestrator.calls import RunFailedError
from orchestrator.placement import DRAFTER_ROLE, RETRIEVER_ROLE, VERIFIER_ROLE

FAILURE_LOG = "failure.log"
"""File in a run's folder with the traceback of its failure."""
TORCHRUN_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
ROLE_OF_FILE = {
    "drafter.py": DRAFTER_ROLE,
    "lookup_drafter.py": DRAFTER_ROLE,
    "retrieval_drafter.py": RETRIEVER_ROLE,
    "target_verifier.py": VERIFIER_ROLE,
}
"""Role that the code of a file in workers/ belongs to, for the message of a failure; all else is the orchestrator's."""


class ExitCode(IntEnum):
    """Exit codes of all programs."""

    done = 0
    failed = 1
    """A failure at run time."""
    refused = 2
    """A bad configuration or input."""
    interrupted = 130
    """Ctrl-C, SIGTERM or SIGHUP, as shells report a Ctrl-C."""


def refuse(error: ConfigError) -> ExitCode:
    """Prints the refusal's message on standard error."""
    _say(str(error))
    return ExitCode.refused


def fail(error: Exception, phase: str, folder: Path) -> ExitCode:
    """Prints one line with the root cause of a failure; the traceback goes to FAILURE_LOG in `folder`."""
    root: BaseException = error
    while root.__cause__ is not None:
        root = root.__cause__
    reason = (str(root).splitlines() or [""])[0]
    role, rank = (error.role, error.rank) if isinstance(error, RunFailedError) else (role_of(error), 0)
    where = f"phase {phase}, role {role}, rank {rank}"
    log = write_traceback(error, folder / FAILURE_LOG)
    _say(f"failed in {where}: {type(root).__name__}: {reason} ({log})")
    return ExitCode.failed


def _say(line: str) -> None:
    """Why the program ends: on standard error, and to torchrun, whose report then says the same and no riddles.

    torchrun reads a file that it names in the environment, as torch.distributed's `record` writes it.
    """
    print(f"tierforce: {line}", file=sys.stderr, flush=True)
    if path := os.environ.get(TORCHRUN_ERROR_FILE):
        told = {"message": {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}}
        with suppress(OSError):  # torchrun's report is then as it is of any program
            Path(path).write_text(json.dumps(told), encoding="utf-8")


def write_traceback(error: Exception, path: Path) -> str:
    """Tells where the traceback was written, or why it was not: a full disk must not hide what went wrong."""
    try:
        path.write_text("".join(traceback.format_exception(error)), encoding="utf-8", errors="backslashreplace")
    except OSError as failure:
        return f"no traceback written: {failure.strerror}"
    return f"traceback: {shown_path(path)}"


def shown_path(path: Path) -> str:
    """A path as one would type it here: relative where it is below the current folder, else absolute."""
    try:
        here = Path.cwd()
    except OSError:  # it was removed
        return str(path)
    path = path.absolute()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def role_of(error: BaseException) -> str:
    """Name of the role whose code the error came through; else `orchestrator`."""
    for frame in traceback.extract_tb(error.__traceback__):
        path = Path(frame.filename)
        if path.parent.name == "workers" and path.name in ROLE_OF_FILE:
            return ROLE_OF_FILE[path.name]
    return "orchestrator"
