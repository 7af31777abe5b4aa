"""Measures what lossless packing of the streamed cache would bring: python launch/measure_packing.py document=FILE

A document is read by the target; each block of its full cache is packed (launch/exponent_packing.py), compared bit by
bit with what comes back, and timed against a plain copy, one core, all in turns. What follows for links of several
speeds is arithmetic: a stream of B bytes a second gains where a byte comes sooner packed than as it is.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from statistics import median

import hydra
import numpy as np
import torch
from omegaconf import DictConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conf.schema import DecodingConfig, Dtype, Mode, ModelConfig, PlacementConfig, RunConfig
from launch.engine import prepare
from launch.exponent_packing import NUM_EXPONENTS, Packed, exponents_of, pack, unpack
from launch.sizing import PIECE_TOKENS
from tiers.device_tier import DeviceTier
from tiers.full_cache import DeviceLayer, FullCache
from workers.model import TargetModel
from workers.pretrained import load_model

SIDES = ("keys", "values")


def blocks_of(cfg: DictConfig) -> dict[str, list[np.ndarray]]:
    """By side: bits of bf16 [H, block_tokens * D] of every block of every layer."""
    config = RunConfig(
        model=ModelConfig(target=cfg.target, drafter="none", dtype=Dtype.bfloat16),
        decoding=DecodingConfig(mode=Mode.autoregressive),
        placement=PlacementConfig(device="cpu"),
    )
    prepared = prepare(config)
    facts, tier = prepared.target, DeviceTier(prepared.device)
    text = Path(cfg.document).read_text(encoding="utf-8")
    tokens = prepared.tokenizer(text[: 16 * cfg.context])["input_ids"][: cfg.context]
    layers = [DeviceLayer(facts.cache_shape, len(tokens), tier) for _ in facts.windows]
    cache = FullCache(layers, facts.windows, None)
    model = load_model(facts, prepared.device, self_check=False)
    TargetModel(model, cache, piece_tokens=PIECE_TOKENS, hidden_tier=tier, selection=None).prefill(tokens)
    blocks = {side: [] for side in SIDES}
    for layer in range(len(layers)):
        for start in range(0, len(tokens) - cfg.block_tokens + 1, cfg.block_tokens):
            for side, rows in zip(SIDES, cache.read(layer, start, start + cfg.block_tokens), strict=True):
                blocks[side].append(rows.contiguous().view(torch.uint16).flatten(1).numpy().copy())
    return blocks


def sizes(blocks: list[np.ndarray], head_dim: int) -> dict[str, float]:
    """Bits of a value as packed, and what bounds them: means over blocks, which must come back bit by bit."""
    values = sum(block.size for block in blocks)
    out, num_bytes, num_exceptions = np.empty_like(blocks[0]), 0, 0
    for block in blocks:
        unpack(packed := pack(block), out)
        assert np.array_equal(out, block), "a block came back with other bits"
        num_bytes += packed.num_bytes
        num_exceptions += len(packed.exceptions)
    of_heads = [exponents_of(head) for block in blocks for head in block]
    of_channels = [rows for head in of_heads for rows in head.reshape(-1, head_dim).T]
    return {
        "bits": 8 * num_bytes / values,
        "exceptions": num_exceptions / values,
        "not_of_most_frequent": np.mean([_share_beyond(exponents) for exponents in of_heads]),
        "entropy_head": 8 + np.mean([_entropy(exponents) for exponents in of_heads]),
        "entropy_channel": 8 + np.mean([_entropy(exponents) for exponents in of_channels]),
    }


def _entropy(exponents: np.ndarray) -> float:
    shares = np.bincount(exponents)
    shares = shares[shares > 0] / exponents.size
    return float(-(shares * np.log2(shares)).sum())


def _share_beyond(exponents: np.ndarray) -> float:
    """Of values with an exponent that is not one of the most frequent, wherever those are."""
    return float(np.sort(np.bincount(exponents))[:-NUM_EXPONENTS].sum() / exponents.size)


def speeds(blocks: list[np.ndarray], repetitions: int) -> dict[str, list[float]]:
    """GB/s of bf16, of each repetition: from all blocks to a buffer of one, as a stream goes."""
    packed = [pack(block) for block in blocks]
    buffer = np.empty_like(blocks[0])
    actions = {
        "copy": lambda: [np.copyto(buffer, block) for block in blocks],
        "copy of packed bytes": lambda: [_copy(one, buffer) for one in packed],
        "unpack": lambda: [unpack(one, buffer) for one in packed],
        "pack": lambda: [pack(block) for block in blocks],
    }
    num_bytes = sum(block.nbytes for block in blocks)
    rates: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repetitions + 1):
        for name, action in actions.items():
            began = time.perf_counter()
            action()
            rates[name].append(num_bytes / (time.perf_counter() - began) / 1e9)
    return {name: each[1:] for name, each in rates.items()}  # the first one warms up


def _copy(packed: Packed, buffer: np.ndarray) -> None:
    target = buffer.view(np.uint8)[:, : packed.plane.shape[1]]
    np.copyto(target, packed.plane)
    np.copyto(target[:, : packed.nibbles.shape[1]], packed.nibbles)


def gains(link_gb_per_s: float, unpack_gb_per_s: float, share: float) -> tuple[float, float]:
    """How much sooner the bytes are there: unpacked by another core meanwhile, and by the one that waits for them.

    `share`: packed bytes of plain ones.
    """
    plain, packed, unpacking = 1 / link_gb_per_s, share / link_gb_per_s, 1 / unpack_gb_per_s
    return plain / max(packed, unpacking), plain / (packed + unpacking)


@hydra.main(version_base=None, config_path="../conf", config_name="measure_packing")
def main(cfg: DictConfig) -> None:
    blocks = blocks_of(cfg)
    head_dim = blocks["keys"][0].shape[1] // cfg.block_tokens
    result = {side: sizes(blocks[side], head_dim) for side in SIDES}
    result["gb_per_s"] = speeds(blocks["keys"] + blocks["values"], cfg.repetitions)
    share = sum(result[side]["bits"] for side in SIDES) / 2 / 16
    rate = median(result["gb_per_s"]["unpack"])
    print("| | bits | exceptions | beyond the 16 most frequent | entropy by head | by channel |\n" + "|---" * 6 + "|")
    for side in SIDES:
        one = result[side]
        shares = f"{one['exceptions']:.3%} | {one['not_of_most_frequent']:.3%}"
        print(f"| {side} | {one['bits']:.2f} | {shares} | {one['entropy_head']:.2f} | {one['entropy_channel']:.2f} |")
    print("\n| GB/s of bf16 | median | least | most |\n" + "|---" * 4 + "|")
    for name, each in result["gb_per_s"].items():
        print(f"| {name} | {median(each):.2f} | {min(each):.2f} | {max(each):.2f} |")
    print("\n| link, GB/s | gain, another core unpacks | gain, the same core does |\n" + "|---" * 3 + "|")
    for link in cfg.links:
        pipelined, alone = gains(link, rate, share)
        print(f"| {link:g} | {pipelined:.2f} | {alone:.2f} |")
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    main()
