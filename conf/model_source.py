"""Source of a model by its name: a local folder or the hub. Standard library only."""

from pathlib import Path

from conf.values import ConfigError

PROJECT_ROOT = Path(__file__).resolve().parents[1]


def model_source(key: str, name: str) -> str:
    """Returns an existing folder (a relative one is looked for here, then in the project), else `name` as a hub id.

    Raises ConfigError where `key`'s value can be neither.
    """
    for folder in (Path(name).expanduser(), PROJECT_ROOT / name):
        if folder.is_dir():
            if not (folder / "config.json").is_file():
                raise ConfigError(f"{key} is {name!r}; the folder {folder} has no config.json: name a model's folder")
            return str(folder)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError(f"{key} is {name!r}; there is no such folder: name a local folder or a hub id (owner/name)")
    return name
