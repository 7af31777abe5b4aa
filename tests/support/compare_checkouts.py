"""Runs the demo pair in this checkout and in another one with the same seeds, and compares what they leave.

    python tests/support/compare_checkouts.py OTHER_CHECKOUT [NAME ...]

For a change that must not alter the output: tokens, text, what was drafted and accepted, planned bytes, the keys of
result.json and the form of the standard output (its words; numbers stand for any) must be equal. Each configuration is
run in both checkouts at the same time, all of them take about five minutes on two cores. Exit code 1 on a difference.
Without NAMEs all configurations are run.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[2]
DEADLINE_SECONDS = 300.0
COMMON = [
    "prompt.max_tokens=600",
    "generation.max_new_tokens=32",
    "generation.ignore_eos=true",
    "cache.retrieval.budget=128",
    "cache.streaming.window=64",
    "placement.device=cpu",
    "placement.threads=1",
    "tiers.disk.readers=2",
    "output=run",
]
GREEDY = "sampling.temperature=0"
GUMBEL = "sampling.coupling=gumbel"


@dataclass(kw_only=True)
class Case:
    """One configuration; `num_processes` above 0: under torchrun."""

    overrides: list[str]
    num_processes: int = 0
    has_fixed_drafts: bool = True
    """False where how much is drafted depends on time."""


CASES = {
    "triforce greedy": Case(overrides=[GREEDY, "cache.full.tier=device"]),
    "triforce maximal, host, int8": Case(
        overrides=["cache.full.tier=host", "cache.retrieval.dtype=int8", "sampling.seed=1"]
    ),
    "retrieval block, disk": Case(
        overrides=["decoding.mode=retrieval", "cache.full.tier=disk", "sampling.block_verification=true"]
    ),
    "streaming gumbel, mean keys": Case(
        overrides=["decoding.mode=streaming", GUMBEL, "cache.full.tier=host", "cache.retrieval.rule=mean_key"]
    ),
    "autoregressive, needle": Case(overrides=["decoding.mode=autoregressive", "prompt.task=needle"]),
    "overlap outcomes, lookup": Case(
        overrides=[
            "decoding.overlap=outcomes",
            GUMBEL,
            "cache.full.tier=host",
            "cache.retrieval.rule=mean_key",
            "model.drafter=lookup",
        ],
        has_fixed_drafts=False,
    ),
    "colocated, 1 rank": Case(overrides=["placement=colocated", "cache.full.tier=host"], num_processes=1),
    "colocated, 2 ranks": Case(overrides=["placement=colocated", GREEDY], num_processes=2),
    "pipeline, 4 ranks": Case(overrides=["placement=pipeline", "cache.full.tier=disk"], num_processes=4),
    "pipeline, 5 ranks": Case(
        overrides=["placement=pipeline", GUMBEL, "decoding.overlap=ahead"], num_processes=5, has_fixed_drafts=False
    ),
}


@dataclass(kw_only=True)
class Left:
    """What a run left."""

    exit_code: int
    output: str
    errors: str
    result: dict[str, Any] = field(default_factory=dict)


def run(checkout: Path, case: Case, folder: Path) -> Left:
    """The checkout's own launch/run.py, in `folder`. Raises TimeoutExpired."""
    program = [str(checkout / "launch" / "run.py"), *COMMON, *case.overrides]
    if case.num_processes:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case.num_processes}"]
        program = [*torchrun, *program]
    folder.mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, *program],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_SECONDS,
    )
    left = Left(exit_code=done.returncode, output=done.stdout, errors=done.stderr)
    path = folder / "run" / "result.json"
    if path.exists():
        left.result = json.loads(path.read_text())
    return left


def keys_of(value: Any, prefix: str = "") -> set[str]:
    """Dotted keys, those in a list's first element too."""
    if isinstance(value, list) and value:
        return keys_of(value[0], f"{prefix}[]")
    if isinstance(value, dict) and value:
        return {name for key, inner in value.items() for name in keys_of(inner, f"{prefix}.{key}")}
    return {prefix}


def form_of(output: str) -> list[str]:
    """Words of the standard output, line by line, with N for every number and U for units that follow its size."""
    text = re.sub(r"\d[\d,.]*", "N", output)
    text = re.sub(r"N (?:[KMGT]iB|B)\b", "N U", text)
    return [" ".join(line.split()) for line in text.splitlines()]


def accepted(result: dict[str, Any]) -> Any:
    """How much each level proposed and how much of it was accepted."""
    speculation = result["speculation"]
    levels = [(level["name"], level["proposed"], level["accepted"]) for level in speculation["levels"]]
    return speculation["verifications"], levels


def planned_bytes(result: dict[str, Any]) -> dict[str, int]:
    """Of each tier; a process's own memory is measured, not planned alone."""
    return {tier: memory["planned_bytes"] for tier, memory in result["memory"].items() if tier != "process"}


def differences(here: Left, there: Left, *, has_fixed_drafts: bool = True) -> list[str]:
    """What is not equal, in words."""
    if here.exit_code or there.exit_code or not (here.result and there.result):
        codes = f"exit codes {here.exit_code} here, {there.exit_code} there"
        return [f"{codes}: {(here.errors or there.errors).strip()[-2000:]}"]
    views = {
        "tokens": lambda left: left.result["token_ids"],
        "text": lambda left: left.result["text"],
        "keys": lambda left: keys_of(left.result),
        "planned bytes": lambda left: planned_bytes(left.result),
    }
    if has_fixed_drafts:
        views["drafts"] = lambda left: accepted(left.result)
        views["standard output"] = lambda left: form_of(left.output)
    else:  # lines that tell of drafting ahead come and go
        views["standard output"] = lambda left: form_of(left.output)[:5]
    return [
        f"{what}: {view(here)!r:.1000} here, {view(there)!r:.1000} there"
        for what, view in views.items()
        if view(here) != view(there)
    ]


def main(argv: list[str]) -> int:
    """The program; `argv` without its name."""
    if not argv or not (Path(argv[0]) / "launch" / "run.py").is_file() or not set(argv[1:]) <= CASES.keys():
        print(f"{(__doc__ or '').strip()}\n\nNAMEs: {'; '.join(CASES)}", file=sys.stderr)
        return 2
    checkouts, names = (HERE, Path(argv[0]).resolve()), argv[1:] or list(CASES)
    are_equal = True
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(len(checkouts)) as pool:
        for index, name in enumerate(names):
            folders = [Path(scratch, side, str(index)) for side in ("here", "there")]
            here, there = pool.map(run, checkouts, [CASES[name]] * len(checkouts), folders)
            found = differences(here, there, has_fixed_drafts=CASES[name].has_fixed_drafts)
            are_equal = are_equal and not found
            print(f"{name:32s} {'equal' if not found else 'DIFFERENT'}", *found, sep="\n    ", flush=True)
    return 0 if are_equal else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
