"""What a prompt can be made of: words that the model knows, by a tokenizer that tells where they are."""

from __future__ import annotations

import shutil

import pytest
from transformers import ByT5Tokenizer

from conf.schema import ConfigError, Mode, PromptConfig
from launch.assembly.prepare import prepare
from launch.assembly.session_run import check_ids
from launch.prompts.prompt import read_prompt
from tests.support.tiny_models import VOCAB_SIZE, save_checkpoint, tiny_config, tiny_tokenizer
from tests.support.tiny_runs import generate, tiny_run


def prepared_with_words(tmp_path, words: list[str], *, vocab_size: int = VOCAB_SIZE):
    """The run of a model of `vocab_size` ids, whose tokenizer has `words` behind VOCAB_SIZE others; and its pair."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(words)
    folder = save_checkpoint(tmp_path / "m", tiny_config("llama", vocab_size=vocab_size), tokenizer=tokenizer)
    config = tiny_run(folder, mode=Mode.autoregressive)
    return config, prepare(config)


def ids_of(text: str, prepared) -> list[int]:
    return read_prompt(PromptConfig(text=text, max_tokens=None), prepared.tokenizer)


def test_a_word_that_was_added_to_the_tokenizer_alone_is_refused_by_id_and_text(tmp_path):
    _, prepared = prepared_with_words(tmp_path, ["added"])
    ids = ids_of("t1 t2 added t3 added", prepared)
    assert ids[2] == VOCAB_SIZE == prepared.vocab_size
    with pytest.raises(ConfigError) as refused:
        check_ids(ids, prepared.vocab_size, prepared.tokenizer)
    message = str(refused.value)
    assert all(part in message for part in ["token 2", "'added'", f"id {VOCAB_SIZE}", f"below {VOCAB_SIZE}"]), message


def test_the_same_tokenizer_serves_a_prompt_without_the_word(tmp_path):
    config, prepared = prepared_with_words(tmp_path, ["added"])
    ids = ids_of("t1 t2 t95", prepared)
    check_ids(ids, prepared.vocab_size, prepared.tokenizer)
    assert len(generate(config, ids, 3, prepared=prepared).tokens) == 3


def test_a_word_that_was_added_to_the_model_as_well_is_read(tmp_path):
    config, prepared = prepared_with_words(tmp_path, ["added"], vocab_size=VOCAB_SIZE + 8)
    ids = ids_of("t1 added", prepared)
    check_ids(ids, prepared.vocab_size, prepared.tokenizer)
    assert ids == [1, VOCAB_SIZE] and len(generate(config, ids, 3, prepared=prepared).tokens) == 3


def test_a_tokenizer_in_python_only_is_refused_before_weights_are_read(tmp_path, checkpoints):
    folder = shutil.copytree(checkpoints("llama"), tmp_path / "m")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    ByT5Tokenizer().save_pretrained(folder)
    config = tiny_run(folder, mode=Mode.autoregressive)
    with pytest.raises(ConfigError) as refused:
        prepare(config)
    message = str(refused.value)
    assert message.startswith(f"model.target is {str(folder)!r}") and "ByT5Tokenizer" in message
    assert "tokenizer.json" in message
