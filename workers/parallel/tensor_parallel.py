"""The weights of one rank of a tensor-parallel model: which parts of them it has, and where partial results are summed.

Guided by the model's own `tp_plan`:

    part                        what a rank has                                     what is summed
    q, k, v projections         the rows of its own heads                           -
    output projection           the columns of its own heads                        its output
    MLP up (and gate)           a range of intermediate features                    -
    MLP down                    the same range                                      its output
    embeddings, norms, head     all                                                 -

What is planned in another way, or not at all, stays whole. Of such an MLP each rank computes everything, and nothing is
summed. Such an attention (a fused projection, a norm across heads) projects all heads; our attention function works on
the rank's own and gives zeros for the others, so that the cache is parted all the same.

The logits are the same bits on every rank, as whatever is not summed is computed alike: on devices of the same kind,
or processors with as many threads each.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from conf.schema import ConfigError
from workers.parallel.shard import Heads, Shard, own_heads, own_range

OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj")
FUSED_UP = "gate_up_proj"
"""Gate and up projection in one, in this order: Phi 3, GLM."""


class AllReduce(Protocol):
    """Sums over the ranks, which call it in the same order."""

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sums `tensor` in place; afterwards every rank has the same bits."""


def pooled_scores(all_reduce: AllReduce, heads: Heads, num_kv_heads: int, scores: torch.Tensor) -> torch.Tensor:
    """Scores [H, chunks] over all query heads of a kv head, from `scores` over those of this rank; see rule.Pool.

    Each score is a mean over query heads, of which ranks may have more and fewer. All ranks call it in the same order,
    and those that share a kv head get the same bits.
    """
    num_own = heads.query.stop - heads.query.start
    sums = scores.new_zeros(num_kv_heads, scores.shape[1] + 1)
    sums[heads.kv, :-1] = scores * num_own
    sums[heads.kv, -1] = num_own
    all_reduce.all_reduce(sums)
    own = sums[heads.kv]
    return own[:, :-1] / own[:, -1:]


class Sliceable(Protocol):
    """A tensor, or a tensor in a file, of which only the part is read that is asked for."""

    def __getitem__(self, index: tuple[slice, ...], /) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Cut:
    """The part of a parameter that a rank has: ranges along one dimension."""

    dim: int
    ranges: tuple[slice, ...]

    def of(self, whole: Sliceable, num_dims: int) -> torch.Tensor:
        """The rank's part of `whole`, a tensor of `num_dims` dimensions."""
        parts = [
            whole[tuple(part if dim == self.dim else slice(None) for dim in range(num_dims))] for part in self.ranges
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)

    def shape(self, whole: torch.Size) -> torch.Size:
        """The size of the rank's part of a tensor of size `whole`."""
        size = sum(part.stop - part.start for part in self.ranges)
        return torch.Size(size if dim == self.dim else length for dim, length in enumerate(whole))


@dataclass(slots=True)
class Sharding:
    """How one rank's part differs from the whole model; modules and parameters by name."""

    shard: Shard
    heads: Heads
    cuts: dict[str, Cut] = field(default_factory=dict)
    """Parameters of which the rank has a part."""
    partial: list[str] = field(default_factory=list)
    """Modules whose outputs are to be summed."""
    masked: list[str] = field(default_factory=list)
    """Attention modules that project all heads."""

    def shape_of(self, name: str, parameter: torch.Tensor) -> torch.Size:
        return self.cuts[name].shape(parameter.shape) if name in self.cuts else parameter.shape

    def num_parameters(self, model: nn.Module) -> int:
        """Number of parameters of the whole `model` that this rank has."""
        return sum(self.shape_of(name, parameter).numel() for name, parameter in model.named_parameters())


def plan_sharding(model: nn.Module, shard: Shard) -> Sharding:
    """How a whole transformers model, which may be on the meta device, is parted. Raises ConfigError."""
    whole_config: Any = model.config
    config = whole_config.get_text_config()
    num_kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    heads = own_heads(config.num_attention_heads, num_kv_heads, shard)
    sharding, styles = Sharding(shard, heads), _Styles(model)
    attentions = {name: module for name, module in model.named_modules() if _is_attention(module)}
    if len(attentions) != config.num_hidden_layers:
        raise ConfigError(
            f"the number of verifier ranks is {shard.size}; it must be 1 for model type {config.model_type}, "
            f"in which {len(attentions)} of {config.num_hidden_layers} attention layers were found"
        )
    for name, module in model.named_modules():
        if name in attentions:
            _plan_attention(sharding, styles, name, module, config.num_attention_heads)
        else:
            _plan_mlp(sharding, styles, name, module)
    return sharding


class _Styles:
    """A model's `tp_plan`, by names of modules."""

    def __init__(self, model: nn.Module):
        plan: Any = model.tp_plan
        self._plan: dict[str, str] = plan

    def linear_children(self, name: str, module: nn.Module, style: str) -> dict[str, nn.Linear]:
        """The children of a module that are planned in this style, by the last part of their names."""
        return {
            child_name: child
            for child_name, child in module.named_children()
            if isinstance(child, nn.Linear) and self._plan.get(_any_layer(f"{name}.{child_name}")) == style
        }


def _any_layer(name: str) -> str:
    """The name of a module as a plan has it: model.layers.7.mlp -> model.layers.*.mlp."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _is_attention(module: nn.Module) -> bool:
    return hasattr(module, "layer_idx") and _output_projection(module) is not None


def _output_projection(module: nn.Module) -> str | None:
    children = dict(module.named_children())
    return next((name for name in OUTPUT_PROJECTIONS if name in children), None)


def _plan_attention(sharding: Sharding, styles: _Styles, name: str, module: nn.Module, num_query_heads: int) -> None:
    output = _output_projection(module)
    assert output is not None, f"{name} is no attention"
    sharding.partial.append(f"{name}.{output}")
    projections = styles.linear_children(name, module, "colwise")
    rowwise = styles.linear_children(name, module, "rowwise")
    if set(projections) != {"q_proj", "k_proj", "v_proj"} or set(rowwise) != {output}:
        sharding.masked.append(name)
        return
    head_dim = projections["q_proj"].out_features // num_query_heads
    if _has_others(module, [*projections, output], max_numel=head_dim):
        sharding.masked.append(name)
        return
    heads = sharding.heads
    for child in projections:
        own = heads.query if child == "q_proj" else heads.kv
        _cut_rows(sharding, f"{name}.{child}", projections[child], _scaled(own, head_dim))
    sharding.cuts[f"{name}.{output}.weight"] = Cut(1, (_scaled(heads.query, head_dim),))


def _plan_mlp(sharding: Sharding, styles: _Styles, name: str, module: nn.Module) -> None:
    ups = styles.linear_children(name, module, "colwise")
    downs = styles.linear_children(name, module, "rowwise")
    fused = styles.linear_children(name, module, "colwise_gather_output")
    if fused.keys() == {FUSED_UP}:
        ups, downs = fused, styles.linear_children(name, module, "rowwise_split_input")
    if not ups or len(downs) != 1 or _has_others(module, [*ups, *downs], max_numel=1):
        return
    [(down, projection)] = downs.items()
    num_features = projection.in_features
    starts = (0, num_features) if fused else (0,)
    if any(up.out_features != num_features * len(starts) for up in ups.values()):
        return
    own = own_range(num_features, sharding.shard)
    for up in ups:
        _cut_rows(sharding, f"{name}.{up}", ups[up], *(slice(at + own.start, at + own.stop) for at in starts))
    sharding.cuts[f"{name}.{down}.weight"] = Cut(1, (own,))
    sharding.partial.append(f"{name}.{down}")


def _has_others(module: nn.Module, children: list[str], *, max_numel: int) -> bool:
    """True where a parameter beside those of `children` has over `max_numel` numbers: it may differ by feature."""
    return any(
        parameter.numel() > max_numel
        for name, parameter in module.named_parameters()
        if name.split(".")[0] not in children
    )


def _scaled(heads: slice, head_dim: int) -> slice:
    return slice(heads.start * head_dim, heads.stop * head_dim)


def _cut_rows(sharding: Sharding, name: str, projection: nn.Linear, *rows: slice) -> None:
    """Gives the rank these rows of a projection's weight and bias."""
    for kind, _ in projection.named_parameters():
        sharding.cuts[f"{name}.{kind}"] = Cut(0, rows)


def cut(model: nn.Module, sharding: Sharding) -> None:
    """Replaces the parameters of a whole model by the rank's part of them."""
    for name, part in sharding.cuts.items():
        whole = model.get_parameter(name).data
        # A copy: a view would keep the whole in memory.
        set_parameter(model, name, part.of(whole, whole.dim()).clone(memory_format=torch.contiguous_format))


def set_parameter(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Puts `tensor`, of any shape, in the place of a parameter or buffer."""
    module_name, _, kind = name.rpartition(".")
    module = model.get_submodule(module_name)
    if kind in module._parameters:
        module._parameters[kind] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[kind] = tensor


def connect(model: nn.Module, sharding: Sharding, all_reduce: AllReduce) -> None:
    """Makes the rank's part, whose weights it has, compute what the whole model computes."""

    def sum_over_ranks(module: nn.Module, arguments: Any, output: torch.Tensor) -> None:
        all_reduce.all_reduce(output)

    for name in sharding.partial:
        module = model.get_submodule(name)
        if sharding.shard.rank and isinstance(module.bias, torch.Tensor):
            module.bias.data.zero_()  # it counts once
        module.register_forward_hook(sum_over_ranks)
    for name in sharding.masked:
        attention: Any = model.get_submodule(name)
        attention.own_heads = sharding.heads  # see workers.attention.forward_pass.cached_attention
    for name in sharding.cuts:
        module_name, _, kind = name.rpartition(".")
        if kind == "weight":
            module = model.get_submodule(module_name)
            assert isinstance(module, nn.Linear), f"{module_name} is cut, and not linear"
            module.out_features, module.in_features = module.weight.shape
