"""Times the two ways to compute attention of a few rows over many keys on the device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median

import torch

from launch.command_line.timing import repeated_seconds
from launch.measure.gpu_results import Cells
from launch.measure.gpu_setting import Setting
from workers.attention.kernels import by_flash, by_matmul

NUM_HEADS, HEAD_DIM = 32, 128
NUMS_OF_ROWS = (1, 9, 17, 33)
REPETITIONS, WARM_UP = 10, 2


def measure_attention(setting: Setting) -> None:
    """A table of milliseconds of one layer, over the keys of the on-chip context."""
    device, num_keys = setting.device, setting.config.on_chip_tokens
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    k, v = torch.randn(2, NUM_HEADS, num_keys, HEAD_DIM, device=device, dtype=dtype)
    scale = HEAD_DIM**-0.5
    rows: list[Cells] = []
    for num_rows in NUMS_OF_ROWS:
        q = torch.randn(NUM_HEADS, 1, num_rows, HEAD_DIM, device=device, dtype=dtype)
        ways: dict[str, Callable[[], object]] = {
            "by matrix products, ms": partial(by_matmul, q.flatten(1, 2), k, v, scale, mask=None, softcap=None),
            "by the flash kernel, ms": partial(by_flash, q, k, v, scale, is_causal=False),
        }
        row: Cells = {"rows": num_rows, "keys": num_keys}
        for name, way in ways.items():
            row[name] = 1e3 * median(repeated_seconds(way, REPETITIONS, warm_up=WARM_UP, device=device))
        rows.append(row)
        setting.results.set_table("Attention of one layer", rows)
