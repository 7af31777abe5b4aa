"""Cost of a plan in time: seconds of each kind of pass, from bytes, operations and the machine's speeds.

A pass takes as long as the slowest of what overlaps in it: the stream of blocks, or the computation, which reads
weights and keys and multiplies. No fitted constant but the overhead of a layer. Policy only: numbers in, numbers out.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True, frozen=True, slots=True)
class Speeds:
    """Speeds of one device and its connections; GB are 1e9 bytes."""

    num_devices: int
    device_gb_per_s: float
    device_tflops: float
    link_gb_per_s: float
    disk_gb_per_s: float
    layer_overhead_ms: float


@dataclass(kw_only=True, frozen=True, slots=True)
class ModelCost:
    """Bytes and products of a forward pass of a model, over all devices."""

    num_layers: int
    weight_bytes: int
    """Bytes read in a pass."""
    num_parameters: int
    """Parameters multiplied with each token."""
    attention_width: int
    """Query heads times head dimension."""
    kv_bytes_per_token: int


@dataclass(kw_only=True, frozen=True, slots=True)
class Streamed:
    """Bytes of the full cache that a pass takes from tiers off the device."""

    host_bytes: int = 0
    disk_bytes: int = 0


def forward_seconds(speeds: Speeds, model: ModelCost, num_rows: int, num_keys: int, streamed: Streamed) -> float:
    """Seconds of a pass of `num_rows` new tokens over `num_keys` keys.

    Devices share weights, heads and links evenly.
    """
    devices = speeds.num_devices
    read = (model.weight_bytes + num_keys * model.kv_bytes_per_token) / speeds.device_gb_per_s / 1e9
    products = 2 * num_rows * (model.num_parameters + 2 * model.num_layers * model.attention_width * num_keys)
    computed = max(read, products / speeds.device_tflops / 1e12) / devices
    computed += model.num_layers * speeds.layer_overhead_ms / 1e3
    over_link = (streamed.host_bytes + streamed.disk_bytes) / devices / speeds.link_gb_per_s / 1e9
    return max(computed, over_link, streamed.disk_bytes / speeds.disk_gb_per_s / 1e9)


def dequantise_seconds(speeds: Speeds, model: ModelCost, num_keys: int, quantised_bytes: int) -> float:
    """Seconds that a pass takes longer over keys in `quantised_bytes`: it reads them, and writes, reads and writes them
    as the model's."""
    moved = quantised_bytes + 3 * num_keys * model.kv_bytes_per_token
    return moved / speeds.num_devices / speeds.device_gb_per_s / 1e9


def prefill_seconds(speeds: Speeds, model: ModelCost, num_tokens: int, streamed: Streamed) -> float:
    """Seconds of reading a prompt, each layer once over all of it, as its keys and values leave for their tiers."""
    products = 2 * num_tokens * model.num_parameters
    products += 2 * model.num_layers * model.attention_width * num_tokens**2  # causal: half of all pairs
    computed = products / speeds.device_tflops / 1e12 / speeds.num_devices
    return max(computed, forward_seconds(speeds, model, 1, 0, streamed))


def expected_tokens(acceptance: float, num_proposed: int) -> float:
    """Mean number of tokens of one verification, its own included, each proposed one accepted with `acceptance`."""
    if acceptance >= 1:
        return num_proposed + 1
    return (1 - acceptance ** (num_proposed + 1)) / (1 - acceptance)


@dataclass(kw_only=True, frozen=True, slots=True)
class RoundCost:
    """Cost of a verification and the drafting before it: seconds of its parts, and the tokens it gives."""

    draft_seconds: float
    retrieval_seconds: float
    verify_seconds: float
    num_tokens: float
    gamma1: int
    gamma2: int

    @property
    def seconds_per_token(self) -> float:
        """Time between tokens."""
        return (self.draft_seconds + self.retrieval_seconds + self.verify_seconds) / self.num_tokens


def triforce_round(
    *,
    draft_step: float,
    retrieval_step: float,
    verify: float,
    gamma1: int,
    gamma2: int,
    draft_acceptance: float,
    retrieval_acceptance: float,
) -> RoundCost:
    """A round, from the seconds of a drafter's step, of a retrieval draft's (over γ1 tokens) and of a verification.

    Steps go on until γ2 tokens are there; with gamma1 = 0 there is no drafter, and each step gives one token.
    """
    num_steps = gamma2 / expected_tokens(draft_acceptance, gamma1)
    return RoundCost(
        draft_seconds=num_steps * gamma1 * draft_step,
        retrieval_seconds=num_steps * retrieval_step,
        verify_seconds=verify,
        num_tokens=expected_tokens(retrieval_acceptance, gamma2),
        gamma1=gamma1,
        gamma2=gamma2,
    )
