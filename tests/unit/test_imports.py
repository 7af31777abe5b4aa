"""Imports point one way: conf <- tiers <- workers <- orchestrator <- launch. Each big library has its few importers.

A policy module is loaded without torch, a configuration is refused before torch is imported: so it stays.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.source_code import FOLDERS, MODULES, ROOT, imports_of, name_of

THIRD_PARTY_FENCES = {
    "hydra": ("launch/",),
    "omegaconf": ("launch/",),
    "cupy": ("tiers/pinned_host_tier.py",),
    "rich": ("orchestrator/display.py", "launch/"),
    "transformers": (
        "workers/checkpoint/",
        "workers/models/",
        "workers/attention/forward_pass.py",
        "launch/demo_pair/",
        "launch/analysis/needle_prompt.py",
        "launch/measure/gpu_transformers.py",
        "launch/benchmark/gguf_export.py",
        "launch/benchmark/shared_models.py",
        "launch/benchmark/transformers_peers.py",
    ),
    "datasets": ("launch/prompts/published_texts.py",),
    "gguf": ("launch/benchmark/gguf_export.py",),
    "llama_cpp": ("launch/benchmark/llama_cpp_peer.py",),
    "tokenizers": ("launch/demo_pair/corpus.py",),
    "safetensors": (
        "workers/checkpoint/files.py",
        "workers/models/finite_weights.py",
        "workers/models/sharded_weights.py",
        "launch/demo_pair/checkpoint.py",
    ),
    "accelerate": ("workers/models/skeleton.py",),
    "matplotlib": ("launch/",),
    "pyarrow": ("launch/sweeps/table.py",),
    "psutil": ("tiers/planning/memory.py",),
    "xxhash": ("tiers/checksum.py",),
}
"""Library: the files and folders that may import it."""

CACHES_MAY_IMPORT = (
    "tiers.base",
    "tiers.errors",
    "tiers.link",
    "tiers.transfer",
    "tiers.block_writer",
    "tiers.collection",
    "tiers.device_layer",
    "tiers.block_layer",
    "tiers.full_cache",
    "tiers.retrieval",
    "tiers.retrieval_cache",
    "tiers.quantisation",
)
"""Other caches, sizes and streams: what a cache's memory is, it is told."""

ROLES = ("workers.drafter", "workers.lookup_drafter", "workers.retrieval_drafter", "workers.target_verifier")


def own(names: set[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] in FOLDERS}


EVERY_MODULE = pytest.mark.parametrize("path", MODULES, ids=name_of)


@EVERY_MODULE
def test_imports_point_to_the_left(path):
    folder = path.relative_to(ROOT).parts[0]
    allowed = FOLDERS[: FOLDERS.index(folder) + 1]
    wrong = {name for name in own(imports_of(path)) if name.split(".")[0] not in allowed}
    assert not wrong, f"{name_of(path)} imports {wrong}; it may import {allowed}"


@EVERY_MODULE
def test_third_party_libraries_stay_behind_their_fences(path):
    for library in {name.split(".")[0] for name in imports_of(path)} & set(THIRD_PARTY_FENCES):
        fence = THIRD_PARTY_FENCES[library]
        inside = any(
            name_of(path) == place or (place[-1] == "/" and name_of(path).startswith(place)) for place in fence
        )
        assert inside, f"{name_of(path)} imports {library}; only {', '.join(fence)} may"


@pytest.mark.parametrize("path", sorted((ROOT / "conf").glob("*.py")), ids=name_of)
def test_configuration_needs_the_standard_library_alone(path):
    outside = {
        name
        for name in imports_of(path)
        if name.split(".")[0] not in sys.stdlib_module_names and name.split(".")[0] != "conf"
    }
    assert not outside


@pytest.mark.parametrize("path", sorted((ROOT / "tiers").rglob("*.py")), ids=name_of)
def test_tiers_know_of_the_configuration_its_schema_alone(path):
    assert not {name for name in imports_of(path) if name.startswith("conf.") and not name.startswith("conf.schema")}


@pytest.mark.parametrize("path", sorted((ROOT / "orchestrator").rglob("*.py")), ids=name_of)
def test_orchestrator_takes_messages_from_workers_and_errors_from_tiers_and_nothing_else(path):
    for name in own(imports_of(path)):
        if name.startswith("workers"):
            assert name.startswith(("workers.messages", "workers.process.channel", "workers.process.peers")), name
        if name.startswith("tiers"):
            assert name.startswith("tiers.errors"), name
    loads = {name.split(".")[0] for name in imports_of(path, while_type_checking=False)}
    assert not loads & {"torch", "transformers", "numpy", "hydra"}


@pytest.mark.parametrize("role", ROLES)
def test_roles_meet_in_the_hierarchy_alone(role):
    path = ROOT / (role.replace(".", "/") + ".py")
    wrong = {name for name in imports_of(path) for other in ROLES if other != role and name.startswith(other)}
    assert not wrong


@pytest.mark.parametrize(
    "path",
    sorted([*(ROOT / "tiers").glob("*_cache.py"), *(ROOT / "tiers").glob("*_layer.py")])
    + [path for path in sorted((ROOT / "tiers/retrieval").glob("[a-z]*.py"))]
    + [ROOT / "tiers" / name for name in ("transfer.py", "block_writer.py", "collection.py")],
    ids=name_of,
)
def test_caches_are_told_where_their_memory_is(path):
    for name in own(imports_of(path)):
        assert name.startswith(CACHES_MAY_IMPORT), name


@pytest.mark.parametrize(
    ("modules", "libraries"),
    [
        ("orchestrator.hierarchy, orchestrator.session", {"torch", "transformers", "numpy", "cupy", "hydra", "rich"}),
        (
            ", ".join(f"orchestrator.{path.stem}" for path in sorted((ROOT / "orchestrator").glob("[a-z]*.py"))),
            {"torch", "transformers", "cupy", "hydra"},
        ),
        ("workers.messages, workers.parallel.shard", {"torch", "transformers", "numpy"}),
        ("conf.schema, conf.model_source", {"torch", "transformers", "numpy", "omegaconf"}),
        ("launch.run, launch.bench", {"torch", "transformers", "datasets"}),
        ("tiers.planning.plan, tiers.full_cache, tiers.pinned_host_tier", {"transformers", "cupy", "hydra"}),
    ],
    ids=["hierarchy", "orchestrator", "messages", "conf", "run", "tiers"],
)
def test_loads_without(modules, libraries):
    code = f"import sys, {modules}; print(*sorted({libraries!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


def test_negative_control_a_wrong_import_is_seen(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n\ndef f():\n    import hydra.x\n"
    )
    assert imports_of(path) == {"typing", "typing.TYPE_CHECKING", "torch", "hydra.x"}
    assert imports_of(path, while_type_checking=False) == {"typing", "typing.TYPE_CHECKING", "hydra.x"}
