"""Configuration of launch/plan.py: a run, the machine that it is planned for, and what is expected of the drafts."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from hydra.core.config_store import ConfigStore

from conf.schema import RunConfig, require
from launch.command_line.overrides import compose_program


@dataclass(kw_only=True, slots=True)
class HardwareConfig:
    """A machine; GB are 1e9 bytes. null is measured on the machine that the program runs on."""

    name: str = "this machine"
    """Name in the forecast; nothing else depends on it."""
    has_gpu: bool = False
    """The devices are GPUs with memory of their own; else the processor is the device, in one memory with the host."""
    num_devices: int = 1
    """The model is sharded over them: weights, heads and the stream, each over its own link."""
    device_memory_gib: float | None = None
    """Free memory of each device."""
    device_gb_per_s: float | None = None
    """Speed at which a device reads its memory."""
    device_tflops: float | None = None
    """Speed of a device in bf16, dense."""
    link_gb_per_s: float | None = None
    """Speed from host to device, for each device."""
    host_memory_gib: float | None = None
    """Free memory of the host, for all devices."""
    disk_gb_per_s: float | None = None
    """Speed at which blocks are read from disk, for all devices."""
    disk_gib: float | None = None
    """Free space on disk, for all devices."""
    layer_overhead_ms: float = 0.28
    """Time of each layer in each pass that is not computation: launches and Python."""

    def __post_init__(self) -> None:
        require(self.num_devices >= 1, "hardware.num_devices", self.num_devices, ">= 1")
        require(self.layer_overhead_ms >= 0, "hardware.layer_overhead_ms", self.layer_overhead_ms, ">= 0")
        for item in fields(self):
            if item.default is None:
                value = getattr(self, item.name)
                require(value is None or value > 0, f"hardware.{item.name}", value, "above 0, or null")


@dataclass(kw_only=True, slots=True)
class ExpectedConfig:
    """Acceptance that is assumed of the drafts; launch/measure/acceptance.py measures it."""

    retrieval_acceptance: float = 0.955
    """Share of the retrieval draft's tokens that the target accepts; the default is what the paper's figures imply."""
    draft_acceptance: float = 0.35
    """Share of drafted tokens that the retrieval draft accepts; the default is Llama-68M's in the paper."""

    def __post_init__(self) -> None:
        for key in ("retrieval_acceptance", "draft_acceptance"):
            require(0 <= getattr(self, key) <= 1, f"expected.{key}", getattr(self, key), "between 0 and 1")


@dataclass(kw_only=True, slots=True)
class PlanConfig(RunConfig):
    """A run and the machine it is planned for."""

    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    expected: ExpectedConfig = field(default_factory=ExpectedConfig)

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt to plan for; `read_plan_config` has seen to it that it is given."""
        assert self.prompt.max_tokens is not None
        return self.prompt.max_tokens


ConfigStore.instance().store(name="plan_schema", node=PlanConfig)


def read_plan_config(overrides: list[str]) -> PlanConfig:
    """The configuration that these overrides make. Raises ConfigError, also where no length of the prompt is given."""
    config: PlanConfig = compose_program("plan", overrides, "conf/schema.py, launch/forecast/config.py")
    require(config.prompt.max_tokens is not None, "prompt.max_tokens", None, "a number of tokens, to plan for")
    return config
