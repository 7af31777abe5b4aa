"""A table as a sweep leaves it, made up: times and acceptances follow simple formulas, nothing was measured."""

from __future__ import annotations

import itertools
import random
from typing import Any

from launch.sweeps.table import PHASES, settings_of

DEFAULTS: dict[str, Any] = {
    "model": {"target": "demo", "drafter": "small"},
    "decoding": {"mode": "triforce", "gamma1": 2, "gamma2": 8, "overlap": "off"},
    "cache": {"full": {"tier": "host"}, "retrieval": {"budget": 1024}, "streaming": {"window": 508}},
    "tiers": {"link": {"gb_per_s": 1.0}},
    "sampling": {"temperature": 0.6, "seed": 0},
    "prompt": {"max_tokens": 32000},
    "generation": {"max_new_tokens": 256},
}


def made_up_row(repetition: int = 1, **changes: Any) -> dict[str, Any]:
    """A row; `changes` by the last part of a setting's key."""
    config = {
        group: {
            name: {k: changes.get(k, v) for k, v in value.items()}
            if isinstance(value, dict)
            else changes.get(name, value)
            for name, value in settings.items()
        }
        for group, settings in DEFAULTS.items()
    }
    settings = settings_of(config)
    noise = random.Random(repr((repetition, sorted(changes.items())))).uniform(0.96, 1.06)
    mode, context = config["decoding"]["mode"], config["prompt"]["max_tokens"]
    gamma1, gamma2 = config["decoding"]["gamma1"], config["decoding"]["gamma2"]
    stream_ms = 2.0 + context * 6144 / (1e6 * config["tiers"]["link"]["gb_per_s"])
    row = settings | {"id": f"{mode}{repetition}{sorted(changes.items())}", "status": "done", "host": "made-up"}
    row |= {"processes": 1, "repetition": repetition, "prompt_tokens": context, "verifications": 40, "ttft_s": 9.5}
    row |= dict.fromkeys((f"{phase}_s" for phase in PHASES), 0.0)
    tokens, draft_ms, retrieval_ms = 1.0, 0.0, 0.0
    if mode != "autoregressive":
        budget, temperature = config["cache"]["retrieval"]["budget"], config["sampling"]["temperature"]
        accepted = (1 - 0.25 * (256 / budget) ** 0.5) * (1 - 0.08 * temperature) * (32000 / context) ** 0.02
        rates = [accepted ** (0.5 + 0.5 * position) for position in range(gamma2)]
        tokens = 1 + sum(rates)
        row |= {"retrieval_acceptance": sum(rates) / gamma2, "retrieval_accepted_per_position": rates}
        drafted = [0.55 ** (position + 1) for position in range(gamma1)] if mode == "triforce" else []
        if drafted:
            row |= {"drafter_acceptance": sum(drafted) / gamma1, "drafter_accepted_per_position": drafted}
        retrieval_ms = gamma2 / (1 + sum(drafted)) * (4.0 + budget / 2000)
        draft_ms = 1.6 * gamma1 * gamma2 / (1 + sum(drafted)) if drafted else 0.0
    verify_ms = stream_ms + 1.5 * tokens
    spent = {"draft": draft_ms, "retrieval": retrieval_ms, "verify": verify_ms, "refresh": 0.5 if tokens > 1 else 0.0}
    row |= {f"{phase}_s": 40 * noise * ms / 1000 for phase, ms in spent.items()}
    round_ms = noise * (sum(spent.values()) + 1.5)
    row |= {"stall_s": 41 * noise * 0.7 * stream_ms / 1000, "decode_s": 40 * round_ms / 1000}
    row |= {"tokens_per_verification": tokens, "tbt_ms": round_ms / tokens, "tokens_per_s": 1000 * tokens / round_ms}
    return row


def made_up_rows(repetitions: int = 2, **axes: list) -> list[dict[str, Any]]:
    """All combinations; `axes` by the last part of a key. A baseline comes once, whatever γ and budget are."""
    rows = {}
    for values in itertools.product(range(1, repetitions + 1), *axes.values()):
        changes = dict(zip(axes, values[1:], strict=True))
        if changes.get("mode") == "autoregressive":
            changes = {key: value for key, value in changes.items() if key not in ("gamma1", "gamma2", "budget")}
        rows[repr((values[0], changes))] = made_up_row(values[0], **changes)
    return list(rows.values())
