"""Which ids a drafter with other words in its tokenizer may draft, what it reads for the others, and who is refused."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from conf.schema import ConfigError
from tests.support.tiny_models import VOCAB_SIZE, save_checkpoint, tiny_config, tiny_tokenizer
from workers.checkpoint.facts import ModelFacts, describe
from workers.checkpoint.shared_vocabulary import SAMPLE, SharedVocabulary, shared_vocabulary
from workers.models.shared_ids_model import SharedIdsModel, on_shared_ids

TEXT = [SAMPLE, "lower words and Upper Words, 12 345 times; a keeper, the sea, letters between the years"] * 3
SPECIAL = ["<|begin|>", "<|end|>"]


def byte_level(vocab_size: int = 400, *, special: list[str] = SPECIAL, lowers: bool = False) -> Tokenizer:
    """A byte-level BPE tokenizer trained on TEXT; with `lowers` it reads capitals as small letters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXT, trainer)
    if lowers:
        tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def with_words(tokenizer: Tokenizer, *words: str) -> Tokenizer:
    tokenizer.add_tokens(list(words))
    return tokenizer


def with_special(tokenizer: Tokenizer, *words: str) -> Tokenizer:
    tokenizer.add_special_tokens(list(words))
    return tokenizer


def with_swapped(first: int, second: int) -> Tokenizer:
    """The tokenizer of tiny_models with two words in each other's places."""
    ids = list(range(VOCAB_SIZE))
    ids[first], ids[second] = second, first
    tokenizer = Tokenizer(models.WordLevel(vocab={f"t{word}": token for token, word in enumerate(ids)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


WORDS = tiny_tokenizer().backend_tokenizer


@pytest.fixture
def facts_of(checkpoints):
    """Facts of a model, given its rows and its tokenizer."""

    def make(tokenizer: Tokenizer, num_rows: int = 512, key: str = "model.target") -> ModelFacts:
        facts = describe(key, str(checkpoints("llama", vocab_size=num_rows)), torch.float32)
        facts.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
        return facts

    return make


@pytest.fixture
def compare(facts_of):
    def comparison(ours: Tokenizer, theirs: Tokenizer, our_rows: int = 512, their_rows: int = 512) -> SharedVocabulary:
        return shared_vocabulary(facts_of(ours, our_rows), facts_of(theirs, their_rows, "model.drafter"))

    return comparison


@pytest.mark.parametrize(("our_rows", "their_rows"), [(96, 96), (112, 96), (96, 112)])
def test_the_same_tokenizer_is_shared_as_a_whole_whatever_the_padding(compare, our_rows, their_rows):
    vocabulary = compare(WORDS, WORDS, our_rows, their_rows)
    assert vocabulary.is_whole and vocabulary.notes() == []
    assert (vocabulary.num_shared, vocabulary.num_target_ids, vocabulary.agreement) == (96, 96, 1.0)


@pytest.mark.parametrize("add", [with_words, with_special])
def test_two_more_words_of_the_drafter_are_never_drafted(compare, add):
    vocabulary = compare(byte_level(), add(byte_level(), "lighthouses", "<|tool|>"))
    assert vocabulary.num_shared == vocabulary.num_target_ids == 400
    assert vocabulary.not_drafted == list(range(400, 512)) and vocabulary.stand_ins == {}
    assert "shares 400 of the target's 400 token ids (100.0%)" in vocabulary.notes()[0]


def test_for_two_more_words_of_the_target_the_drafter_reads_the_ends_of_what_it_makes_of_them(compare):
    theirs = byte_level()
    vocabulary = compare(with_words(byte_level(), "lighthouses", "zebras"), theirs, their_rows=400)
    assert (vocabulary.num_shared, vocabulary.num_target_ids) == (400, 402)
    assert vocabulary.not_drafted == []
    assert vocabulary.stand_ins == {400: theirs.encode("lighthouses").ids[-1], 401: theirs.encode("zebras").ids[-1]}
    assert "shares 400 of the target's 402 token ids (99.5%): the others are never drafted" in vocabulary.notes()[0]


def test_other_special_tokens_in_the_middle_are_left_out_by_id(compare):
    """Ids on both sides of them are shared: what is common is a set, not a range from 0."""
    ours, theirs = byte_level(special=["<s>", "</s>", "<pad>"]), byte_level(special=["<s>", "<eos>", "<mask>"])
    vocabulary = compare(ours, theirs, 400, 400)
    assert vocabulary.not_drafted == [1, 2] and vocabulary.stand_ins.keys() == {1, 2}
    assert vocabulary.num_shared == 398


def test_of_two_words_that_are_swapped_each_is_read_as_itself_and_neither_is_drafted(compare):
    vocabulary = compare(WORDS, with_swapped(40, 41), 96, 96)
    assert vocabulary.not_drafted == [40, 41] and vocabulary.stand_ins == {40: 41, 41: 40}


def test_a_tokenizer_with_a_token_for_unknown_words_reads_that(compare):
    vocabulary = compare(tiny_tokenizer(99).backend_tokenizer, WORDS, 99, 96)
    assert vocabulary.stand_ins == {96: 0, 97: 0, 98: 0} and vocabulary.not_drafted == []


def test_ids_without_a_row_in_both_models_are_not_shared(compare):
    """Words were added to the tokenizers, and to one of the models."""
    tokenizer = with_words(byte_level(), "lighthouses", "zebras")
    vocabulary = compare(tokenizer, tokenizer, our_rows=402, their_rows=400)
    assert vocabulary.num_shared == 400 and vocabulary.stand_ins.keys() == {400, 401}
    assert all(stand_in < 400 for stand_in in vocabulary.stand_ins.values())


@pytest.mark.parametrize(("num_other", "is_refused"), [(9, False), (10, True)])
def test_nine_in_ten_of_the_targets_ids_must_be_shared(compare, num_other, is_refused):
    words = {f"{'x' if token < num_other else 't'}{token}": token for token in range(96)}
    theirs = Tokenizer(models.WordLevel(vocab=words, unk_token="t95"))
    theirs.pre_tokenizer = pre_tokenizers.Whitespace()
    ours = Tokenizer(models.WordLevel(vocab={f"t{token}": token for token in range(96)}, unk_token="t95"))
    ours.pre_tokenizer = pre_tokenizers.Whitespace()
    if not is_refused:
        assert compare(ours, theirs, 96, 96).num_shared == 87
        return
    with pytest.raises(
        ConfigError, match=r"must share at least 90% .* shares 86 of 96: id 0 is 'x0' there and 't0' in"
    ):
        compare(ours, theirs, 96, 96)


OTHER_FAMILIES = {
    "other words": tiny_tokenizer(prefix="x").backend_tokenizer,
    "other casing": tiny_tokenizer(prefix="T").backend_tokenizer,
    "byte level": byte_level(),
}


@pytest.mark.parametrize("theirs", OTHER_FAMILIES.values(), ids=OTHER_FAMILIES.keys())
def test_another_family_is_refused_by_an_id(facts_of, theirs):
    target, drafter = facts_of(WORDS), facts_of(theirs, key="model.drafter")
    with pytest.raises(ConfigError) as refused:
        shared_vocabulary(target, drafter)
    words = ["model.drafter", drafter.source, "model.target", "lookup", "id 0 is ", "'t0' in the target's"]
    assert all(word in str(refused.value) for word in words), refused.value


def test_a_tokenizer_that_reads_capitals_otherwise_is_noted(compare):
    vocabulary = compare(byte_level(), byte_level(lowers=True))
    assert 0.6 < vocabulary.agreement < 0.97
    assert "of ordinary text otherwise than the target's: fewer drafts will be accepted" in vocabulary.notes()[-1]


def test_the_same_words_that_are_cut_otherwise_are_refused(compare):
    """Without its merges a tokenizer has all the words and uses none of them."""
    ours = byte_level(700)
    theirs = Tokenizer(models.BPE(vocab=ours.get_vocab(), merges=[]))
    theirs.pre_tokenizer, theirs.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    with pytest.raises(ConfigError, match=r"must cut text into words as .* it must be at least 50%.*lookup"):
        compare(ours, theirs, 700, 700)


def test_a_checkpoint_with_two_more_words_is_read_from_its_folder(checkpoints, tmp_path):
    config = tiny_config("llama", vocab_size=98)
    folder = save_checkpoint(tmp_path / "drafter", config, tokenizer=tiny_tokenizer(98))
    facts = [describe(key, str(path), torch.float32) for key, path in
             (("model.target", checkpoints("llama")), ("model.drafter", folder))]  # fmt: skip
    assert shared_vocabulary(*facts).not_drafted == [96, 97]


class Recording:
    """A model that says what it was given, and wants its highest id next."""

    vocab_size = 6

    def __init__(self):
        self.tokens: list[int] = []

    @property
    def length(self) -> int:
        return len(self.tokens)

    def prefill(self, tokens: list[int]) -> None:
        self.tokens = list(tokens)

    def append(self, tokens: list[int], num_logits: int) -> torch.Tensor:
        self.tokens += tokens
        return torch.arange(6.0).repeat(num_logits, 1)

    def truncate(self, length: int) -> None:
        del self.tokens[length:]


def vocabulary_without(not_drafted: list[int], stand_ins: dict[int, int]) -> SharedVocabulary:
    return SharedVocabulary(num_shared=4, num_target_ids=6, agreement=1.0, not_drafted=not_drafted, stand_ins=stand_ins)


def test_what_is_not_shared_is_read_as_its_stand_in_and_has_no_logit():
    inner = Recording()
    model = SharedIdsModel(inner, vocabulary_without([2, 5], {2: 1, 7: 0}))
    model.prefill([3, 2, 7])
    logits = model.append([7, 4], 2)
    assert inner.tokens == [3, 1, 0, 0, 4] and model.length == 5
    assert logits.tolist() == [[0, 1, -torch.inf, 3, 4, -torch.inf]] * 2
    model.truncate(1)
    assert inner.tokens == [3]


def test_a_drafter_with_the_targets_words_is_left_as_it_is():
    model = Recording()
    assert on_shared_ids(model, vocabulary_without([], {})) is model
