"""The configuration of a sweep: that of a run at the top level, so that overrides read as for launch/run.py, and a few
keys more; and what it makes: the grid of its jobs, checked before any of them starts."""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.schema import STANDARD_INPUT, ConfigError, RunConfig, require
from launch.assembly.start_checks import check_start
from launch.command_line.as_typed import as_typed
from launch.command_line.overrides import CONFIG_FOLDER, GROUPS, check_override, explained, parse_override
from launch.sweeps.table import METRICS

SWEEP_GROUPS = (*GROUPS, "experiment")
BASIC_SWEEPER = "BasicSweeper"
NOT_SWEPT = ("output", "experiment", "repeat", "objective", "resume")


@dataclass(kw_only=True, slots=True)
class SweepConfig(RunConfig):
    """A run, and how it is repeated and recorded."""

    output: str = "outputs/sweep"
    """Folder of the sweep: the table, and a folder for each job. A sweep in the same folder takes up what is there."""
    processes: int = 1
    """Processes of each job: above 1 it is started by torchrun."""
    repeat: int = 1
    """Runs of each setting, for the noise of its times; in a grid all settings are run once before any is again."""
    repetition: int | None = None
    """Only this one of them; null: all."""
    resume: bool = True
    """Leave out jobs that have a complete result in the folder."""
    objective: str = "tbt_ms"
    """Column of the table that an optimising sweeper minimises; with a minus (-tokens_per_s), maximises."""
    timeout_s: float | None = None
    """A job that takes longer is ended, and has failed; null: no limit."""

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        legal = self.prompt.path != STANDARD_INPUT
        require(legal, "prompt.path", self.prompt.path, "a file, which each job reads anew, for example book.txt")
        require(self.processes >= 1, "processes", self.processes, ">= 1, for example 5 for a pipeline")
        require(self.repeat >= 1, "repeat", self.repeat, ">= 1, for example 3")
        legal = self.repetition is None or self.repetition >= 1
        require(legal, "repetition", self.repetition, ">= 1, or null for all of them")
        legal = self.objective.removeprefix("-") in METRICS
        require(legal, "objective", self.objective, "a measured column of the table, for example tbt_ms")
        legal = self.timeout_s is None or (math.isfinite(self.timeout_s) and self.timeout_s > 0)
        require(legal, "timeout_s", self.timeout_s, "a number of seconds above 0, or null")


ConfigStore.instance().store(name="sweep_schema", node=SweepConfig)


def refusal_of(cfg: DictConfig) -> ConfigError | None:
    """The reason why this configuration cannot be run here; None: it can."""
    try:
        config = OmegaConf.to_object(cfg)
        assert isinstance(config, SweepConfig)
        check_start(config, config.processes)
    except ConfigError as error:
        return error
    except OmegaConfBaseException as error:
        return explained(error, [])
    return None


@dataclass(kw_only=True)
class Sweep:
    """A sweep that the command line asks for, checked."""

    arguments: list[str]
    """The command line for Hydra."""
    cfg: DictConfig
    """The configuration of everything that is not swept."""
    grid: list[DictConfig] | None
    """The configuration of each job; None where a sweeper chooses as it goes."""
    num_jobs: int | None
    """Number of settings, which Hydra calls jobs; None where it is not known."""
    axes: list[str]
    """The keys that are swept."""


def read_sweep(overrides: list[str], *, is_multirun: bool) -> Sweep:
    """The sweep that these overrides ask for.

    Raises ConfigError for what can be right in no job; a combination of the grid may still be refused.
    """
    overrides = [as_typed(text, SweepConfig, is_sweep=is_multirun) for text in overrides]
    parsed = [parse_override(text, SweepConfig, is_sweep=is_multirun) for text in overrides]
    fixed: list[str] = []
    axes: dict[str, list[str]] = {}
    for text, override in zip(overrides, parsed, strict=True):
        if is_multirun and override.is_sweep_override():
            _add_axis(axes, override)
        else:
            check_override(override, SweepConfig, SWEEP_GROUPS)
            fixed.append(text)
    with hydra.initialize_config_dir(str(CONFIG_FOLDER), version_base=None):
        base = _composed(fixed, parsed, with_hydra=True)
        sweeper = base.hydra.sweeper
        is_grid = sweeper._target_.rpartition(".")[2] == BASIC_SWEEPER
        if is_multirun:
            axes = _axes_of_experiment(sweeper, {item.key_or_group for item in parsed}) | axes
        arguments = list(overrides)
        if is_multirun and is_grid:
            if base.repeat > 1 and base.repetition is None:
                # The first axis changes last: repetitions of a setting lie far apart, where the machine differs most.
                axes = {"repetition": [f"repetition={index + 1}" for index in range(base.repeat)]} | axes
            swept = [f"{key}={','.join(text.partition('=')[2] for text in texts)}" for key, texts in axes.items()]
            arguments = ["hydra.sweeper.params=null", *swept, *fixed]
        grid = list(_grid(axes, fixed, parsed)) if is_grid or not is_multirun else None
    num_jobs = len(grid) if grid is not None else sweeper.get("n_trials")
    return Sweep(arguments=arguments, cfg=base, grid=grid, num_jobs=num_jobs, axes=list(axes))


def _add_axis(axes: dict[str, list[str]], override: Override) -> None:
    """Notes the values that a key is swept over, each checked by itself; those of an interval cannot be."""
    key = override.key_or_group
    if key in NOT_SWEPT or key.partition(".")[0].partition("/")[0] == "hydra":
        raise ConfigError(f"{override.input_line!r} sweeps over {key}; it must have one value")
    if not override.is_discrete_sweep():
        check_override(parse_override(f"{key}=0", SweepConfig), SweepConfig, SWEEP_GROUPS)
        axes[key] = []
        return
    axes[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
    for text in axes[key]:
        check_override(parse_override(text, SweepConfig), SweepConfig, SWEEP_GROUPS)


def _axes_of_experiment(sweeper: DictConfig, overridden: set[str]) -> dict[str, list[str]]:
    """The axes in hydra.sweeper.params, where the command line does not say otherwise."""
    axes: dict[str, list[str]] = {}
    for key, values in (sweeper.get("params") or {}).items():
        if key not in overridden:
            text = as_typed(f"{key}={values}", SweepConfig, is_sweep=True)
            override = parse_override(text, SweepConfig, is_sweep=True)
            if override.is_sweep_override():
                _add_axis(axes, override)
            else:
                axes[key] = [text]
    return axes


def _composed(fixed: list[str], parsed: list[Override], *, with_hydra: bool = False) -> DictConfig:
    """The configuration with these overrides. Raises ConfigError, which names what is missing of Hydra's plugins."""
    try:
        return hydra.compose("sweep", overrides=fixed, return_hydra_config=with_hydra)
    except (HydraException, OmegaConfBaseException) as error:
        refusal = explained(error, parsed)
        plugin = re.search(r"Could not find 'hydra/(?:launcher|sweeper)", str(error))
        hint = "; is its plugin installed? pip install -e '.[sweep]'" if plugin else ""
        raise ConfigError(f"{refusal}{hint}") from None


def _grid(axes: dict[str, list[str]], fixed: list[str], parsed: list[Override]) -> Iterator[DictConfig]:
    """The configurations of all combinations, in Hydra's order. A value that is refused in all of its is an error."""
    of_groups: dict[tuple[str, ...], DictConfig] = {}
    refusals: dict[str, ConfigError] = {}
    accepted: set[str] = set()
    for texts in itertools.product(*axes.values()):
        groups = tuple(text for text in texts if text.partition("=")[0] in GROUPS)
        if groups not in of_groups:
            of_groups[groups] = _composed([*fixed, *groups], parsed)
        cfg = copy.deepcopy(of_groups[groups])
        for text in set(texts) - set(groups):
            override = parse_override(text, SweepConfig)
            OmegaConf.update(cfg, override.key_or_group, override.value())
        refusal = refusal_of(cfg)
        if refusal is None:
            accepted |= {"", *texts}
        else:
            refusals |= {text: refusal for text in ("", *texts) if text not in refusals}
        yield cfg
    for text, refusal in refusals.items():
        if text not in accepted:
            raise refusal
