"""The files of a model's folder: all of its weights are there and whole, and nothing is there that would be ignored."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME

from conf.model_source import ADAPTER_CONFIG_NAME, adapter_rule
from conf.schema import ConfigError

WEIGHT_FILES = (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME)
ADAPTER_FILES = (ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME)


def check_no_adapter(key: str, source: str) -> None:
    """Raises ConfigError where an adapter is beside the weights of a folder or a hub id.

    transformers applies it where peft is installed; here it is never applied, and never left out in silence.
    """
    for name in ADAPTER_FILES:
        path = cached_file(
            source,
            name,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if path is not None:
            rule = adapter_rule(Path(path).with_name(ADAPTER_CONFIG_NAME))
            raise ConfigError(f"{key} is {source!r}, where {name} is of an adapter beside the weights; {rule}")


def check_weight_files(key: str, folder: Path) -> None:
    """Raises ConfigError unless each file of weights is there, and if it is safetensors, whole."""
    first = next((name for name in WEIGHT_FILES if (folder / name).is_file()), SAFE_WEIGHTS_NAME)
    gguf = sorted(path.name for path in folder.glob("*.gguf"))
    if gguf and not (folder / first).is_file():
        raise ConfigError(
            f"{key} is {str(folder)!r}, whose weights are in {gguf[0]}; GGUF files are not read here: download the "
            "model as safetensors"
        )
    names = [first]
    if first.endswith(".index.json"):
        try:
            names = sorted(set(json.loads((folder / first).read_text())["weight_map"].values()))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ConfigError(f"{key}: {folder / first} is damaged ({error!r}); download it again") from error
    for path in (folder / name for name in names):
        if not path.is_file():
            raise ConfigError(f"{key}: {path} is missing; download the model again, as safetensors")
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, framework="pt") as file:
                    file.keys()
            except (SafetensorError, OSError) as error:
                raise ConfigError(f"{key}: {path} is damaged ({error}); download it again") from error
