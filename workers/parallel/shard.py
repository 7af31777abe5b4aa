"""Which attention heads a rank of a tensor-parallel model has. Numbers alone: loads without torch.

A kv head and the query heads that share it (its group) are never parted where there are enough kv heads, so no key and
no value is held twice. With 3 kv heads on 2 ranks one rank has 2 of them. Where ranks outnumber kv heads, ranks share
a kv head and part its query heads.
"""

from __future__ import annotations

from dataclasses import dataclass

from conf.schema import ConfigError


@dataclass(frozen=True, slots=True)
class Shard:
    """One of the `size` parts of a model."""

    rank: int
    size: int


WHOLE = Shard(0, 1)


@dataclass(frozen=True, slots=True)
class Heads:
    """A rank's own heads, as ranges of the model's."""

    query: slice
    kv: slice

    @property
    def num_kv(self) -> int:
        """Number of kv heads."""
        count: int = self.kv.stop - self.kv.start
        return count


def own_range(count: int, shard: Shard) -> slice:
    """The rank's range of `count` things, cut into consecutive parts as even as can be, the first ones larger."""
    each, more = divmod(count, shard.size)
    start = shard.rank * each + min(shard.rank, more)
    return slice(start, start + each + (shard.rank < more))


def own_heads(num_query_heads: int, num_kv_heads: int, shard: Shard) -> Heads:
    """The heads of one rank of a model with so many; the shard's size must be one of `legal_sizes`."""
    group = num_query_heads // num_kv_heads
    if shard.size <= num_kv_heads:
        kv = own_range(num_kv_heads, shard)
        return Heads(slice(kv.start * group, kv.stop * group), kv)
    ranks_per_head = shard.size // num_kv_heads
    head, place = divmod(shard.rank, ranks_per_head)
    part = own_range(group, Shard(place, ranks_per_head))
    return Heads(slice(head * group + part.start, head * group + part.stop), slice(head, head + 1))


def legal_sizes(num_query_heads: int, num_kv_heads: int) -> list[int]:
    """Numbers of ranks with which each gets a query head, and as many ranks share each kv head."""
    most_per_head = num_query_heads // num_kv_heads
    shared = [num_kv_heads * ranks for ranks in range(2, most_per_head + 1)]
    return [*range(1, num_kv_heads + 1), *shared]


def check_size(model: str, num_query_heads: int, num_kv_heads: int, size: int) -> None:
    """Raises ConfigError where `model` cannot be parted among `size` ranks."""
    legal = legal_sizes(num_query_heads, num_kv_heads)
    if size not in legal:
        raise ConfigError(
            f"the number of verifier ranks is {size}; it must be one of {', '.join(map(str, legal))} for {model}, "
            f"which has {num_kv_heads} kv heads of {num_query_heads // num_kv_heads} query heads each"
        )
