"""Stands for launch/run.py in tests of a sweep: writes a result in no time, or fails as it is told.

prompt.text tells it how: `fail` (one line, code 1), `refuse` (code 2), `die` (a signal), `hang`, `half` (a result that
is not whole), `interrupted`; anything else succeeds. It notes every start in starts.txt beside the jobs.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path


def main() -> int:
    overrides = dict(text.replace("'", "").split("=", 1) for text in sys.argv[1:])
    folder = Path(overrides.pop("output"))
    config = {"prompt": {"text": None}, "decoding": {"mode": "triforce", "gamma1": 2, "gamma2": 8}}
    for key, value in overrides.items():
        group, _, name = key.partition(".")
        config.setdefault(group, {})[name] = int(value) if value.isdigit() else value
    with (folder.parent / "starts.txt").open("a") as file:
        file.write(" ".join(f"{key}={value}" for key, value in sorted(overrides.items())) + "\n")
    how = config["prompt"]["text"]
    if how == "fail":
        (folder / "failure.log").write_text("Traceback")
        print("tierforce: failed in phase decode, role verifier, rank 0: MemoryError: no room", file=sys.stderr)
        return 1
    if how == "refuse":
        print("tierforce: cache.full.tier is 'device'; it must be auto", file=sys.stderr)
        return 2
    if how == "die":
        print("reading", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "hang":
        time.sleep(60)
    if how == "half":
        (folder / "result.json").write_text('{"finish_reason": "length", "tim')
        return 0
    (folder / "result.json").write_text(json.dumps(result(config, how)))
    return 0


def result(config: dict, how: str | None) -> dict:
    gamma1, gamma2 = config["decoding"]["gamma1"], config["decoding"]["gamma2"]
    tbt_ms = 10 + abs(gamma1 - 2) + abs(gamma2 - 8)
    rates = [0.9, 0.5]
    level = {"proposed": 10, "accepted": 7, "acceptance_rate": 0.7, "accepted_per_position": rates}
    return {
        "prompt_tokens": 100,
        "token_ids": [1, 2, 3],
        "finish_reason": "interrupted" if how == "interrupted" else "length",
        "config": config | {"output": "o"},
        "timing": {
            "prefill_s": 1.0,
            "ttft_s": 1.1,
            "decode_s": 2 * tbt_ms / 1000,
            "tbt_ms": {"mean": tbt_ms, "p50": tbt_ms, "p95": tbt_ms},
            "tokens_per_s": 1000 / tbt_ms,
            "phases_s": {"draft": 0.001, "retrieval": 0.002, "verify": 0.005},
        },
        "speculation": {
            "verifications": 1,
            "tokens_per_verification": 2.0,
            "rebuilds": 0,
            "levels": [level | {"name": name} for name in ("drafter", "retrieval")],
        },
        "memory": {tier: {"planned_bytes": 10, "peak_bytes": 9} for tier in ("device", "host", "disk", "process")},
        "streaming": {"bytes": 5, "seconds": 0.1, "gb_per_s": 0.5, "stall_s": 0.01},
        "versions": {"torch": "2", "tierforce": "0"},
    }


if __name__ == "__main__":
    sys.exit(main())
