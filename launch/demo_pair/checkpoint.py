"""Writes a widened checkpoint: weights that launch/demo_pair/widening.py computes, configuration and tokenizer.

Files are written through mapped memory, so that a checkpoint of many zeros takes little time and next to no place.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from hydra.core.config_store import ConfigStore
from safetensors import safe_open

from conf.model_shapes import PUBLISHED, ModelShape, model_shape
from conf.model_source import model_source
from conf.schema import ConfigError, Dtype, expand_home, require
from launch.demo_pair.widening import Widening, make_noise
from workers.models.sharded_weights import weight_files

SHARD_BYTES = 4 << 30
ALIGNMENT = 64
"""Bytes that the data of a safetensors file is aligned to."""
NAMES_OF_DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32"}
SIZE_KEYS = ("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "vocab_size")
SHAPE_KEYS = (*SIZE_KEYS, "ties_embeddings")


class Fill(StrEnum):
    """Weights of the new heads and MLP rows, before the zeros that follow them."""

    zeros = "zeros"
    noise = "noise"


@dataclass(kw_only=True, slots=True)
class WidenConfig:
    """One checkpoint to widen."""

    source: str = "assets/demo/target"
    """A folder with a Llama checkpoint, as safetensors."""
    shape: str | None = "NousResearch/Yarn-Llama-2-7b-128k"
    """A hub id of conf/model_shapes.py, or a folder; null: the source's own. The head dimension stays the source's."""
    num_layers: int | None = None
    """This and the sizes below: null is as in the shape."""
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    vocab_size: int | None = None
    ties_embeddings: bool | None = None
    """Whether the head is the table of embeddings; more vocabulary needs a head of its own."""
    fill: Fill = Fill.zeros
    """zeros: files take next to no place on disk; noise: as hard to compute with as real weights."""
    dtype: Dtype = Dtype.bfloat16
    """Dtype of the weights: bfloat16 or float32."""
    output: str = "outputs/widened"
    """Folder that the checkpoint is written to; one that is there is overwritten."""

    def __post_init__(self) -> None:
        expand_home(self, "", "source", "shape", "output")
        legal = self.dtype in (Dtype.bfloat16, Dtype.float32)
        require(legal, "dtype", str(self.dtype), "bfloat16 or float32")
        for key in SIZE_KEYS:
            value = getattr(self, key)
            require(value is None or value >= 1, key, value, ">= 1, or null")


ConfigStore.instance().store(name="widen_schema", node=WidenConfig)


@dataclass(frozen=True, slots=True)
class Widened:
    """A checkpoint that was written, and the algebra that made it."""

    folder: Path
    shape: ModelShape
    num_bytes: int
    widening: Widening


def widen(config: WidenConfig, shard_bytes: int = SHARD_BYTES) -> Widened:
    """Writes weights in files of at most `shard_bytes`, configuration and tokenizer. Raises ConfigError."""
    source = Path(model_source("source", config.source))
    if not source.is_dir():
        raise ConfigError(f"source is {config.source!r}; it must be a folder, for example assets/demo/target")
    facts = json.loads((source / "config.json").read_text(encoding="utf-8"))
    has_bias = facts.get("attention_bias") or facts.get("mlp_bias")
    if facts.get("model_type") != "llama" or has_bias:
        what = f"model type {facts.get('model_type')}" + (" with biases" if has_bias else "")
        raise ConfigError(f"source is {config.source!r} of {what}; it must be a Llama model without biases")
    small = model_shape("source", config.source, str(source))
    wide = wide_shape(config, small)
    dtype = getattr(torch, config.dtype)
    widening = Widening(small, wide, _read_weights(config.source, source), facts["rms_norm_eps"], dtype)
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    for stale in [*folder.glob("model*.safetensors"), *folder.glob("model*.safetensors.index.json")]:
        stale.unlink()
    noise = make_noise(dtype) if config.fill is Fill.noise else None
    num_bytes = _write_weights(folder, widening, noise, shard_bytes)
    fields = _config_fields(wide, widening.eps, dtype)
    _write_json(folder / "config.json", facts | fields)
    for path in source.iterdir():
        if path.name == "generation_config.json" or "token" in path.name or path.name == "vocab.json":
            shutil.copyfile(path, folder / path.name)
    return Widened(folder, wide, num_bytes, widening)


def wide_shape(config: WidenConfig, small: ModelShape) -> ModelShape:
    """The shape that a configuration asks for, with the small model's head dimension. Raises ConfigError."""
    shape = small
    if config.shape is not None:
        if config.shape not in PUBLISHED and not Path(config.shape).is_dir():
            known = ", ".join(sorted(PUBLISHED))
            raise ConfigError(f"shape is {config.shape!r}; it must be null, a folder, or of {known}")
        shape = model_shape("shape", config.shape, config.shape)
        # As many values in a row of q, k and v, cut into heads of the source's dimension.
        heads, kv_heads = (
            max(1, count * shape.head_dim // small.head_dim) for count in (shape.num_heads, shape.num_kv_heads)
        )
        shape = replace(shape, head_dim=small.head_dim, num_heads=heads, num_kv_heads=kv_heads)
    given = {key: getattr(config, key) for key in SHAPE_KEYS if getattr(config, key) is not None}
    return replace(shape, **given)


def _read_weights(name: str, source: Path) -> dict[str, torch.Tensor]:
    files = weight_files(str(source))
    if files is None:
        raise ConfigError(f"source is {name!r}, which has no safetensors files; it must have")
    weights: dict[str, torch.Tensor] = {}
    for path in set(files.values()):
        with safe_open(path, framework="pt") as file:
            weights |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return weights


def _config_fields(wide: ModelShape, eps: float, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "num_hidden_layers": wide.num_layers,
        "hidden_size": wide.hidden_size,
        "intermediate_size": wide.intermediate_size,
        "num_attention_heads": wide.num_heads,
        "num_key_value_heads": wide.num_kv_heads,
        "head_dim": wide.head_dim,
        "vocab_size": wide.vocab_size,
        "tie_word_embeddings": wide.ties_embeddings,
        "rms_norm_eps": eps,
        "dtype": str(dtype).split(".")[-1],
    }


def _write_weights(folder: Path, widening: Widening, noise: torch.Tensor | None, shard_bytes: int) -> int:
    """Writes all shards and returns the bytes of all weights.

    One shard is in memory at a time, and of it only the pages that are written.
    """
    sizes = widening.sizes()
    num_bytes = {name: math.prod(size) * widening.dtype.itemsize for name, size in sizes.items()}
    shards = _shards(num_bytes, shard_bytes)
    file_of = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        with _mapped_file(folder / file, {name: sizes[name] for name in names}, widening.dtype) as tensors:
            for name, tensor in tensors.items():
                widening.fill(name, tensor, noise)
                file_of[name] = file
    index = {"metadata": {"total_size": sum(num_bytes.values())}, "weight_map": file_of}
    _write_json(folder / "model.safetensors.index.json", index)
    return sum(num_bytes.values())


def _shards(num_bytes: dict[str, int], shard_bytes: int) -> list[list[str]]:
    """Names of the weights of each shard, in order; a weight larger than `shard_bytes` has one of its own."""
    shards: list[list[str]] = []
    room = 0
    for name, count in num_bytes.items():
        if not shards or count > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= count
    return shards


@contextmanager
def _mapped_file(
    path: Path, sizes: dict[str, tuple[int, ...]], dtype: torch.dtype
) -> Iterator[dict[str, torch.Tensor]]:
    """A new safetensors file, its tensors mapped to memory and zero: pages that nobody writes take no place on disk."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    spans: dict[str, tuple[int, int]] = {}
    end = 0
    for name, size in sizes.items():
        begin, end = end, end + math.prod(size) * dtype.itemsize
        spans[name] = begin, end
        header[name] = {"dtype": NAMES_OF_DTYPES[dtype], "shape": size, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    data_start = 8 + len(text)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(data_start + end)
    mapped = torch.from_file(str(path), shared=True, size=data_start + end, dtype=torch.uint8)
    tensors = {}
    for name, size in sizes.items():
        begin, stop = (data_start + offset for offset in spans[name])
        tensors[name] = mapped[begin:stop].view(dtype).view(size)
    yield tensors


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
