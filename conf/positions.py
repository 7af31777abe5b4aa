"""How many positions a model has, from what its configuration says of them. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conf.values import ConfigError

UNLIMITED = 2**31


def num_positions(trained: int | None, rope: Mapping[str, Any]) -> int:
    """Positions the model is made for, RoPE scaling included; `trained` is its max_position_embeddings."""
    positions = trained or UNLIMITED
    factor, kind = rope.get("factor") or 1.0, rope.get("rope_type", rope.get("type", "default"))
    if kind in ("linear", "dynamic"):
        return int(positions * factor)
    if kind == "yarn" and rope.get("original_max_position_embeddings"):
        return max(positions, int(rope["original_max_position_embeddings"] * factor))
    return positions


def check_stretch(max_positions: int, trained: int) -> None:
    """Raises ConfigError unless a model of `trained` positions is stretched to more."""
    if max_positions <= trained:
        rule = f"above the {trained} positions that the model has, or null"
        raise ConfigError(f"model.max_positions is {max_positions}; it must be {rule}")
