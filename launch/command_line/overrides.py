"""Overrides of the command line: everything that can be wrong with them is said in one message, before Hydra says it.

Hydra's own refusal of a bad override names no legal value and exits with code 1; so each is checked here first, by
itself and against the schema, and then all together by composing the configuration once.
"""

from __future__ import annotations

import difflib
import os
import typing
from dataclasses import fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.schema import AUTO, ConfigError, PlacementConfig, RunConfig
from launch.command_line.as_typed import as_typed, is_in_quotes

CONFIG_FOLDER = Path(__file__).resolve().parents[2] / "conf"
GROUPS = ("model", "placement")
MAX_SHOWN_CHARS = 200
MAX_LIST_CHARS = 10_000
"""Of a list or dictionary; Hydra takes seconds to parse a longer one."""

ConfigStore.instance().store(name="run_schema", node=RunConfig)
# Hydra makes a run's folder before the configuration is an object that has expanded its paths.
OmegaConf.register_new_resolver("expand_home", os.path.expanduser, replace=True)


def read_config(overrides: list[str]) -> RunConfig:
    """The configuration that these overrides make; raises ConfigError for the first thing wrong with them."""
    parsed = [parse_override(text) for text in overrides]
    for override in parsed:
        check_override(override)
    try:
        with hydra.initialize_config_dir(str(CONFIG_FOLDER), version_base=None):
            return to_config(hydra.compose("run", overrides=[as_typed(text, RunConfig) for text in overrides]))
    except (HydraException, OmegaConfBaseException) as error:
        raise explained(error, parsed) from None


def to_config(composed: DictConfig) -> RunConfig:
    """The configuration that Hydra composed, as an object that has checked itself. Raises ConfigError."""
    config = OmegaConf.to_object(composed)
    assert isinstance(config, RunConfig), f"conf/run.yaml is composed to {type(config).__name__}"
    return config


def start_timeout_s(overrides: list[str]) -> float:
    """Seconds in which a rank other than the orchestrator's looks for it.

    That is all there is to know there; what is wrong with the overrides is said by the orchestrator.
    """
    try:
        return read_config([item for item in overrides if not item.startswith("-")]).placement.start_timeout_s
    except ConfigError:
        return PlacementConfig().start_timeout_s


def compose_program(name: str, overrides: list[str], keys: str) -> Any:
    """The configuration conf/<name>.yaml with these overrides, for a program whose `keys` are documented there.

    With --help it prints the defaults, and ends the program. Raises ConfigError.
    """
    if {"--help", "-h"} & set(overrides):
        with hydra.initialize_config_dir(str(CONFIG_FOLDER), version_base=None):
            defaults = OmegaConf.to_yaml(hydra.compose(name))
        print(f"{defaults}\n# Change them by key=value; what each means: {keys}")
        raise SystemExit(0)
    schema = OmegaConf.get_type(ConfigStore.instance().load(f"{name}_schema.yaml").node)
    assert schema is not None
    try:
        with hydra.initialize_config_dir(str(CONFIG_FOLDER), version_base=None):
            return OmegaConf.to_object(hydra.compose(name, overrides=[as_typed(text, schema) for text in overrides]))
    except (HydraException, OmegaConfBaseException) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        message = f"{' '.join(overrides)} was refused: {reason} (keys: {keys})"
        raise ConfigError(message + reference_hint(message)) from None


def parse_override(text: str, schema: type = RunConfig, *, is_sweep: bool = False) -> Override:
    """The override of this text, texts in it as they were typed (see as_typed). Raises ConfigError."""
    key, equals, value = text.partition("=")
    if not key or not (equals or key.startswith("~")):
        raise ConfigError(f"{shortened(text)!r} must be key=value, for example decoding.gamma1=2")
    if any("\ud800" <= character <= "\udfff" for character in text):  # so Python shows bytes that are not UTF-8
        raise ConfigError(f"{key} is {shortened(value)!r}; it must be UTF-8: convert it, or put it into a file")
    text = as_typed(text, schema, is_sweep=is_sweep)
    if text.partition("=")[2][:1] in ("[", "{") and len(value) > MAX_LIST_CHARS:
        raise ConfigError(f"{key} is {shortened(value)!r}; it must have at most {MAX_LIST_CHARS} characters")
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        reason = str(error).splitlines()[0]
        known = key.lstrip("+") in schema_kinds(schema)
        rule = f"; it must be {legal_value(key.lstrip('+'), schema)}" if known else ""
        quotes = "; between commas, texts with special characters must be in quotes" if set(value) & set("[{,") else ""
        raise ConfigError(f"{key} is {shortened(value)!r}, which cannot be parsed ({reason}){rule}{quotes}") from None


def check_override(override: Override, schema: type = RunConfig, groups: tuple[str, ...] = GROUPS) -> None:
    """Key, type and group choice; the values themselves are checked by the schema."""
    key = override.key_or_group
    if key.split(".")[0].split("/")[0] == "hydra":
        return
    if key in groups:
        check_choice(override)
        return
    kinds = schema_kinds(schema)
    if key not in kinds:
        raise ConfigError(unknown_key(key, text_of(override), schema))
    if override.is_delete():
        return
    if override.is_sweep_override():
        raise ConfigError(
            f"{key} is {text_of(override)!r}, which reads as several values; it must be {legal_value(key, schema)}"
        )
    try:
        OmegaConf.update(OmegaConf.structured(schema), key, override.value())
    except OmegaConfBaseException as error:
        # Of key={inner: value} the inner key is at fault.
        inner = error.full_key if error.full_key in kinds else key
        subject = "it" if inner == key else inner
        rule = legal_value(inner, schema) + reference_hint(text_of(override))
        raise ConfigError(f"{key} is {text_of(override)!r}; {subject} must be {rule}") from None
    value = override.value()
    is_nested = (
        kinds[key][0] == list[str] and isinstance(value, list) and not all(isinstance(item, str) for item in value)
    )
    if is_nested or (is_auto_count(kinds[key][0]) and isinstance(value, str) and value != AUTO):
        raise ConfigError(f"{key} is {text_of(override)!r}; it must be {legal_value(key, schema)}")


def is_auto_count(kind: Any) -> bool:
    """An integer, or `auto`."""
    return set(typing.get_args(kind)) == {int, str}


def check_choice(override: Override) -> None:
    group = override.key_or_group
    choices = sorted(path.stem for path in (CONFIG_FOLDER / group).glob("*.yaml"))
    if not override.is_delete() and override.value() not in choices:
        one_key = next((key for key in schema_kinds() if key.startswith(f"{group}.")), None)
        hint = f" (one key of it is set by its full name: {one_key}=...)" if one_key else ""
        raise ConfigError(f"{group} is {text_of(override)!r}; it must be one of {', '.join(choices)}{hint}")


def schema_kinds(schema: type = RunConfig) -> dict[str, tuple[Any, Any]]:
    """Every key of the schema, with its type and default."""
    return dict(_walk("", schema()))


def _walk(prefix: str, config: Any) -> typing.Iterator[tuple[str, tuple[Any, Any]]]:
    hints = typing.get_type_hints(type(config))
    for item in fields(config):
        value = getattr(config, item.name)
        yield prefix + item.name, (hints[item.name], value)
        if is_dataclass(value):
            yield from _walk(f"{prefix}{item.name}.", value)


def legal_value(key: str, schema: type = RunConfig) -> str:
    """What the type of a key allows, in words, with an example."""
    kind, default = schema_kinds(schema)[key]
    if is_dataclass(kind):
        return f"left whole: set one of its keys, {', '.join(f'{key}.{item.name}' for item in fields(kind))}"
    if typing.get_origin(kind) is list:
        return f"a list of texts, for example {key}='[\"###\"]'"
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return f"one of {', '.join(kind)}"
    types = typing.get_args(kind) or (kind,)
    words = {bool: "true or false", int: "an integer", float: "a number", str: "a text"}[types[0]]
    or_null = " or null" if type(None) in types else " or auto" if is_auto_count(kind) else ""
    if types[0] is bool:
        return words + or_null
    example = default if default is not None else {int: 1000, float: 8, str: f'{key}="some, text"'}[types[0]]
    return f"{words}{or_null}, for example {example}"


def unknown_key(key: str, value: str, schema: type) -> str:
    """Names the nearest legal key: one spelled alike, or one whose last part is."""
    known = schema_kinds(schema)
    by_last_part = {name.rpartition(".")[2]: name for name in known}
    alike = difflib.get_close_matches(key.rpartition(".")[2], by_last_part, n=1)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.75) or [by_last_part[name] for name in alike]
    if near:
        rule = legal_value(near[0], schema)
        return f"there is no key {key} (given {value!r}); did you mean {near[0]}? It must be {rule}"
    first_parts = sorted({name.partition(".")[0] for name in known})
    return f"there is no key {key} (given {value!r}); keys begin with {', '.join(first_parts)} (all: --cfg job)"


def text_of(override: Override) -> str:
    """The value as it was typed, but for quotes around the whole of it."""
    value = (override.input_line or "").partition("=")[2]
    return shortened(str(override.value()) if is_in_quotes(value) else value)


def reference_hint(text: str) -> str:
    """What to say where a text was refused that has a reference, or what reads as one."""
    return "; ${...} refers to another key, and \\${ is a literal ${" if "${" in text else ""


def shortened(text: str) -> str:
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]}..."


def explained(error: Exception, overrides: list[Override]) -> ConfigError:
    """What Hydra or OmegaConf refused though each override by itself is well formed: $-references, deletions."""
    reason = str(error.__cause__ or error).splitlines()[0]
    full_key = (getattr(error.__cause__ or error, "full_key", None) or "").partition("[")[0]
    culprits = [item for item in overrides if item.key_or_group == full_key or (item.input_line or "?") in str(error)]
    if not culprits:
        return ConfigError(f"the configuration was refused: {reason}")
    key, value = culprits[0].key_or_group, text_of(culprits[0])
    legal = f"; it must be {legal_value(key)}" if key in schema_kinds() else ""
    return ConfigError(f"{f'{key}={value}'!r} was refused ({reason}){legal}{reference_hint(value)}")
