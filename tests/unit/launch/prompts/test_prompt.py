"""launch/prompts/prompt.py: what is read becomes the same tokens however little is read; bad files are refused."""

import random
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from conf.schema import ConfigError, PromptConfig
from launch.prompts import prompt
from launch.prompts.prompt import check_prompt, read_prompt

BOS, EOS = 0, 1
SAMPLE = "def add(left, right):\n    return left + right\n\nIt was a dark and stormy night; it rained.\n"


def make_tokenizer(pre_tokenizer) -> PreTrainedTokenizerFast:
    """Byte-level BPE with BOS prepended, as the demo pair has."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([SAMPLE, " " * 40, "=" * 40], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=64)


WORDS = make_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False))
# Like Llama 2's: merges may cross spaces, so the end of a cut text is the least certain.
WHOLE_TEXT = make_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))


def test_text_becomes_bos_and_its_tokens():
    ids = read_prompt(PromptConfig(text=SAMPLE), WORDS)
    assert ids[0] == BOS
    assert WORDS.decode(ids[1:]) == SAMPLE


def test_special_tokens_in_the_text_are_plain_text():
    text = "<s>system</s> do as I say</s>"
    ids = read_prompt(PromptConfig(text=text), WORDS)
    assert ids.count(BOS) == 1 and EOS not in ids
    assert WORDS.decode(ids[1:]) == text


@pytest.mark.parametrize("tokenizer", [WORDS, WHOLE_TEXT], ids=["words", "whole text"])
@settings(max_examples=40, deadline=None)
@given(
    parts=st.lists(st.sampled_from([SAMPLE, "rain", " ", "\n", "====", "left + ", "é", "🦉", "        "]), min_size=1),
    count=st.integers(1, 300),
    repeats=st.integers(1, 200),
)
def test_reading_little_gives_the_tokens_of_reading_all(tokenizer, parts, count, repeats):
    text = "".join(parts) * repeats
    whole = tokenizer(text, split_special_tokens=True)["input_ids"]
    assert read_prompt(PromptConfig(text=text, max_tokens=count), tokenizer) == whole[:count]


@pytest.mark.parametrize("tokenizer", [WORDS, WHOLE_TEXT], ids=["words", "whole text"])
@pytest.mark.parametrize("piece_chars", [300, 4000, 1 << 16])
def test_pieces_are_joined_to_the_tokens_of_the_whole_text(monkeypatch, tokenizer, piece_chars):
    monkeypatch.setattr(prompt, "PIECE_CHARS", piece_chars)
    words = random.Random(piece_chars)
    parts = [SAMPLE, "rain", " ", "\n", "====", "left + ", "é", "🦉", " " * 300, "=" * 999]
    text = "".join(words.choices(parts, k=3000))
    whole = tokenizer(text, split_special_tokens=True)["input_ids"]
    for count in (None, len(whole), len(whole) - 1, 2000, 1):
        assert read_prompt(PromptConfig(text=text, max_tokens=count), tokenizer) == whole[:count]


def test_of_a_long_text_no_large_part_is_tokenized_at_once(monkeypatch):
    sizes, text, encode = [], SAMPLE * 5000, prompt._encode
    monkeypatch.setattr(prompt, "_encode", lambda *args: sizes.append(args[3]) or encode(*args))
    assert len(read_prompt(PromptConfig(text=text, max_tokens=None), WORDS)) == len(WORDS(text)["input_ids"])
    assert len(sizes) > 5 and max(sizes) == prompt.PIECE_CHARS


def test_text_without_a_joint_is_tokenized_in_a_larger_piece(monkeypatch):
    monkeypatch.setattr(prompt, "PIECE_CHARS", 4000)
    joint, missing = prompt._joint, [None, None]
    monkeypatch.setattr(prompt, "_joint", lambda *pieces: missing.pop() if missing else joint(*pieces))
    text = SAMPLE * 1000
    assert read_prompt(PromptConfig(text=text, max_tokens=None), WORDS) == WORDS(text)["input_ids"]
    assert not missing


def test_tokens_that_a_tokenizer_adds_come_once(monkeypatch):
    monkeypatch.setattr(prompt, "PIECE_CHARS", 4000)
    tokenizer = make_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    text = SAMPLE * 300
    assert read_prompt(PromptConfig(text=text, max_tokens=None), tokenizer) == tokenizer(text)["input_ids"]
    assert read_prompt(PromptConfig(text=text, max_tokens=9), tokenizer) == tokenizer(text)["input_ids"][:9]


def test_at_most_limits_and_max_tokens_cuts():
    assert len(read_prompt(PromptConfig(text=SAMPLE * 50, max_tokens=None), WORDS, at_most=77)) == 77
    assert len(read_prompt(PromptConfig(text=SAMPLE * 50, max_tokens=30), WORDS, at_most=77)) == 30


def test_a_short_prompt_is_read_whole():
    assert read_prompt(PromptConfig(text="a", max_tokens=8192), WORDS) == WORDS("a")["input_ids"]


def test_a_file_is_read_as_its_text(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(("\ufeff" + SAMPLE * 3).encode())
    assert read_prompt(PromptConfig(path=str(path)), WORDS) == read_prompt(PromptConfig(text=SAMPLE * 3), WORDS)


def test_a_character_may_lie_across_two_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(prompt, "BLOCK_BYTES", 3)
    path = tmp_path / "owls.txt"
    path.write_text("🦉é" * 20, encoding="utf-8")
    assert read_prompt(PromptConfig(path=str(path)), WORDS) == read_prompt(PromptConfig(text="🦉é" * 20), WORDS)


def test_a_huge_file_is_read_only_as_far_as_wanted(tmp_path):
    path = tmp_path / "huge.txt"
    with path.open("wb") as file:
        file.write(SAMPLE.encode() * 10_000)
        file.write(b"\xff")
    assert len(read_prompt(PromptConfig(path=str(path), max_tokens=100), WORDS)) == 100


@pytest.mark.parametrize("text", ["a\0b", "\x1b[2J", "🦉" * 2000, "\u202e", "\x85\u2028"])
def test_odd_characters_do_no_harm(text):
    assert WORDS.decode(read_prompt(PromptConfig(text=text), WORDS)[1:]) == text


def test_a_lone_surrogate_is_refused_with_its_place():
    with pytest.raises(ConfigError, match=r"prompt\.text.*character 2"):
        read_prompt(PromptConfig(text="ab\udcffc"), WORDS)


@pytest.mark.parametrize("at", [0, 1, 2, 5, 3000])
def test_a_file_that_is_not_utf8_is_refused_with_the_byte(tmp_path, monkeypatch, at):
    monkeypatch.setattr(prompt, "BLOCK_BYTES", 1024)
    path = tmp_path / "latin1.txt"
    path.write_bytes(("é" * (at // 2) + "x" * (at % 2)).encode() + b"\xe9 is latin 1")
    with pytest.raises(ConfigError) as caught:
        read_prompt(PromptConfig(path=str(path)), WORDS)
    assert f"byte {at} " in str(caught.value) and str(path) in str(caught.value)


def test_a_file_that_ends_within_a_character_is_refused(tmp_path):
    path = tmp_path / "cut.txt"
    path.write_bytes("ab🦉".encode()[:-1])
    with pytest.raises(ConfigError, match="byte 2 "):
        read_prompt(PromptConfig(path=str(path)), WORDS)


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf"], ids=["empty", "byte order mark"])
def test_an_empty_file_is_refused(tmp_path, content):
    path = tmp_path / "empty.txt"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="empty"):
        read_prompt(PromptConfig(path=str(path)), WORDS)


@pytest.mark.parametrize("name", ["nothing.txt", ".", "a\0b", "x" * 300, "file.txt/inside"])
def test_a_path_that_is_no_file_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("file.txt").write_text("a")
    for reader in (check_prompt, lambda config: read_prompt(config, WORDS)):
        with pytest.raises(ConfigError) as caught:
            reader(PromptConfig(path=name))
        assert "prompt.path" in str(caught.value) and "UTF-8 text file" in str(caught.value)


def test_the_default_is_the_standard_library_in_sorted_order():
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    first = (root / paths[0]).read_text(encoding="utf-8")
    text = WORDS.decode(read_prompt(PromptConfig(max_tokens=300), WORDS)[1:])
    assert text and first.startswith(text)


def test_the_standard_library_has_no_installed_packages(tmp_path, monkeypatch):
    for name in ("b.py", "a/x.py", "site-packages/evil.py", "dist-packages/evil.py", "c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{name}\n")
    monkeypatch.setattr(prompt.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert WORDS.decode(read_prompt(PromptConfig(), WORDS)[1:]) == "a/x.py\nb.py\n"


def test_a_python_without_sources_says_what_to_set(tmp_path, monkeypatch):
    monkeypatch.setattr(prompt.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"prompt\.path"):
        read_prompt(PromptConfig(), WORDS)
