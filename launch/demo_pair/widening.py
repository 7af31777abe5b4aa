"""A Llama checkpoint in the shape of a larger one, computing the same function: the algebra of widened checkpoints.

The wide model's first channels, heads and layers are the small model's; whatever else it has adds exact zeros:

    channels    hidden states are zero beyond the small model's d of D: nothing writes there
    RMSNorm     the mean square over D channels is d/D of that over d: weights times sqrt(d/D), eps times d/D
    heads       o_proj has zeros for the new ones; query heads keep the kv head of their group
    MLP         down_proj has zeros for what the new rows of gate_proj and up_proj give
    layers      the new ones write zeros: o_proj and down_proj are zero, what is left is the identity

RoPE's frequencies depend on the head dimension, so that one stays: Llama-68M's 12 heads x 64 become 6 x 128, with
matrices and cache of the same size. What the new heads and rows compute before the zeros is free: zeros, or noise, so
that weights, keys and values are no easier to compute with than real ones.

More vocabulary needs rows of the head whose logits never win, though there is no bias. A channel that holds a constant
in every token's hidden state gives one: its square joins the mean of squares, where it is another eps, and eps is made
smaller by as much. The head's new rows read nothing but this channel, and are so negative that their probability is 0.

Equal up to rounding: sums with zeros may be taken in another order, and weights of norms are rounded, in 16 bits, where
sqrt(d/D) is no power of two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from conf.model_shapes import ModelShape
from conf.schema import ConfigError, require

LOWEST_LOGIT = -(2.0**30)
"""A padded token's logit, divided by the root mean square of the last hidden state."""
NOISE_STD = 0.02
NOISE_VALUES = 1 << 22


@dataclass(frozen=True, slots=True)
class PlacedWeight:
    """A piece of the small model's weights [r, c], and the row and column of the wide weight that it begins at."""

    row: int
    column: int
    small: torch.Tensor


def check_widening(small: ModelShape, wide: ModelShape) -> None:
    """Raises ConfigError where the one does not fit into the other."""
    for key in ("num_layers", "hidden_size", "intermediate_size", "num_kv_heads", "vocab_size"):
        least = getattr(small, key)
        require(getattr(wide, key) >= least, key, getattr(wide, key), f"at least the {least} of the source")
    rule = f"{small.head_dim}, as in the source: RoPE's frequencies depend on it"
    require(wide.head_dim == small.head_dim, "head_dim", wide.head_dim, rule)
    divides = wide.num_heads % wide.num_kv_heads == 0
    require(divides, "num_heads", wide.num_heads, f"a multiple of num_kv_heads={wide.num_kv_heads}")
    divides = wide.hidden_size % wide.num_heads == 0
    require(divides, "num_heads", wide.num_heads, f"a divisor of hidden_size={wide.hidden_size}, as transformers asks")
    small_group, group = small.num_heads // small.num_kv_heads, wide.num_heads // wide.num_kv_heads
    rule = f"at least {small_group * wide.num_kv_heads}: the source has {small_group} query heads for a kv head"
    require(group >= small_group, "num_heads", wide.num_heads, rule)
    legal = small.ties_embeddings or not wide.ties_embeddings
    require(legal, "ties_embeddings", wide.ties_embeddings, "false: the source has a head of its own")
    if wide.vocab_size > small.vocab_size:
        room = wide.hidden_size > small.hidden_size and not wide.ties_embeddings
        if not room:
            raise ConfigError(
                f"vocab_size is {wide.vocab_size}; it must be the source's {small.vocab_size} unless hidden_size grows "
                "and ties_embeddings is false: padded tokens need a channel and a head of their own"
            )


class Widening:
    """The wide model's weights by name, in `dtype`; `weights` are the small model's, `eps` is that of its norms."""

    def __init__(
        self, small: ModelShape, wide: ModelShape, weights: dict[str, torch.Tensor], eps: float, dtype: torch.dtype
    ):
        check_widening(small, wide)
        self._small, self._wide, self._weights, self.dtype = small, wide, weights, dtype
        self._share = small.hidden_size / wide.hidden_size
        self._pads_vocabulary = wide.vocab_size > small.vocab_size
        self.eps = eps * self._share
        if self._pads_vocabulary:
            # Half of eps, as it is rounded: what is left for eps itself stays above zero.
            self._constant = torch.tensor((eps * small.hidden_size / 2) ** 0.5).to(dtype).item()
            self.eps -= self._constant**2 / wide.hidden_size

    def sizes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every weight, in the order of the model."""
        wide = self._wide
        hidden, mlp, dim = wide.hidden_size, wide.intermediate_size, wide.head_dim
        q, kv = wide.num_heads * dim, wide.num_kv_heads * dim
        sizes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (wide.vocab_size, hidden)}
        for layer in range(wide.num_layers):
            prefix = f"model.layers.{layer}"
            sizes |= {
                f"{prefix}.input_layernorm.weight": (hidden,),
                f"{prefix}.self_attn.q_proj.weight": (q, hidden),
                f"{prefix}.self_attn.k_proj.weight": (kv, hidden),
                f"{prefix}.self_attn.v_proj.weight": (kv, hidden),
                f"{prefix}.self_attn.o_proj.weight": (hidden, q),
                f"{prefix}.post_attention_layernorm.weight": (hidden,),
                f"{prefix}.mlp.gate_proj.weight": (mlp, hidden),
                f"{prefix}.mlp.up_proj.weight": (mlp, hidden),
                f"{prefix}.mlp.down_proj.weight": (hidden, mlp),
            }
        sizes["model.norm.weight"] = (hidden,)
        if not wide.ties_embeddings:
            sizes["lm_head.weight"] = (wide.vocab_size, hidden)
        return sizes

    @staticmethod
    def is_free(name: str) -> bool:
        """Whether it does not matter what this weight has beyond the small model's: zeros follow."""
        return name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight"))

    def fill(self, name: str, out: torch.Tensor, noise: torch.Tensor | None) -> None:
        """Writes this weight to `out`, which is zero; with `noise`, a vector, where it is free.

        Pages of `out` that stay zero are not touched.
        """
        if noise is not None and self.is_free(name):
            flat = out.view(-1)
            for start in range(0, flat.numel(), noise.numel()):
                piece = flat[start : start + noise.numel()]
                piece.copy_(noise[: piece.numel()])
        if out.dim() == 1:
            self._fill_norm(name, out)
            return
        for part in self._parts(name):
            rows, columns = part.small.shape
            out[part.row : part.row + rows, part.column : part.column + columns] = part.small
        if self._pads_vocabulary and name == "model.embed_tokens.weight":
            out[:, self._small.hidden_size] = self._constant
        if self._pads_vocabulary and name == "lm_head.weight":
            # The last norm divides the constant by the root mean square over the wide channels, sqrt(d/D) of that over
            # the small ones; its weight there is 1.
            out[self._small.vocab_size :, self._small.hidden_size] = LOWEST_LOGIT * self._share**0.5 / self._constant

    @torch.no_grad()
    def fill_with_noise(self, model: torch.nn.Module) -> None:
        """Fills the weights that are free, of a wide model that was loaded with zeros, on any device."""
        noise = None
        for name, parameter in model.named_parameters():
            if self.is_free(name):
                noise = make_noise(self.dtype).to(parameter.device) if noise is None else noise
                self.fill(name, parameter, noise)

    def _fill_norm(self, name: str, out: torch.Tensor) -> None:
        channels = self._small.hidden_size
        weight = self._weights.get(name, torch.ones(channels))  # of a new layer: what it reads does not matter
        out[:channels] = weight.double() * self._share**0.5
        if self._pads_vocabulary and name == "model.norm.weight":
            out[channels] = 1.0

    def _parts(self, name: str) -> list[PlacedWeight]:
        """The small model's weights that go into this weight, and where."""
        weight = self._weights.get(name)
        if name == "lm_head.weight" and weight is None:
            weight = self._weights["model.embed_tokens.weight"]
        if weight is None:
            return []
        if "q_proj" in name or "o_proj" in name:
            heads = torch.split(weight, self._wide.head_dim, dim=int("o_proj" in name))
            starts = [self._query_head(head) * self._wide.head_dim for head in range(len(heads))]
            places = [(0, start) if "o_proj" in name else (start, 0) for start in starts]
            return [PlacedWeight(*place, head) for place, head in zip(places, heads, strict=True)]
        return [PlacedWeight(0, 0, weight)]

    def _query_head(self, head: int) -> int:
        """Index in the wide model of a query head of the small one: it is in the group of the same kv head."""
        small_group = self._small.num_heads // self._small.num_kv_heads
        group = self._wide.num_heads // self._wide.num_kv_heads
        return head // small_group * group + head % small_group


def make_noise(dtype: torch.dtype) -> torch.Tensor:
    """A vector of values as large as weights usually are; the same at every call."""
    generator = torch.Generator().manual_seed(0)
    return (NOISE_STD * torch.randn(NOISE_VALUES, generator=generator)).to(dtype)
