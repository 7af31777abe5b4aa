"""The memory plan fits, fills the device, and refuses with numbers that are true, before anything is loaded."""

from __future__ import annotations

import errno
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from conf.schema import (
    CacheConfig,
    ConfigError,
    FullCacheConfig,
    FullCacheTier,
)
from launch.assembly.engine import build
from launch.assembly.prepare import prepare
from tests.support.tiny_models import random_prompt, save_checkpoint, tiny_config
from tests.support.tiny_runs import task_for, tiny_run
from tiers import pinned_host_tier
from tiers.base import CacheShape
from tiers.planning import memory
from tiers.planning.plan import RESERVE_SHARE, MemoryPlan, block_tokens_for, make_plan
from tiers.planning.sizes import PlanInput, RetrievalSizes, StreamingSizes

REPEATABLE = settings(derandomize=True, deadline=None, max_examples=60)
GIB, MIB = 2**30, 2**20
SHAPE = CacheShape(num_layers=8, num_kv_heads=4, head_dim=64, dtype=torch.bfloat16)
PLENTY = 1 << 50

INPUTS = PlanInput(
    target_shape=SHAPE,
    target_weight_bytes=100 * MIB,
    max_tokens=20_000,
    slack_tokens=12,
    piece_tokens=1024,
    retrieval=RetrievalSizes(budget=1024, tail_tokens=276),
    drafter_shape=CacheShape(num_layers=2, num_kv_heads=2, head_dim=64, dtype=torch.bfloat16),
    drafter_weight_bytes=10 * MIB,
    streaming=StreamingSizes(sinks=4, window=508, slack=64),
    activation_bytes=8 * MIB,
    device_free_bytes=PLENTY,
    host_free_bytes=PLENTY,
    device_is_host=False,
)


def cache_config(**changes) -> CacheConfig:
    return CacheConfig(full=FullCacheConfig(**changes))


def free_bytes_for(need: int) -> int:
    """The least free memory of which `need` bytes may be used."""
    free = int(need / (1 - RESERVE_SHARE))
    while int(free * (1 - RESERVE_SHARE)) < need:
        free += 1
    return free


def plan_of(num_device_layers: int, inputs: PlanInput = INPUTS, num_host_layers: int | None = None) -> MemoryPlan:
    """With so many layers on the device and the host (None: all others), the rest on disk, whatever memory there is."""
    free = {"device_free_bytes": PLENTY, "host_free_bytes": PLENTY, "disk_free_bytes": PLENTY}
    if num_host_layers is None:
        num_host_layers = SHAPE.num_layers - num_device_layers
    layers = {"device_layers": str(num_device_layers), "host_layers": str(num_host_layers)}
    return make_plan(replace(inputs, **free), cache_config(tier=FullCacheTier.disk, **layers))


@pytest.mark.parametrize("num_device_layers", range(SHAPE.num_layers + 1))
def test_auto_places_as_many_layers_on_the_device_as_fit(num_device_layers):
    needs = [plan_of(count).totals["device"] for count in range(SHAPE.num_layers + 1)]
    for free in (free_bytes_for(needs[num_device_layers]), free_bytes_for(needs[num_device_layers]) - 2):
        usable = int(free * (1 - RESERVE_SHARE))
        # The first layer off the device brings a tail, buffers and the space in which a prompt is read.
        fitting = [count for count, need in enumerate(needs) if need <= usable]
        inputs = replace(INPUTS, device_free_bytes=free)
        if fitting:
            assert make_plan(inputs, cache_config()).sizes.num_device_layers == max(fitting)
        else:
            with pytest.raises(ConfigError):
                make_plan(inputs, cache_config())
    assert len(set(needs)) == len(needs)


@REPEATABLE
@given(
    max_tokens=st.integers(1, 60_000),
    device_free=st.integers(0, 2 * GIB),
    host_free=st.integers(0, 2 * GIB),
    disk_free=st.integers(0, 2 * GIB),
    device_is_host=st.booleans(),
    tier=st.sampled_from(FullCacheTier),
    device_layers=st.sampled_from(["auto", "0", "3", "8"]),
    host_layers=st.sampled_from(["auto", "0", "2"]),
)
def test_a_plan_fits_and_a_refusal_is_true(
    max_tokens, device_free, host_free, disk_free, device_is_host, tier, device_layers, host_layers
):
    inputs = replace(
        INPUTS,
        max_tokens=max_tokens,
        device_free_bytes=device_free,
        host_free_bytes=host_free,
        disk_free_bytes=disk_free,
        device_is_host=device_is_host,
    )
    assume(tier != FullCacheTier.device or device_layers == "auto")
    assume(tier in (FullCacheTier.auto, FullCacheTier.disk) or host_layers == "auto")
    config = cache_config(tier=tier, device_layers=device_layers, host_layers=host_layers)
    device, host, disk = (int(free * (1 - RESERVE_SHARE)) for free in (device_free, host_free, disk_free))
    try:
        plan = make_plan(inputs, config)
    except ConfigError as error:
        for num_device, num_host in allowed_layers(tier, device_layers, host_layers):
            need = plan_of(num_device, inputs, num_host).totals
            both = need["device"] + need["host"] > host and device_is_host
            over = [need["device"] > device, need["host"] > host, need["disk"] > disk, both]
            # In one memory a layer that leaves the device for the host gains nothing: auto does not try it.
            one_memory = device_is_host and device_free >= host_free and num_host
            assert any(over) or one_memory, f"fits, but: {error}"
    else:
        assert plan.totals["device"] <= device and plan.totals["host"] <= host and plan.totals["disk"] <= disk
        assert not device_is_host or plan.totals["device"] + plan.totals["host"] <= host
        layers = (plan.sizes.num_device_layers, plan.sizes.num_host_layers)
        assert layers in allowed_layers(tier, device_layers, host_layers)
        assert sum(layers) + plan.sizes.num_disk_layers == SHAPE.num_layers


def allowed_layers(tier: FullCacheTier, device_layers: str, host_layers: str) -> list[tuple[int, int]]:
    """(on the device, on the host) that a configuration allows, by brute force."""
    allowed = []
    for num_device in range(SHAPE.num_layers + 1):
        for num_host in range(SHAPE.num_layers - num_device + 1):
            num_disk = SHAPE.num_layers - num_device - num_host
            default_device = {FullCacheTier.device: SHAPE.num_layers, FullCacheTier.auto: num_device}.get(tier, 0)
            wanted_device = default_device if device_layers == "auto" else int(device_layers)
            default_host = 0 if tier is FullCacheTier.disk else num_host
            wanted_host = default_host if host_layers == "auto" else int(host_layers)
            no_disk = tier in (FullCacheTier.device, FullCacheTier.host)
            if (num_device, num_host) == (wanted_device, wanted_host) and not (no_disk and num_disk):
                allowed.append((num_device, num_host))
    return allowed


REFUSAL = re.compile(r"a context of (\d+) tokens needs (.*?)\. ")
NEED = re.compile(r"([\d.]+) GiB (?:on the |on )(device|host|disk) \(there are ([\d.]+)\)")


def test_disk_is_used_where_the_host_does_not_suffice():
    need = plan_of(0).totals
    one_layer = need["host"] // SHAPE.num_layers
    inputs = replace(
        INPUTS,
        device_free_bytes=free_bytes_for(need["device"]),
        host_free_bytes=free_bytes_for(need["host"] - 2 * one_layer),
        disk_free_bytes=PLENTY,
    )
    plan = make_plan(inputs, cache_config())
    assert plan.sizes.num_device_layers == 0 and 0 < plan.sizes.num_host_layers < SHAPE.num_layers
    assert plan.sizes.num_disk_layers == SHAPE.num_layers - plan.sizes.num_host_layers
    assert "on disk" in plan.reason
    with pytest.raises(ConfigError):
        make_plan(inputs, cache_config(tier=FullCacheTier.host))


@pytest.mark.parametrize(("device_layers", "host_layers"), [("5", "4"), ("8", "1"), ("auto", "9"), ("9", "0")])
def test_more_layers_than_there_are_are_refused(device_layers, host_layers):
    message = refusal(INPUTS, cache_config(device_layers=device_layers, host_layers=host_layers))
    assert "at most the target's 8 layers" in message


def refusal(inputs: PlanInput, config: CacheConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        make_plan(inputs, config)
    return str(caught.value)


@REPEATABLE
@given(
    max_tokens=st.integers(1000, 100_000),
    device_free=st.integers(160 * MIB, GIB),
    host_free=st.integers(0, GIB),
    disk_free=st.integers(0, GIB),
    device_is_host=st.booleans(),
    tier=st.sampled_from(FullCacheTier),
    block_tokens=st.sampled_from(["auto", "16", "100"]),
)
def test_refusal_names_need_and_have_and_the_largest_context_that_fits(
    max_tokens, device_free, host_free, disk_free, device_is_host, tier, block_tokens
):
    inputs = replace(
        INPUTS,
        max_tokens=max_tokens,
        device_free_bytes=device_free,
        host_free_bytes=host_free,
        disk_free_bytes=disk_free,
        device_is_host=device_is_host,
    )
    config = cache_config(tier=tier, block_tokens=block_tokens)
    try:
        make_plan(inputs, config)
    except ConfigError as error:
        message = str(error)
    else:
        assume(False)
    context, needs = REFUSAL.match(message).groups()
    assert int(context) == max_tokens
    stated = {name: (float(need), float(have)) for need, name, have in NEED.findall(needs)}
    for name, free in (("device", device_free), ("host", host_free), ("disk", disk_free)):
        if name in stated:
            assert stated[name][1] == pytest.approx(free * (1 - RESERVE_SHARE) / GIB, abs=0.006)
    over = [need - have for need, have in stated.values()]
    both = stated["device"][0] + stated["host"][0] - stated["host"][1] if device_is_host else -1
    assert max(*over, both) > -0.021, "the numbers do not show why it is refused"

    found = re.search(r"With these settings (\d+) tokens of context fit", message)
    if found is None:
        with pytest.raises(ConfigError):
            make_plan(replace(inputs, max_tokens=1), config)
        return
    assert "prompt.max_tokens" in message and "generation.max_new_tokens" in message
    largest = int(found[1])
    assert 0 < largest < max_tokens
    make_plan(replace(inputs, max_tokens=largest), config)
    with pytest.raises(ConfigError):
        make_plan(replace(inputs, max_tokens=largest + 1), config)
    with pytest.raises(ConfigError):
        make_plan(replace(inputs, max_tokens=largest + block_tokens_for(SHAPE, config, largest)), config)


def test_refusal_of_a_fixed_tier_names_the_knob_that_would_let_layers_move():
    small = replace(INPUTS, device_free_bytes=200 * MIB)
    assert "cache.full.tier=auto" in refusal(small, cache_config(tier=FullCacheTier.device))
    assert "cache.full.tier=auto" in refusal(
        replace(INPUTS, host_free_bytes=MIB), cache_config(tier=FullCacheTier.host)
    )
    without_host = replace(small, host_free_bytes=MIB)
    assert "cache.full.tier=auto" not in refusal(without_host, cache_config())


def test_refusal_of_fixed_numbers_names_the_knobs_that_would_let_them_change():
    message = refusal(replace(INPUTS, device_free_bytes=200 * MIB), cache_config(device_layers="8"))
    assert "cache.full.device_layers=auto" in message and "block_tokens" not in message
    message = refusal(replace(INPUTS, device_free_bytes=200 * MIB), cache_config(block_tokens="9999999"))
    assert "cache.full.block_tokens=auto" in message


def test_refusal_where_even_the_weights_do_not_fit_names_a_smaller_model():
    message = refusal(replace(INPUTS, device_free_bytes=50 * MIB), cache_config())
    assert "smaller model" in message and "model.dtype" in message


@pytest.mark.parametrize("device_layers", ["9", "100"])
def test_more_device_layers_than_the_model_has_are_refused(device_layers):
    message = refusal(INPUTS, cache_config(device_layers=device_layers))
    assert message == f"cache.full.device_layers is {device_layers}; it must be at most the target's 8 layers, or auto"


@pytest.mark.parametrize(
    ("tier", "device_layers", "wanted"),
    [
        (FullCacheTier.auto, "auto", 8),
        (FullCacheTier.device, "auto", 8),
        (FullCacheTier.host, "auto", 0),
        (FullCacheTier.host, "3", 3),
        (FullCacheTier.auto, "0", 0),
        (FullCacheTier.auto, "5", 5),
    ],
)
def test_layers_go_where_the_configuration_says(tier, device_layers, wanted):
    plan = make_plan(INPUTS, cache_config(tier=tier, device_layers=device_layers))
    assert plan.sizes.num_device_layers == wanted
    assert f"{wanted} of 8 layers on the device" in plan.reason
    assert ("on the host" in plan.reason) == (wanted < 8)


def test_a_cpu_does_not_count_its_memory_twice():
    need = plan_of(8).totals["device"]
    free = free_bytes_for(need)
    inputs = replace(INPUTS, device_free_bytes=free, host_free_bytes=free, device_is_host=True)
    assert make_plan(inputs, cache_config()).sizes.num_device_layers == 8
    short = replace(inputs, device_free_bytes=free * 9 // 10, host_free_bytes=free * 9 // 10)
    with pytest.raises(ConfigError):  # moving layers from one half of the same memory to the other gives nothing
        make_plan(short, cache_config())


@pytest.mark.parametrize("max_tokens", [100, 5000, 10**6])
@pytest.mark.parametrize("bytes_per_token", [2**10, 3000, 2**14, 2**17, 2**22])
def test_blocks_are_a_power_of_two_of_at_most_8_mib_and_an_eighth_of_the_context(bytes_per_token, max_tokens):
    shape = CacheShape(num_layers=1, num_kv_heads=1, head_dim=bytes_per_token // 4, dtype=torch.bfloat16)
    tokens = block_tokens_for(shape, cache_config(), max_tokens)
    most = min(8 * MIB / shape.bytes_per_token_and_layer, max_tokens / 8)
    assert tokens.bit_count() == 1
    assert tokens == 16 or most / 2 < tokens <= most
    assert block_tokens_for(shape, cache_config(block_tokens="37"), max_tokens) == 37


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model"), tiny_config("llama", max_position_embeddings=4096))


def test_a_plan_that_does_not_fit_is_refused_before_any_weight_is_read(folder, monkeypatch):
    config = tiny_run(folder, folder)
    config.placement.device_memory_gib = 1e-4
    monkeypatch.setattr("launch.assembly.role_builder.load_model", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(ConfigError, match=r"a context of 750 tokens needs 0\.\d+ GiB"):
        build(task_for(config, random_prompt(600), 150))


@pytest.mark.parametrize(
    ("tier", "words"),
    [
        (
            FullCacheTier.host,
            ["host tier", "GiB", "too much is locked", "`ulimit -l` is ", "GiB of host memory are free"],
        ),
        (FullCacheTier.disk, ["disk tier", "GiB", "No space left"]),
    ],
)
def test_memory_that_is_not_there_after_all_is_a_configuration_error(folder, monkeypatch, tier, words):
    """A limit that no plan can see: of page-locked memory, or a quota of the disk."""

    def no_memory(*args, **kwargs):
        raise MemoryError("too much is locked")

    def no_disk(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    config = tiny_run(folder, folder, tier=tier)
    prepared = prepare(config)
    monkeypatch.setattr(pinned_host_tier, "torch", SimpleNamespace(empty=no_memory))
    monkeypatch.setattr("os.posix_fallocate", no_disk)
    with pytest.raises(ConfigError) as caught:
        build(task_for(config, random_prompt(600), 150, prepared=prepared))
    assert all(word in str(caught.value) for word in [*words, "prompt.max_tokens"])


@pytest.mark.parametrize("limit", [5 << 30, None])
def test_the_limit_of_a_cgroup_below_free_memory_is_honoured(monkeypatch, tmp_path, limit):
    (tmp_path / "memory.max").write_text(f"{limit}\n" if limit else "max\n")
    (tmp_path / "memory.current").write_text(f"{3 << 30}\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {1 << 30}\n")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=100 << 30))
    assert memory.host_free_bytes() == (3 << 30 if limit else 100 << 30), "limit - usage + what the system can drop"


@pytest.mark.parametrize(
    ("cgroups", "root"), [("0::/slurm/job/step\n", ""), ("3:cpu:/\n9:memory:/slurm/job/step\n0::/\n", "memory")]
)
@pytest.mark.parametrize("limited", ["slurm", "slurm/job", "slurm/job/step"])
def test_the_limit_of_any_cgroup_above_is_honoured(monkeypatch, tmp_path, cgroups, root, limited):
    (tmp_path / root / "slurm/job/step").mkdir(parents=True)
    folder, names = tmp_path / root / limited, memory.CGROUP_FILES[bool(root)]
    for name, text in zip((*names, "memory.stat"), (str(5 << 30), str(3 << 30), ""), strict=True):
        (folder / name).write_text(text)
    (tmp_path / "cgroup").write_text(cgroups)
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    monkeypatch.setattr(memory, "OWN_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=100 << 30))
    assert memory.host_free_bytes() == 2 << 30


def test_the_memory_of_the_process_is_what_the_system_counts():
    before, _ = memory.process_bytes()
    block = torch.ones(64 << 20, dtype=torch.uint8)
    with_block, peak = memory.process_bytes()
    assert with_block - before > block.nbytes * 0.9
    del block
    # The system keeps its counts by the batch, of some dozens of pages for each processor.
    assert memory.process_bytes()[1] > 0.99 * peak > 0.98 * with_block


def test_a_plan_reaches_another_process_as_it_is():
    inputs = replace(INPUTS, retrieval=RetrievalSizes(budget=512, tail_tokens=88, bits=8, is_rebuilt=True))
    plan = make_plan(inputs, cache_config(tier=FullCacheTier.host))
    sent = msgspec.msgpack.encode(msgspec.to_builtins(plan))
    assert msgspec.convert(msgspec.msgpack.decode(sent), MemoryPlan) == plan


def test_where_there_is_no_room_to_collect_chunks_they_are_fetched():
    """Rather than refused, or put on a slower tier."""
    inputs = replace(INPUTS, retrieval=RetrievalSizes(budget=512, tail_tokens=88, is_rebuilt=True))
    cache = CacheConfig(full=FullCacheConfig(tier=FullCacheTier.host))
    plan = make_plan(inputs, cache)
    assert plan.sizes.chooses_ahead and plan.device_bytes["chunks ahead"] > 0
    need = plan.totals["device"] - plan.device_bytes["chunks ahead"] // 2
    tight = make_plan(replace(inputs, device_free_bytes=int(need / (1 - RESERVE_SHARE)) + 1), cache)
    assert not tight.sizes.chooses_ahead and "chunks ahead" not in tight.device_bytes
    assert tight.totals["host"] == plan.totals["host"]


@pytest.mark.parametrize(
    ("busy_percent", "quota", "wanted"),
    [
        ([3.0, 2.0, 1.0, 0.0], "max 100000", 4),
        ([100.0, 2.0, 40.0, 0.0], "max 100000", 3),
        ([100.0, 100.0, 100.0, 100.0], "max 100000", 1),
        ([0.0, 0.0, 0.0, 0.0], "150000 100000", 1),
        ([0.0, 0.0, 0.0, 0.0], None, 4),
    ],
)
def test_threads_are_for_idle_cores_within_the_quota(monkeypatch, tmp_path, busy_percent, quota, wanted):
    if quota:
        (tmp_path / "cpu.max").write_text(f"{quota}\n")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    monkeypatch.setattr(memory.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(memory.psutil, "cpu_percent", lambda interval, percpu: [*busy_percent, 100.0, 100.0])
    assert memory.num_idle_cores() == wanted


@pytest.mark.parametrize(
    ("cgroups", "files"),
    [
        ("0::/user.slice/limited.scope\n", {"user.slice/cpu.max": "150000 100000", "cpu.max": "max 100000"}),
        ("0::/limited/job\n", {"limited/cpu.max": "300000 100000", "limited/job/cpu.max": "100000 100000"}),
        (
            "4:cpu,cpuacct:/docker/abc\n0::/\n",
            {"cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu,cpuacct/cpu.cfs_period_us": "100000"}
            | {
                "cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "200000",
                "cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000",
            },
        ),
        ("4:cpu:/docker/abc\n", {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}),
    ],
    ids=["a slice above", "the least of several", "version 1", "version 1 in a namespace"],
)
def test_threads_are_within_the_quota_of_any_cgroup_above(monkeypatch, tmp_path, cgroups, files):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    (tmp_path / "cgroup").write_text(cgroups)
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    monkeypatch.setattr(memory, "OWN_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory.os, "sched_getaffinity", lambda pid: range(8), raising=False)
    monkeypatch.setattr(memory.psutil, "cpu_percent", lambda interval, percpu: [0.0] * 8)
    wanted = {"user.slice": 1, "limited": 1, "cpu,cpuacct": 2, "cpu": 1}[next(iter(files)).split("/")[0]]
    assert memory.num_idle_cores() == wanted
