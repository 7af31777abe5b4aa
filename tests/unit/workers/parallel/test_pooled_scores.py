"""workers.parallel.tensor_parallel.pooled_scores: ranks that share a kv head choose by all of its query heads."""

from __future__ import annotations

import pytest
import torch

from workers.parallel.shard import Shard, own_heads
from workers.parallel.tensor_parallel import pooled_scores


class Gathering:
    """First it gathers every rank's part, then it hands out the sum."""

    def __init__(self):
        self.parts, self.is_complete = [], False

    def all_reduce(self, tensor: torch.Tensor) -> None:
        if self.is_complete:
            tensor.copy_(sum(self.parts))
        else:
            self.parts.append(tensor.clone())


@pytest.mark.parametrize(("num_query_heads", "num_kv_heads", "num_ranks"), [(4, 2, 4), (6, 2, 4), (3, 1, 2), (8, 1, 8)])
def test_scores_are_the_mean_over_all_query_heads(num_query_heads, num_kv_heads, num_ranks):
    of_queries = torch.rand(num_query_heads, 10)
    wanted = of_queries.view(num_kv_heads, -1, 10).mean(1)
    heads = [own_heads(num_query_heads, num_kv_heads, Shard(rank, num_ranks)) for rank in range(num_ranks)]
    gathering, pooled = Gathering(), []
    for gathering.is_complete in (False, True):
        pooled = [
            pooled_scores(gathering, own, num_kv_heads, of_queries[own.query].mean(0, keepdim=True)) for own in heads
        ]
    for own, scores in zip(heads, pooled, strict=True):
        torch.testing.assert_close(scores, wanted[own.kv])
        assert all(torch.equal(scores, other) for at, other in zip(heads, pooled, strict=True) if at.kv == own.kv)
