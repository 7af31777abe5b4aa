"""A block that the disk damaged is read again from the tokens: the run goes on, with the same tokens, and says so."""

from __future__ import annotations

import itertools
import time

import pytest
import torch

from conf.schema import Coupling, Mode, SamplingConfig
from orchestrator.hierarchy import MAX_REREADS
from tests.support.tiny_models import random_prompt, save_checkpoint, tiny_config
from tests.support.tiny_runs import DEVICE, DISK, GREEDY, HOST, engine_for, generate, run_to_end, tiny_run
from tiers.disk_tier import DiskBlocks
from tiers.errors import DamagedBlockError
from tiers.transfer import CpuBlockStreamer

PROMPT, NUM_TOKENS = random_prompt(200), 40
SAMPLINGS = {
    "greedy": GREEDY,
    "gumbel": SamplingConfig(temperature=0.8, top_p=0.9, coupling=Coupling.gumbel, seed=3),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A target and a drafter."""
    root = tmp_path_factory.mktemp("models")
    return [save_checkpoint(root / str(seed), tiny_config("llama"), seed) for seed in (0, 1)]


def damage_at(monkeypatch, read_numbers: set[int]) -> None:
    """What the disk gives for these reads, counted from 0, is not what was written."""
    counter, read = itertools.count(), DiskBlocks.read_into

    def read_into(blocks, index, buffer):
        if next(counter) not in read_numbers:
            return read(blocks, index, buffer)
        checksum, blocks._checksums[index] = blocks._checksums[index], 0
        try:
            return read(blocks, index, buffer)
        finally:
            blocks._checksums[index] = checksum

    monkeypatch.setattr(DiskBlocks, "read_into", read_into)


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("mode", [Mode.autoregressive, Mode.triforce])
@pytest.mark.parametrize("read_number", [0, 30, 90])
def test_tokens_are_those_of_an_undamaged_run(folders, monkeypatch, mode, sampling, read_number):
    wanted = generate(tiny_run(*folders, mode, DEVICE, sampling=sampling), PROMPT, NUM_TOKENS).tokens
    damage_at(monkeypatch, {read_number})
    config = tiny_run(*folders, mode, DISK, sampling=sampling)
    config.tiers.disk.readers = "1"
    with engine_for(config, PROMPT, NUM_TOKENS) as engine:
        rounds = run_to_end(engine.hierarchy)
        assert engine.hierarchy.session.generated == wanted
        assert engine.hierarchy.num_rereads == 1
        assert engine.streaming_report()["damaged_blocks"] == 1
        assert sum("reread" in record.seconds for record in rounds) == 1


@pytest.mark.parametrize("mode", [Mode.autoregressive, Mode.triforce])
def test_a_bit_that_flips_in_host_memory_is_found_by_the_next_pass(folders, mode):
    """With checksums on; and the tokens are those of an undamaged run."""
    wanted = generate(tiny_run(*folders, mode, DEVICE), PROMPT, NUM_TOKENS).tokens
    config = tiny_run(*folders, mode, HOST)
    config.tiers.host.checksums = True
    with engine_for(config, PROMPT, NUM_TOKENS) as engine:
        hierarchy = engine.hierarchy
        hierarchy.start()
        hierarchy.round()
        memory = hierarchy.verifier.model._cache._layers[1]._store._memory
        memory[3].view(-1).view(torch.uint8)[77] ^= 4
        hierarchy.round()
        assert hierarchy.num_rereads == engine.streaming_report()["damaged_blocks"] == 1
        while not hierarchy.session.is_finished:
            hierarchy.round()
        assert hierarchy.num_rereads == 1
        assert hierarchy.session.generated == wanted


def test_negative_control_without_checksums_a_flipped_bit_goes_unnoticed(folders):
    with engine_for(tiny_run(*folders, Mode.autoregressive, HOST), PROMPT, NUM_TOKENS) as engine:
        hierarchy = engine.hierarchy
        hierarchy.start()
        memory = hierarchy.verifier.model._cache._layers[0]._store._memory
        memory[3].view(-1).view(torch.uint8)[79] ^= 64
        hierarchy.round()
        assert hierarchy.num_rereads == 0


@pytest.mark.parametrize("mode", [Mode.autoregressive, Mode.triforce])
@pytest.mark.parametrize("tier", [HOST, DISK])
def test_copies_that_come_late_change_no_token(folders, monkeypatch, mode, tier):
    wanted = generate(tiny_run(*folders, mode, DEVICE), PROMPT, 12).tokens
    counter, copy = itertools.count(), CpuBlockStreamer._copy

    def late(streamer, block, buffer):
        if next(counter) % 50 == 7:
            time.sleep(0.05)
        return copy(streamer, block, buffer)

    monkeypatch.setattr(CpuBlockStreamer, "_copy", late)
    assert generate(tiny_run(*folders, mode, tier), PROMPT, 12).tokens == wanted
    assert next(counter) > 100


def test_positions_keep_their_rotation_where_it_depends_on_the_length_of_the_prompt(tmp_path, monkeypatch):
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    config = tiny_config("llama", rope_parameters=dynamic, max_position_embeddings=128)
    folder = save_checkpoint(tmp_path / "dynamic", config)
    wanted = generate(tiny_run(folder, mode=Mode.autoregressive), PROMPT, NUM_TOKENS).tokens
    damage_at(monkeypatch, {400})
    with engine_for(tiny_run(folder, mode=Mode.autoregressive, tier=DISK), PROMPT, NUM_TOKENS) as engine:
        run_to_end(engine.hierarchy)
        assert engine.hierarchy.num_rereads == 1
        assert engine.hierarchy.session.generated == wanted


def test_a_disk_that_goes_on_damaging_blocks_ends_the_run(folders, monkeypatch):
    damage_at(monkeypatch, set(range(10**6)))
    with engine_for(tiny_run(*folders, Mode.triforce, DISK), PROMPT, NUM_TOKENS) as engine:
        with pytest.raises(DamagedBlockError, match="has another checksum"):
            run_to_end(engine.hierarchy)
        assert engine.hierarchy.num_rereads == MAX_REREADS
