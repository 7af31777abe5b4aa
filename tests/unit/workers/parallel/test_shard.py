"""Head arithmetic: every query head is computed once, with the kv head of its group."""

from __future__ import annotations

import pytest

from conf.schema import ConfigError
from workers.parallel.shard import Shard, check_size, legal_sizes, own_heads, own_range

SHAPES = [(4, 4), (8, 2), (6, 3), (4, 1), (6, 2), (64, 8), (40, 40), (28, 4), (14, 2)]
"""Query heads and kv heads."""


def indices(part: slice) -> range:
    return range(part.start, part.stop)


@pytest.mark.parametrize("count", [1, 2, 7, 48, 11008])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_ranges_are_consecutive_and_even(count, size):
    parts = [own_range(count, Shard(rank, size)) for rank in range(size)]
    assert [index for part in parts for index in indices(part)] == list(range(count))
    lengths = [len(indices(part)) for part in parts]
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(("num_query", "num_kv"), SHAPES)
def test_every_query_head_is_on_one_rank_with_its_kv_head(num_query, num_kv):
    group = num_query // num_kv
    for size in legal_sizes(num_query, num_kv):
        all_heads = [own_heads(num_query, num_kv, Shard(rank, size)) for rank in range(size)]
        assert [head for heads in all_heads for head in indices(heads.query)] == list(range(num_query))
        for heads in all_heads:
            assert heads.num_kv == len(indices(heads.kv)) > 0
            assert {head // group for head in indices(heads.query)} == set(indices(heads.kv))
            # Our attention function gives each kv head as many query heads.
            assert len(indices(heads.query)) % heads.num_kv == 0


@pytest.mark.parametrize(("num_query", "num_kv"), SHAPES)
def test_kv_heads_are_held_once_where_there_are_enough(num_query, num_kv):
    for size in range(1, num_kv + 1):
        parts = [own_heads(num_query, num_kv, Shard(rank, size)).kv for rank in range(size)]
        assert [head for part in parts for head in indices(part)] == list(range(num_kv))


def test_three_kv_heads_on_two_ranks():
    first, second = (own_heads(6, 3, Shard(rank, 2)) for rank in range(2))
    assert (first.kv, first.query) == (slice(0, 2), slice(0, 4))
    assert (second.kv, second.query) == (slice(2, 3), slice(4, 6))


def test_two_kv_heads_of_three_query_heads_on_four_ranks():
    heads = [own_heads(6, 2, Shard(rank, 4)) for rank in range(4)]
    assert [part.kv.start for part in heads] == [0, 0, 1, 1]
    assert [indices(part.query) for part in heads] == [range(0, 2), range(2, 3), range(3, 5), range(5, 6)]


@pytest.mark.parametrize(
    ("num_query", "num_kv", "sizes"),
    [(4, 4, [1, 2, 3, 4]), (8, 2, [1, 2, 4, 6, 8]), (4, 1, [1, 2, 3, 4]), (6, 3, [1, 2, 3, 6])],
)
def test_legal_sizes(num_query, num_kv, sizes):
    assert legal_sizes(num_query, num_kv) == sizes


@pytest.mark.parametrize("size", [0, -1, 3, 5, 16])
def test_another_size_is_refused_with_the_legal_ones(size):
    with pytest.raises(ConfigError) as refused:
        check_size("model.target=some/model", 8, 2, size)
    message = str(refused.value)
    assert message.startswith(f"the number of verifier ranks is {size}; it must be one of 1, 2, 4, 6, 8 for ")
    assert "model.target=some/model" in message and "2 kv heads of 4 query heads" in message
