"""A run's folder, its own while it runs: claimed by a locked file, which the system frees when the run dies."""

from __future__ import annotations

import fcntl
import itertools
import os
import platform
from contextlib import suppress
from pathlib import Path

from conf.schema import ConfigError
from launch.assembly.start_checks import unwritable
from launch.command_line.outcome import shown_path
from orchestrator.run_files import RESULT, ROUNDS

LOCK = "run.lock"
"""Says who runs in the folder, and is locked as long as he does."""
EXAMPLE = "outputs/run"


class RunFolder:
    """A context manager: within it no other run has the folder `path`."""

    def __init__(self, path: Path, lock: int):
        self.path, self._lock = path, lock

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):  # where the folder cannot be written any more, the lock ends with this process
            (self.path / LOCK).unlink(missing_ok=True)
        os.close(self._lock)


def claim(folder: Path, *, is_chosen: bool) -> RunFolder:
    """Makes and claims a run's folder.

    One that the user has chosen may hold an earlier run's files, which the new one replaces; a default one that is
    taken, or holds a run's files, is left alone, and `-2` added to its name, or the next number that is free. Raises
    ConfigError for a chosen folder where another run is at work, and for one that cannot be made or written.
    """
    for number in itertools.count(1):
        path = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = locked_file(path / LOCK)
        except OSError as error:
            with suppress(OSError):
                path.rmdir()  # if it is empty
            raise unwritable("output", shown_path(folder), error, EXAMPLE, path) from None
        if lock is None and is_chosen:
            raise ConfigError(
                f"output is {shown_path(folder)!r}, where another run is at work ({_owner(path / LOCK)}); it must be a "
                f"folder of its own, for example {folder.name}-2"
            )
        if lock is None:
            continue
        claimed = RunFolder(path, lock)
        if is_chosen or not any((path / name).exists() for name in (ROUNDS, RESULT)):
            return claimed
        claimed.__exit__()
    raise AssertionError("numbers do not end")


def locked_file(path: Path) -> int | None:
    """Descriptor of the file, made and locked; None where another process has locked it. Raises OSError."""
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        except OSError:
            pass  # a file system without locks: then a default folder is told from others by its files alone
        if not _is_at(path, lock):  # its owner removed it as it ended, before it was locked here
            os.close(lock)
            continue
        try:
            os.truncate(lock, 0)
            os.pwrite(lock, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)
        except OSError:
            path.unlink(missing_ok=True)
            os.close(lock)
            raise
        return lock


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether an open file is still the one at `path`."""
    return path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())


def _owner(path: Path) -> str:
    """Who has locked this file, as he wrote there."""
    try:
        return path.read_text(encoding="utf-8").strip() or "it has just begun"
    except OSError:
        return "it has just ended"
