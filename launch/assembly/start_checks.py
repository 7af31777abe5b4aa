"""Checks of all that can be known to be wrong before a run loads anything."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from conf.model_source import model_source
from conf.schema import LOOKUP_DRAFTER, NO_DRAFTER, ConfigError, RunConfig
from launch.prompts.document import check_document
from orchestrator.placement import place


def check_start(config: RunConfig, num_processes: int | None = None) -> None:
    """Raises ConfigError where the placement, the folders, the prompt or the models' names cannot be right.

    `num_processes` is the run's number of processes, if not those that torchrun started.
    """
    place(config.placement, num_processes or world_size())
    check_folder("output", config.output, "outputs/run")
    if config.tiers.disk.folder is not None:
        check_folder("tiers.disk.folder", config.tiers.disk.folder, "outputs/disk")
    check_document(config.prompt)
    model_source("model.target", config.model.target)
    if config.model.drafter not in (LOOKUP_DRAFTER, NO_DRAFTER):
        model_source("model.drafter", config.model.drafter)


def world_size() -> int:
    """Number of processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_folder(key: str, folder: str, example: str) -> None:
    """Raises ConfigError unless the folder is there or can be made, and can be written; leaves nothing behind.

    `key` is where the user named it, `example` a folder that would do.
    """
    example = f"a folder that can be written, for example {example}"
    if not folder or "\0" in folder:
        raise ConfigError(f"{key} is {folder!r}; it must be {example}")
    nearest = Path(folder).absolute()
    try:
        while not nearest.exists():
            nearest = nearest.parent
        tempfile.TemporaryDirectory(dir=nearest).cleanup()
    except OSError as error:
        raise ConfigError(
            f"{key} is {folder!r}, but {nearest} cannot be written ({error.strerror}); it must be {example}"
        ) from None
