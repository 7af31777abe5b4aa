"""What the drafter sees is the first tokens and the newest ones, and depends on the sequence alone, not on its history.

Shapes: V vocabulary.
"""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.all_caches import (
    STREAMING_LLM_CACHES,
    PoisonedDeviceTier,
    check_abort,
    check_history,
    check_reset,
)
from tests.support.tiny_models import random_model, random_prompt, tiny_config
from tiers.base import CacheShape
from tiers.streaming_llm_cache import StreamingLLMCache
from workers.models.causal_model import CausalModel
from workers.models.streaming_model import StreamingModel

REPEATABLE = settings(derandomize=True, deadline=None, max_examples=25)
EVERY_STREAMING_LLM_CACHE = pytest.mark.parametrize("case", STREAMING_LLM_CACHES, ids=lambda case: case.name)
TOLERANCE = 2e-4
SINKS, WINDOW, SLACK = 3, 16, 8
CAPACITY = SINKS + WINDOW + SLACK
CONFIG = tiny_config("llama", max_position_embeddings=CAPACITY)
TEXT = random_prompt(400)


@EVERY_STREAMING_LLM_CACHE
def test_shows_exactly_the_tokens_appended_and_not_rolled_back(case):
    check_history(case)


@EVERY_STREAMING_LLM_CACHE
def test_replay_after_reset_equals_a_new_cache(case):
    check_reset(case)


@EVERY_STREAMING_LLM_CACHE
def test_failed_pass_leaves_no_trace(case):
    check_abort(case)


def new_cache(sinks=SINKS, window=WINDOW, slack=SLACK) -> StreamingLLMCache:
    shape = CacheShape(
        num_layers=CONFIG.num_hidden_layers,
        num_kv_heads=CONFIG.num_key_value_heads,
        head_dim=CONFIG.head_dim,
        dtype=torch.float32,
    )
    return StreamingLLMCache(shape, sinks, window, slack, PoisonedDeviceTier())


@pytest.fixture(scope="module")
def models() -> tuple[CausalModel, torch.nn.Module]:
    """The same weights twice: under our attention, and under transformers' own."""
    # Each with a configuration of its own, for that is where transformers keeps the choice of attention.
    ours, theirs = (random_model(copy.deepcopy(CONFIG)) for _ in range(2))
    return CausalModel(ours, torch.device("cpu")), theirs


def visible(tokens: list[int], sinks=SINKS, window=WINDOW, slack=SLACK) -> list[int]:
    """The tokens that a sequence's drafter sees, by the definition: whole slacks fall out behind the sinks."""
    dropped = 0
    while len(tokens) - dropped > sinks + window + slack:
        dropped += slack
    return tokens[:sinks] + tokens[sinks + dropped :]


def wanted_logits(theirs, tokens: list[int], num_logits: int) -> torch.Tensor:
    """[num_logits, V], computed from scratch, positions counted from 0."""
    with torch.inference_mode():
        return theirs(input_ids=torch.tensor([visible(tokens)]), use_cache=False).logits[0, -num_logits:]


def assert_logits(got: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=TOLERANCE, atol=TOLERANCE)


STEPS = st.lists(
    st.tuples(st.sampled_from(["append", "append", "draft", "draft", "truncate", "prefill"]), st.integers(0, 10**6)),
    min_size=4,
    max_size=20,
)


def drive(model: StreamingModel, theirs, steps, num_prompt_tokens: int) -> None:
    """Any interleaving of reading and rolling back; the logits after each reading are checked."""
    tokens = TEXT[:num_prompt_tokens]
    model.prefill(tokens)
    for what, number in steps:
        if what == "truncate":
            del tokens[number % (len(tokens) + 1) :]
            model.truncate(len(tokens))
        elif what == "prefill":
            tokens = TEXT[number % 50 : number % 50 + number % 60]
            model.prefill(tokens)
        else:
            num_new = 1 if what == "draft" else 1 + number % 40
            new = [(number + 7 * at) % CONFIG.vocab_size for at in range(num_new)]
            tokens = tokens + new
            num_logits = min(num_new, 1 + number % 5, WINDOW)
            assert_logits(model.append(new, num_logits), wanted_logits(theirs, tokens, num_logits))
        assert model.length == len(tokens)


@REPEATABLE
@given(num_prompt_tokens=st.integers(0, 120), steps=STEPS)
def test_logits_depend_on_the_sequence_alone(models, num_prompt_tokens, steps):
    drive(StreamingModel(models[0], new_cache()), models[1], steps, num_prompt_tokens)


def test_works_far_past_the_drafters_own_positions(models):
    ours, theirs = models
    assert CONFIG.max_position_embeddings < 40
    model = StreamingModel(ours, new_cache())
    model.prefill(TEXT[:200])
    for end in range(200, 260):
        assert_logits(model.append(TEXT[end : end + 1], 1), wanted_logits(theirs, TEXT[: end + 1], 1))


def test_no_position_beyond_the_capacity_is_ever_asked_for(models, monkeypatch):
    ours, _ = models
    most, original = [], ours.hf_model.forward

    def forward(*args, position_ids, **kwargs):
        most.append(int(position_ids.max()))
        return original(*args, position_ids=position_ids, **kwargs)

    monkeypatch.setattr(ours.hf_model, "forward", forward)
    model = StreamingModel(ours, new_cache())
    model.prefill(TEXT[:100])
    for end in range(100, 150):
        model.append(TEXT[end : end + 1], 1)
    assert max(most) == CAPACITY - 1


def test_rereads_once_in_slack_tokens(models, monkeypatch):
    ours, _ = models
    model = StreamingModel(ours, new_cache())
    model.prefill(TEXT[:100])
    lengths, original = [], ours.hf_model.forward

    def forward(*args, input_ids, **kwargs):
        lengths.append(input_ids.shape[1])
        return original(*args, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(ours.hf_model, "forward", forward)
    for end in range(100, 100 + 4 * SLACK):
        model.append(TEXT[end : end + 1], 1)
    assert sum(length > 1 for length in lengths) == 4
    assert {length for length in lengths if length > 1} == {SINKS + WINDOW + 1}


@REPEATABLE
@given(sinks=st.integers(0, 6), window=st.integers(1, 40), slack=st.integers(1, 20), num_tokens=st.integers(0, 300))
def test_window_start_is_that_of_the_definition_and_leaves_at_least_the_window(sinks, window, slack, num_tokens):
    cache = new_cache(sinks, window, slack)
    tokens = list(range(num_tokens))
    start = cache.window_start_for(num_tokens)
    assert tokens[:sinks] + tokens[max(start, sinks) :] == visible(tokens, sinks, window, slack)
    num_seen = num_tokens - start
    assert num_seen <= window + slack
    assert num_seen > window or start == sinks
    cache.window_start = start
    assert [cache.slot(token) for token in visible(tokens, sinks, window, slack)] == list(
        range(len(visible(tokens, sinks, window, slack)))
    )


@pytest.mark.parametrize("sinks", [0, 1, 5])
def test_works_with_any_number_of_sinks(models, sinks):
    ours, theirs = models
    model = StreamingModel(ours, new_cache(sinks=sinks))
    for end in range(60):
        got = model.append(TEXT[end : end + 1], 1)
        seen = visible(TEXT[: end + 1], sinks=sinks)
        with torch.inference_mode():
            wanted = theirs(input_ids=torch.tensor([seen]), use_cache=False).logits[0, -1:]
        assert_logits(got, wanted)


def test_a_pass_that_fails_can_be_repeated(models, monkeypatch):
    ours, theirs = models
    model = StreamingModel(ours, new_cache())
    model.prefill(TEXT[:50])
    with monkeypatch.context() as patch:
        patch.setattr(ours.hf_model.lm_head, "forward", lambda *_: (_ for _ in ()).throw(MemoryError("no memory")))
        with pytest.raises(MemoryError):
            model.append(TEXT[50:53], 1)
    assert model.length == 50
    assert_logits(model.append(TEXT[50:53], 3), wanted_logits(theirs, TEXT[:53], 3))


def test_more_tokens_than_there_are_slots_are_refused():
    cache = new_cache()
    with pytest.raises(AssertionError, match=f"{CAPACITY + 1} of {CAPACITY} slots"):
        cache.begin(CAPACITY + 1)
    with pytest.raises(AssertionError, match="truncate to 1 of 0 slots"):
        cache.truncate(1)
