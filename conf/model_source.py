"""Source of a model by its name: a local folder or the hub. Standard library only."""

import json
from pathlib import Path

from conf.values import ConfigError

PROJECT_ROOT = Path(__file__).resolve().parents[1]
ADAPTER_CONFIG_NAME = "adapter_config.json"


def model_source(key: str, name: str) -> str:
    """Returns an existing folder (a relative one is looked for here, then in the project), else `name` as a hub id.

    Raises ConfigError where `key`'s value can be neither.
    """
    for folder in (Path(name).expanduser(), PROJECT_ROOT / name):
        if folder.is_dir():
            if not (folder / "config.json").is_file():
                raise ConfigError(f"{key} is {name!r}; the folder {folder} {_instead_of_model(folder)}")
            return str(folder)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError(f"{key} is {name!r}; there is no such folder: name a local folder or a hub id (owner/name)")
    return name


def _instead_of_model(folder: Path) -> str:
    """What a folder without config.json is, and a way out."""
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        return f"has an adapter and no model; {adapter_rule(folder / ADAPTER_CONFIG_NAME)}"
    if gguf := sorted(path.name for path in folder.glob("*.gguf")):
        return f"has no config.json, and {gguf[0]} is not read here: download the model as safetensors"
    return "has no config.json: name a model's folder"


def adapter_rule(adapter_config: Path) -> str:
    """What can be done with an adapter, whose model its configuration names."""
    try:
        base = json.loads(adapter_config.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, LookupError, TypeError):
        base = None
    of_base = "the model that it was trained for" if base is None else repr(base)
    return (
        f"adapters are not applied here: merge it into {of_base} (peft: merge_and_unload, then save_pretrained) and "
        "name the merged folder, or a folder with the weights alone"
    )
