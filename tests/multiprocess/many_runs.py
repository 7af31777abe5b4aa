"""A program for each rank: rank 0 has the same processes make one run after another, since starting them takes longest.

It reads FOLDER/cases.json and writes FOLDER/results.json: see `run_many` of tests.multiprocess.forked_runs. By hand:
`torchrun --nproc-per-node=5 tests/multiprocess/many_runs.py FOLDER pipeline`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import msgspec

from conf.schema import PlacementConfig, PlacementKind, RunConfig
from launch.processes.guard import Guard
from orchestrator.placement import place


def main(folder: Path, kind: str) -> int:
    if os.environ["RANK"] != "0":
        return Guard(PlacementConfig().start_timeout_s).run()
    import torch

    from launch.processes.company import Company

    torch.set_num_threads(1)
    placement = place(PlacementConfig(kind=PlacementKind(kind), device="cpu"), int(os.environ["WORLD_SIZE"]))
    company = Company(RunConfig(), placement, print)
    company.start()
    results, cases = {}, json.loads((folder / "cases.json").read_text())
    try:
        for name, (config, prompt, num_tokens, seed) in cases.items():
            config["output"] = str(folder / name)
            results[name] = result_of(company, msgspec.convert(config, RunConfig), prompt, num_tokens, seed)
    finally:
        company.close()
    (folder / "results.json").write_text(json.dumps(results))
    return 0


def result_of(company, config: RunConfig, prompt: list[int], num_tokens: int, seed: int) -> dict[str, Any]:
    from launch.processes.remote_engine import build_remote
    from tests.support.tiny_runs import task_for

    engine = build_remote(task_for(config, prompt, num_tokens, seed), company)
    hierarchy = engine.hierarchy
    rounds = [hierarchy.start()]
    while not hierarchy.session.is_finished:
        rounds.append(hierarchy.round())
    return {
        "tokens": hierarchy.session.generated,
        "num_proposed": sum(len(record.proposed) for record in rounds),
        "num_accepted": sum(record.num_accepted for record in rounds),
        "num_hits": sum(record.ahead is not None and record.ahead.is_hit for record in rounds),
        "streaming": engine.streaming_report(),
        "memory": engine.memory_report(),
        "processes": engine.processes_report(),
        "memory_of": {rank: memory_of(member.pid) for rank, member in company.crew.members.items()},
    }


def memory_of(pid: int) -> dict[str, int]:
    """Bytes of a process: of its shared arenas what it has in memory (rss) and its part of that (pss); its own."""
    shared = {"Rss": 0, "Pss": 0}
    is_shared = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        key, _, rest = line.partition(":")
        if "-" in key:
            is_shared = "/memfd:tierforce" in line
        elif is_shared and key in shared:
            shared[key] += int(rest.split()[0]) << 10
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    own = next(line for line in rollup.splitlines() if line.startswith("Anonymous:"))
    return {"shared_rss": shared["Rss"], "shared_pss": shared["Pss"], "own": int(own.split()[1]) << 10}


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
