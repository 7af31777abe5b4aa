"""A drafter with a few other words in its tokenizer: the output is the target's all the same, in law and by token."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from safetensors.torch import load_file, save_file

from conf.schema import Coupling, Mode, Overlap, SamplingConfig
from tests.lossless.wrong_rules import making
from tests.support.enumeration import joint_law
from tests.support.tiny_models import greedy_tokens, random_prompt, save_checkpoint, tiny_config, tiny_tokenizer
from tests.support.tiny_runs import DEVICE, GREEDY, HOST, engine_for, generate, run_to_end, tiny_run
from tests.support.toy_models import (
    DRAFTER_LEVEL,
    EXACT,
    MarkovModel,
    make_setup,
    random_table,
    target_law,
    total_variation,
)
from workers.acceptance import CHOOSE, MaximalCoupling, distribution
from workers.checkpoint.shared_vocabulary import SharedVocabulary
from workers.models.shared_ids_model import SharedIdsModel

EXACTLY, CLEARLY = 1e-12, 1e-3
TOP_P = SamplingConfig(temperature=0.6, top_p=0.8)
TOP_K = SamplingConfig(temperature=1.0, top_p=1.0, top_k=2)
BLOCK = SamplingConfig(temperature=1.0, top_p=1.0, block_verification=True)
SAMPLINGS = {"T1": EXACT, "top_p": TOP_P, "top_k": TOP_K, "block": BLOCK, "greedy": SamplingConfig(temperature=0.0)}

# ---- The law, over a target of three symbols. ----


def shares(not_drafted: list[int], stand_ins: dict[int, int]) -> SharedVocabulary:
    return SharedVocabulary(num_shared=2, num_target_ids=3, agreement=1, not_drafted=not_drafted, stand_ins=stand_ins)


DRAFTERS = {
    "two more": (5, shares([3, 4], {})),
    "one fewer": (2, shares([], {2: 0})),
    "another in the middle": (3, shares([1], {1: 2})),
    "another first and two more": (5, shares([0, 3, 4], {0: 4})),
    "one is left": (3, shares([0, 1], {0: 2, 1: 2})),
}
"""Number of its symbols, and what it shares; it raises where it is to read a symbol that it has not."""


def with_drafter(name: str, table: torch.Tensor | None = None, *, sees_all: bool = False, **changes):
    """A session whose drafter has other words; with `sees_all` nothing is left out of its logits."""
    num_symbols, vocabulary = DRAFTERS[name]
    if sees_all:
        vocabulary = replace(vocabulary, not_drafted=[])
    table = random_table(num_symbols, num_symbols, 8) if table is None else table
    return make_setup(3, order=1, **changes).but(wrap_drafter=lambda _: SharedIdsModel(MarkovModel(table), vocabulary))


def error(setup, num_tokens: int = 3) -> float:
    law = joint_law(setup, num_tokens)
    return max(total_variation(law, target_law(setup, num_tokens)), abs(sum(law.values()) - 1))


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("name", DRAFTERS)
def test_the_law_is_the_targets_whatever_words_the_drafter_has(name, sampling):
    """Three tokens where the drafter drafts for the target, two where it does for the retrieval draft."""
    setup = with_drafter(name, sampling=SAMPLINGS[sampling])
    assert error(setup.but(mode=Mode.streaming)) < EXACTLY
    assert error(setup.but(mode=Mode.triforce), 2) < EXACTLY


@pytest.mark.parametrize("name", DRAFTERS)
def test_the_law_is_the_targets_with_longer_blocks(name):
    assert error(with_drafter(name, mode=Mode.streaming, gamma2=2, sampling=TOP_P), 4) < EXACTLY


class LeftOutAfterwards(MaximalCoupling):
    """Draws a shared id, and hands up the distribution that the others had a part in."""

    def draw(self, logits: torch.Tensor, position: int):
        probs = distribution(logits[None], self._sampling)[0]
        shared = probs.index_fill(-1, torch.tensor([1]), 0)
        return self._random.choose(shared / shared.sum(), position, self._offset + CHOOSE), probs


class Clipped(MaximalCoupling):
    """Draws any id, and takes its neighbour for one that is not shared."""

    def draw(self, logits: torch.Tensor, position: int):
        token, probs = super().draw(logits, position)
        return (2 if token == 1 else token), probs


class LeftOutAfterTopP(MaximalCoupling):
    """Draws a shared id of those that top-p left, and hands up what top-p leaves of the shared ones."""

    def draw(self, logits: torch.Tensor, position: int):
        probs = distribution(logits[None], self._sampling)[0].index_fill(-1, torch.tensor([1]), 0)
        drawn = self._random.choose(probs / probs.sum(), position, self._offset + CHOOSE)
        return drawn, distribution(logits[None].index_fill(-1, torch.tensor([1]), -torch.inf), self._sampling)[0]


AFTER_TOP_P = (LeftOutAfterTopP, replace(EXACT, top_p=0.8))


@pytest.mark.parametrize(("wrong", "sampling"), [(LeftOutAfterwards, EXACT), (Clipped, EXACT), AFTER_TOP_P])
def test_control_ids_that_are_left_out_in_another_place_are_seen(wrong, sampling):
    """Of its probabilities top-p leaves the first two, or the first and the last where the second is left out."""
    table = torch.tensor([[0.45, 0.4, 0.15]], dtype=torch.float64).log().expand(3, 3)
    setup = with_drafter("another in the middle", table, sees_all=True, sampling=sampling, mode=Mode.streaming)
    setup = setup.but(target=random_table(3, 3, 1, spread=0.3))
    assert error(setup) < EXACTLY, "drafting them is lossless, too, as long as draft and distribution agree"
    assert error(setup.but(make=making(wrong, DRAFTER_LEVEL))) > CLEARLY


# ---- Tokens of tiny models. ----

NUM_TOKENS = 24
PROMPT = random_prompt(90, seed=5)
GUMBEL = SamplingConfig(temperature=0.8, top_p=0.9, coupling=Coupling.gumbel)


@pytest.fixture(scope="module")
def target(checkpoints):
    return checkpoints("llama")


def swapped_tokenizer():
    """Ids 40 and 41 have each other's words."""
    tokenizer = tiny_tokenizer()
    vocab = {f"t{word}": token for token, word in enumerate([*range(40), 41, 40, *range(42, 96)])}
    tokenizer.backend_tokenizer.model = type(tokenizer.backend_tokenizer.model)(vocab=vocab, unk_token="t0")
    return tokenizer


@pytest.fixture(scope="module")
def drafters(tmp_path_factory):
    """Checkpoints by what is different about them, each with weights of its own."""
    root = tmp_path_factory.mktemp("drafters")
    kinds = {
        "two more": (98, tiny_tokenizer(98)),
        "three fewer": (93, tiny_tokenizer(93)),
        "two swapped": (96, swapped_tokenizer()),
        "two more and padding": (128, tiny_tokenizer(98)),
    }
    return {
        name: save_checkpoint(root / name, tiny_config("llama", vocab_size=rows), 3, tokenizer=tokenizer)
        for name, (rows, tokenizer) in kinds.items()
    }


KINDS = ["two more", "three fewer", "two swapped", "two more and padding"]


@pytest.mark.parametrize(("kind", "mode"), list(product(KINDS, [Mode.triforce, Mode.streaming])))
def test_greedy_tokens_are_those_of_transformers(target, drafters, kind, mode):
    wanted = greedy_tokens(target, PROMPT, NUM_TOKENS)
    assert generate(tiny_run(target, drafters[kind], mode, HOST), PROMPT, NUM_TOKENS).tokens == wanted


@pytest.mark.parametrize(("kind", "mode"), list(zip(KINDS, [Mode.triforce, Mode.streaming] * 2, strict=True)))
def test_tokens_of_the_race_are_those_of_autoregressive_decoding(target, drafters, kind, mode):
    wanted = generate(tiny_run(target, mode=Mode.autoregressive, sampling=GUMBEL), PROMPT, NUM_TOKENS).tokens
    config = tiny_run(target, drafters[kind], mode, DEVICE, sampling=GUMBEL)
    assert generate(config, PROMPT, NUM_TOKENS).tokens == wanted


HOT = SamplingConfig(temperature=1.5, top_p=1.0)


@pytest.mark.parametrize(("kind", "sampling"), list(zip(KINDS, [GREEDY, GUMBEL, HOT, HOT], strict=True)))
def test_what_is_not_shared_is_never_drafted_nor_named_a_runner_up(target, drafters, kind, sampling):
    config = tiny_run(target, drafters[kind], Mode.streaming, sampling=sampling, gamma2=12)
    config.decoding.overlap = Overlap.outcomes
    not_shared = {*range(93, 128)} if kind == "three fewer" else {40, 41} if "swapped" in kind else {*range(96, 128)}
    with engine_for(config, PROMPT, 24) as engine:
        drafter, drafted = engine.hierarchy.drafter, []
        propose = drafter.propose

        def record(*args, **kwargs):
            draft = propose(*args, **kwargs)
            drafted.extend([*draft.tokens, *draft.runners_up])
            assert all(not float(row[token]) for row in draft.probs or () for token in not_shared if token < len(row))
            return draft

        drafter.propose = record
        run_to_end(engine.hierarchy)
    assert len(drafted) > 200 and not not_shared & set(drafted)


def test_a_drafter_that_is_the_target_but_for_the_order_of_two_words_is_wrong_at_these_alone(target, tmp_path):
    """It reads each of them as itself: its rows are swapped as its words are."""
    twin = save_checkpoint(tmp_path / "twin", tiny_config("llama"), tokenizer=swapped_tokenizer())
    weights = load_file(twin / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name][[40, 41]] = weights[name][[41, 40]]
    save_file(weights, twin / "model.safetensors", {"format": "pt"})
    prompt = [*random_prompt(60), 40, 41, 40]
    result = generate(tiny_run(target, twin, Mode.streaming, window=300), prompt, 64)
    assert result.tokens == greedy_tokens(target, prompt, 64) and {40, 41} & set(result.tokens)
    for record in result.rounds:
        assert record.num_accepted == len(record.proposed) or record.tokens[-1] in (40, 41)
