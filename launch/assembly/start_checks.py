"""Checks of all that can be known to be wrong before a run loads anything."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from conf.model_source import model_source
from conf.schema import LOOKUP_DRAFTER, NO_DRAFTER, ConfigError, RunConfig
from launch.command_line.cluster import check_meeting_point, read_place
from launch.prompts.document import check_document
from orchestrator.placement import place

MAX_SHOWN_CHARS = 200


def check_start(config: RunConfig, num_processes: int | None = None) -> None:
    """Raises ConfigError where the placement, the folders, the prompt or the models' names cannot be right.

    `num_processes` is the run's number of processes, if not those that torchrun started.
    """
    place(config.placement, num_processes or world_size())
    if num_processes is None and world_size() > 1:
        check_meeting_point(os.environ)
    check_folder("output", config.output, "outputs/run")
    if config.tiers.disk.folder is not None:
        check_folder("tiers.disk.folder", config.tiers.disk.folder, "outputs/disk")
    check_document(config.prompt)
    model_source("model.target", config.model.target)
    if config.model.drafter not in (LOOKUP_DRAFTER, NO_DRAFTER):
        model_source("model.drafter", config.model.drafter)


def world_size() -> int:
    """Number of processes that torchrun started; 1 without it. Raises ConfigError."""
    return read_place(os.environ).world_size


def check_folder(key: str, folder: str, example: str) -> None:
    """Raises ConfigError unless the folder is there or can be made, and can be written; leaves nothing behind.

    `key` is where the user named it, `example` a folder that would do.
    """
    if not folder or "\0" in folder:
        raise ConfigError(f"{key} is {folder!r}; it must be a folder that can be written, for example {example}")
    nearest = Path(folder).absolute()
    missing: list[str] = []
    try:
        # os.path.lexists, and not exists: a link to what is not there is in the way of a folder.
        while not os.path.lexists(nearest):
            missing.append(nearest.name)
            nearest = nearest.parent
        with tempfile.TemporaryDirectory(dir=nearest) as trial:
            # A name alone may be one that the file system does not take.
            for name in missing:
                Path(trial, name).mkdir(exist_ok=True)
    except OSError as error:
        raise unwritable(key, folder, error, example, nearest) from None


def unwritable(key: str, folder: str, error: OSError, example: str, where: Path | None = None) -> ConfigError:
    """The refusal of a folder that cannot be made or written; `where` is what is in the way, if it is known."""
    nearest = where or Path(error.filename or folder)
    reason = error.strerror or str(error)
    if os.path.islink(nearest) and not os.path.exists(nearest):  # of any length, which Path's own refuse to look at
        reason = f"a link to {os.readlink(nearest)}, which is not there"
    return ConfigError(
        f"{key} is {folder[:MAX_SHOWN_CHARS]!r}, but {str(nearest)[:MAX_SHOWN_CHARS]} cannot be written ({reason}); "
        f"it must be a folder that can be written, for example {example}"
    )
