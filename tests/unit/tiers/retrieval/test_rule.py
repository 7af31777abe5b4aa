"""Every rule obeys one contract, and a new one is a file and a member of the enum."""

from __future__ import annotations

import sys
from contextlib import closing
from enum import StrEnum
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.schema import RetrievalRuleName
from tests.support.all_caches import SHAPE, PoisonedDeviceTier, Reference, full_cache, random_kv, read_prompt
from tiers.base import CacheShape
from tiers.retrieval.rule import RetrievalRule, best_chunks, rule_class
from tiers.retrieval.selection import RetrievalSelection

EVERY_RULE = pytest.mark.parametrize("name", list(RetrievalRuleName))
REPEATABLE = settings(derandomize=True, deadline=None, max_examples=40)
HEADS, DIM = SHAPE.num_kv_heads, SHAPE.head_dim
CHUNK = 4


class Sequence:
    """A prompt in a full cache, one layer on the device and one on the host, which a rule has read; a verification."""

    def __init__(self, rule: type[RetrievalRule], num_tokens: int, seed: int = 1, **how):
        shape = CacheShape(num_layers=2, num_kv_heads=HEADS, head_dim=DIM, dtype=torch.float32)
        self.tier, self.shape, self.num_tokens = PoisonedDeviceTier(), shape, num_tokens
        self.rule = rule(shape, 200, CHUNK, self.tier, **how)
        self.cache = full_cache("dh", capacity=200)
        self.generator = torch.Generator().manual_seed(seed)
        self.q = torch.randn(HEADS, 2, 3, DIM, generator=self.generator)
        self.read(seed)

    def read(self, seed: int) -> None:
        """A new sequence."""
        new = Reference(2).append(self.num_tokens, seed)
        self.rule.reset()
        self.rule.begin_reading()
        for layer, (k, _) in enumerate(new):
            self.rule.observe(layer, 0, k)
        read_prompt(self.cache, new, 50)
        if (observe := self.rule.mass_observer) is not None:
            for layer in range(2):
                observe(layer, torch.rand(HEADS, -(-self.num_tokens // CHUNK), generator=self.generator).softmax(1))
        self.rule.catch_up(self.cache)

    def close(self) -> None:
        self.cache.close()


@EVERY_RULE
@REPEATABLE
@given(
    num_chunks=st.integers(1, 30),
    num_rest=st.integers(0, CHUNK - 1),
    shares=st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)),
)
def test_first_and_newest_chunks_are_always_in_and_old_ones_come_last(name, num_chunks, num_rest, shares):
    num_wanted = 1 + round(shares[0] * (num_chunks - 1))
    num_newest = 1 + round(shares[1] * (num_wanted - 1))
    num_old = round(shares[2] * num_chunks)
    with closing(Sequence(rule_class(name), num_chunks * CHUNK + num_rest)) as sequence:
        ids = sequence.rule.select(1, sequence.q, num_chunks, num_wanted, num_newest, num_old * CHUNK + CHUNK - 1)
    assert ids.shape == (HEADS, num_wanted)
    for chosen in ids.tolist():
        assert chosen == sorted(set(chosen))
        assert set(range(num_chunks - num_newest, num_chunks)) <= set(chosen)
        assert 0 in chosen or num_wanted == num_newest
        is_old = [1 <= chunk < min(num_old, num_chunks - num_newest) for chunk in range(num_chunks)]
        if any(is_old[chunk] for chunk in chosen):
            assert all(is_old[chunk] or chunk in chosen for chunk in range(num_chunks))


@EVERY_RULE
def test_choosing_leaves_what_is_known_as_it_was(name):
    with closing(Sequence(rule_class(name), 83)) as sequence:
        first = sequence.rule.select(0, sequence.q, 20, 6, 2)
        assert sequence.rule.select(0, sequence.q, 20, 6, 2, 40).tolist() != first.tolist()
        assert sequence.rule.select(0, sequence.q, 20, 6, 2).tolist() == first.tolist()


@EVERY_RULE
def test_the_choice_is_made_of_pooled_scores(name):
    """Ranks of a verifier choose alike: what the pool makes of their scores decides, whatever they were."""
    wanted = torch.arange(20.0).flip(0).repeat(HEADS, 1)
    with closing(Sequence(rule_class(name), 83, pool=lambda scores: wanted[:, : scores.shape[1]].clone())) as sequence:
        assert sequence.rule.select(0, sequence.q, 20, 5, 2).tolist() == [[0, 1, 2, 18, 19]] * HEADS


@EVERY_RULE
def test_a_reset_rule_equals_a_new_one(name):
    with (
        closing(Sequence(rule_class(name), 83, seed=1)) as used,
        closing(Sequence(rule_class(name), 83, seed=2)) as new,
    ):
        used.generator.manual_seed(2)
        torch.randn(HEADS, 2, 3, DIM, generator=used.generator)
        used.read(2)
        for layer in range(2):
            assert torch.equal(used.rule.scores(layer, new.q, 20), new.rule.scores(layer, new.q, 20))


@EVERY_RULE
def test_planned_bytes_cover_what_is_allocated(name):
    """Within the one chunk that is not complete."""
    with closing(Sequence(rule_class(name), 83)) as sequence:
        rule, shape, used_bytes = sequence.rule, sequence.shape, sequence.tier.used_bytes
        assert rule.planned_bytes(shape, 49) <= used_bytes <= rule.planned_bytes(shape, 50), "200 tokens"


class LongestKeyRule(RetrievalRule):
    """A rule made up: chunks with the longest keys, which are counted as they are read."""

    def __init__(self, shape, capacity, *args, **how):
        super().__init__(shape, capacity, *args, **how)
        self._lengths = torch.zeros(shape.num_layers, shape.num_kv_heads, capacity)

    def observe(self, layer, start, k):
        self._lengths[layer, :, start : start + k.shape[1]] = k.norm(dim=2)

    def scores(self, layer, q, num_chunks):
        return self._lengths[layer, :, : num_chunks * self.chunk_size].unflatten(1, (-1, self.chunk_size)).amax(2)


def test_a_new_rule_is_one_file_and_one_name(monkeypatch):
    """What the selection needs of a rule is in its class; a file beside the others is found by the name in the enum."""
    module = ModuleType("tiers.retrieval.longest_key_rule")
    module.LongestKeyRule = LongestKeyRule
    monkeypatch.setitem(sys.modules, module.__name__, module)
    names = StrEnum("RetrievalRuleName", [*RetrievalRuleName.__members__, "longest_key"])
    rule = rule_class(names.longest_key)(SHAPE, 96, CHUNK, PoisonedDeviceTier())
    kv = [random_kv(48, layer) for layer in range(2)]
    kv[1][0][:, 21] *= 100
    with closing(full_cache("dh")) as cache:
        selection = RetrievalSelection(cache, rule, [None, None], 3 * CHUNK, 0.34)
        selection.reset()
        for layer, (k, v) in enumerate(kv):
            selection.observe(layer, 0, k, v)
        read_prompt(cache, kv, 50)
        update = selection.rebuild({layer: torch.zeros(HEADS, 1, 1, DIM) for layer in range(2)})
        positions = [layer.positions.tolist() for layer in update.layers]
    assert positions[1] == [[0, 1, 2, 3, 20, 21, 22, 23, 44, 45, 46, 47]] * HEADS
    assert rule.mass_observer is None and rule.planned_bytes(SHAPE, 24) == 0


def test_scores_of_any_size_are_below_what_is_always_chosen():
    assert best_chunks(torch.tensor([[-5.0, -9.0, 1e30, -1e30]]), 3, 1, num_old=1).tolist() == [[0, 2, 3]]
