"""workers/models/rotary.py: the rotation of a position is the same whoever asks, and when."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import torch

from tests.support.tiny_models import random_model, tiny_config
from workers.models.rotary import RotaryTable, make_length_independent


class RemembersTheLongest(torch.nn.Module):
    """As dynamic NTK: what it gives depends on the longest sequence it has seen, until it sees a short one."""

    def __init__(self):
        super().__init__()
        self.longest = 0

    def forward(self, x: torch.Tensor, positions: torch.Tensor):
        last = int(positions.max())
        self.longest = last if last < 8 else max(self.longest, last)
        time.sleep(1e-4)
        angles = positions[..., None] / (1 + self.longest)
        return angles.cos(), angles.sin()


def rows(table: RotaryTable, last: int) -> list[torch.Tensor]:
    return list(table(torch.zeros(1), torch.arange(last + 1)[None]))


def fresh_table() -> RotaryTable:
    table = RotaryTable(RemembersTheLongest())
    table.read_prompt(10)
    return table


def test_roles_that_ask_at_the_same_time_get_what_one_would():
    wanted, table, lasts = rows(fresh_table(), 400), fresh_table(), range(20, 400, 40)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda last: (last, rows(table, last)), [*lasts, *reversed(lasts)] * 2))
    for last, (cos, sin) in found:
        assert torch.equal(cos, wanted[0][:, : last + 1]) and torch.equal(sin, wanted[1][:, : last + 1])


def test_only_a_family_that_rereads_gets_other_rotations_when_tokens_are_read_again():
    """This rotary embedding rotates 10 tokens by one angle, and 30 by another."""
    stays, changes = fresh_table(), RotaryTable(RemembersTheLongest(), rereads=True)
    changes.read_prompt(10)
    before = rows(stays, 9), rows(changes, 9)
    for table in (stays, changes):
        table.read_again(30)
    assert torch.equal(rows(stays, 9)[0], before[0][0])
    assert not torch.equal(rows(changes, 9)[0], before[1][0])


def test_a_model_without_rotations_needs_no_table_whatever_its_configuration_says():
    model = random_model(tiny_config("opt", word_embed_proj_dim=32, ffn_dim=48, num_key_value_heads=4))
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert make_length_independent(model) is None
