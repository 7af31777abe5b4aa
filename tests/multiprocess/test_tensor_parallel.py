"""A tensor-parallel model computes what transformers' whole model computes, and the same bits on every rank."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers

from conf.schema import ConfigError
from tests.multiprocess.process_group import run_ranks
from tests.support.tiny_models import FAMILIES, random_prompt
from tiers.device_layer import DeviceLayer
from tiers.device_tier import DeviceTier
from tiers.full_cache import FullCache
from workers.checkpoint.facts import describe
from workers.models.loading import load_model
from workers.parallel.collectives import GroupAllReduce, SharedMemoryAllReduce, has_ordered_stores
from workers.parallel.shard import Shard

CPU = torch.device("cpu")
NUM_TOKENS, NUM_LOGITS, PIECE_TOKENS, TIMEOUT_SECONDS = 75, 9, 16, 60.0
PROMPT = random_prompt(NUM_TOKENS)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.03}
"""Of the norm of all logits."""
MAX_RANKS = 4


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model on so many ranks."""

    family: str
    size: int
    changes: tuple[tuple[str, object], ...] = ()
    self_check: bool = False
    over_gloo: bool = False
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        changes = [f"{name}={value}" for name, value in self.changes]
        others = [*["gloo"] * self.over_gloo, *["bf16"] * (self.dtype == torch.bfloat16)]
        return " ".join([self.family, f"TP {self.size}", *changes, *others])


def case(family: str, size: int, *, self_check=False, over_gloo=False, dtype=torch.float32, **changes) -> Case:
    how = {"self_check": self_check, "over_gloo": over_gloo, "dtype": dtype}
    return Case(family=family, size=size, changes=tuple(changes.items()), **how)


CASES = [
    *(case(family, 2) for family in [*FAMILIES, "phi", "olmo"]),
    *(case(family, 4) for family in ("llama", "qwen2", "phi3", "olmo2", "starcoder2", "glm4", "gpt_oss", "qwen3_moe")),
    case("llama", 1),
    case("llama", 2, num_key_value_heads=1),
    case("llama", 4, num_key_value_heads=1),
    case("llama", 2, hidden_size=48, num_attention_heads=6, num_key_value_heads=3),
    case("llama", 3, num_attention_heads=8, num_key_value_heads=4),
    case("llama", 4, hidden_size=48, num_attention_heads=6, num_key_value_heads=2, intermediate_size=50),
    case("llama", 2, tie_word_embeddings=True),
    case("llama", 2, vocab_size=101),
    case("llama", 2, attention_bias=True, mlp_bias=True),
    case("llama", 2, over_gloo=True),
    case("llama", 2, dtype=torch.bfloat16),  # linear layers of few rows: workers.attention.few_rows
    case("llama", 4, dtype=torch.bfloat16, over_gloo=True),
    case("llama", 4, over_gloo=True),
    case("cohere", 2, use_qk_norm=True),
    case("gpt_neox", 2, num_key_value_heads=4),
    case(
        "gemma3_text", 2, self_check=True, num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2
    ),
    case("smollm3", 2, self_check=True, num_hidden_layers=4),
    case("mixtral", 2, self_check=True, num_hidden_layers=3),
]


def compute_all(rank: int, cases: list[tuple[Case, str]], folder: str) -> None:
    """One rank's outputs of all cases, to `folder`."""
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    store, timeout = dist.FileStore(f"{folder}/store", MAX_RANKS), timedelta(seconds=TIMEOUT_SECONDS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=MAX_RANKS, timeout=timeout)
    groups = {size: dist.new_group(list(range(size)), timeout=timeout) for size in range(1, MAX_RANKS + 1)}
    of_memory = {}
    for number, (one, checkpoint) in enumerate(cases):
        if rank >= one.size:
            continue
        shard, over_gloo = Shard(rank, one.size), one.over_gloo or not has_ordered_stores()
        if not over_gloo and one.size not in of_memory:
            timeouts = {"timeout_seconds": TIMEOUT_SECONDS, "start_timeout_seconds": TIMEOUT_SECONDS}
            of_memory[one.size] = SharedMemoryAllReduce(Path(folder, f"sums{one.size}"), shard, **timeouts)
        all_reduce = GroupAllReduce(groups[one.size]) if over_gloo else of_memory[one.size]
        torch.save(compute(checkpoint, shard, all_reduce, one.self_check, one.dtype), Path(folder, f"{number}-{rank}"))
    dist.destroy_process_group()


def compute(checkpoint: str, shard: Shard, all_reduce, self_check: bool = False, dtype=torch.float32) -> dict:
    """Logits of the last tokens, read in two ways, and sizes."""
    facts = describe("model.target", checkpoint, dtype).sharded(shard)
    model = load_model(facts, CPU, self_check=self_check, all_reduce=all_reduce)
    outputs = {"num_kv_heads": facts.cache_shape.num_kv_heads, "num_weight_bytes": facts.num_weight_bytes}
    outputs["loaded_bytes"] = sum(parameter.nbytes for parameter in model.hf_model.parameters())
    for way in (read_plainly, read_layer_by_layer):
        layers = [DeviceLayer(facts.cache_shape, NUM_TOKENS, DeviceTier(CPU)) for _ in facts.windows]
        cache = FullCache(layers, facts.windows)
        model.start_sequence(NUM_TOKENS)
        way(model, PROMPT[:-NUM_LOGITS], cache)
        outputs[way.__name__] = model.forward(PROMPT[-NUM_LOGITS:], cache, NUM_LOGITS)
    return outputs


def read_plainly(model, tokens, cache) -> None:
    model.forward(tokens[:40], cache, 1)
    model.forward(tokens[40:], cache, 1)


def read_layer_by_layer(model, tokens, cache) -> None:
    with cache.prefill(len(tokens)) as make_layer_cache:
        make_hidden = partial(torch.empty, dtype=model.dtype)
        model.layer_major.prefill(tokens, make_layer_cache, PIECE_TOKENS, make_hidden=make_hidden)


@pytest.fixture(scope="module")
def checkpoint_of(checkpoints):
    return lambda one: str(checkpoints(one.family, **dict(one.changes)))


@pytest.fixture(scope="module")
def outputs_of(checkpoint_of):
    """By the name of a case: the outputs of its ranks. One group of processes computes them all."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        run_ranks(compute_all, MAX_RANKS, [(one, checkpoint_of(one)) for one in CASES], folder)
        yield {
            str(one): [torch.load(Path(folder, f"{number}-{rank}")) for rank in range(one.size)]
            for number, one in enumerate(CASES)
        }


def wanted_logits(checkpoint: str) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.inference_mode():
        return model(input_ids=torch.tensor([PROMPT]), use_cache=False).logits[0, -NUM_LOGITS:]


WAYS = (read_plainly.__name__, read_layer_by_layer.__name__)


@pytest.mark.parametrize("one", CASES, ids=str)
def test_logits_are_those_of_the_whole_model(outputs_of, checkpoint_of, one):
    wanted = wanted_logits(checkpoint_of(one))
    for way in WAYS:
        error = (outputs_of[str(one)][0][way].float() - wanted).norm() / wanted.norm()
        assert error <= TOLERANCE[one.dtype]


@pytest.mark.parametrize("one", CASES, ids=str)
def test_all_ranks_have_the_same_bits(outputs_of, one):
    first, *others = outputs_of[str(one)]
    for other in others:
        assert all(torch.equal(first[way], other[way]) for way in WAYS)


@pytest.mark.parametrize("one", CASES, ids=str)
def test_a_rank_holds_its_own_heads_and_the_weights_it_is_said_to(outputs_of, checkpoint_of, one):
    whole = describe("model.target", checkpoint_of(one), one.dtype)
    outputs, num_kv_heads = outputs_of[str(one)], whole.cache_shape.num_kv_heads
    assert sum(output["num_kv_heads"] for output in outputs) == max(num_kv_heads, one.size)
    for output in outputs:
        assert output["loaded_bytes"] == output["num_weight_bytes"]
        is_whole = output["num_weight_bytes"] == whole.num_weight_bytes
        assert is_whole == (one.size == 1 or one.family == "gpt_oss")  # of which only the cache is parted


class NoSum:
    def all_reduce(self, tensor: torch.Tensor) -> None:
        pass


def test_negative_control_without_the_sums_logits_differ(checkpoints):
    checkpoint = str(checkpoints("llama"))
    outputs, wanted = compute(checkpoint, Shard(0, 2), NoSum()), wanted_logits(checkpoint)
    for way in WAYS:
        assert (outputs[way] - wanted).abs().max() > 0.1


@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral"])
def test_the_self_check_sees_a_wrong_sum(checkpoints, family):
    with pytest.raises(ConfigError, match="self-check"):
        compute(str(checkpoints(family)), Shard(0, 2), NoSum(), self_check=True)
