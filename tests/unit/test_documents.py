"""What the documents tell to run does what they say."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch

from conf.schema import LOOKUP_DRAFTER, Mode
from launch.assembly.prepare import prepare
from tests.support.tiny_models import greedy_tokens
from tests.support.tiny_runs import DISK, engine_for, run_to_end, tiny_run

ROOT = Path(__file__).resolve().parents[2]
TEXT = "".join(f"def f{i}(x):\n    return x * {i * 7919 % 1000}\n\n\n" for i in range(120))
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def sliding(tmp_path_factory):
    """The demo's target with sliding windows, as docs/memory_tiers.md makes it."""
    folder = tmp_path_factory.mktemp("documents")
    os.symlink(ROOT / "assets", folder / "assets")
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/memory_tiers.md").read_text(encoding="utf-8"), re.DOTALL)
    before = Path.cwd()
    os.chdir(folder)
    try:
        exec(compile(code, "memory_tiers.md", "exec"), {})
    finally:
        os.chdir(before)
    return folder / "sliding"


def test_a_target_with_windows_in_most_layers_streams_its_last_layer_alone(sliding):
    """And gives transformers' own tokens, in all modes."""
    fields = json.loads((sliding / "config.json").read_text())
    assert fields["layer_types"].index("full_attention") == fields["num_hidden_layers"] - 1
    config = tiny_run(sliding, LOOKUP_DRAFTER, Mode.triforce, DISK, budget=256)
    prompt = prepare(config).tokenizer(TEXT)["input_ids"][:1500]
    wanted = greedy_tokens(sliding, prompt, NUM_TOKENS, torch.float32)
    for mode in (Mode.triforce, Mode.autoregressive):
        config.decoding.mode = mode
        with engine_for(config, prompt, NUM_TOKENS) as engine:
            run_to_end(engine.hierarchy)
            assert engine.hierarchy.session.generated == wanted
    num_bytes, block_bytes = engine.streaming_report()["bytes"], 16 * 2 * 2 * 128 * 4
    blocks_in_window = 5 * (512 // 16 + 2)
    most = NUM_TOKENS * block_bytes * (blocks_in_window + (len(prompt) + NUM_TOKENS) // 16)
    assert NUM_TOKENS * block_bytes * (len(prompt) // 16 - 1) < num_bytes <= most
