"""launch/prompts/prompt.py: what is read becomes the same tokens however little is read; bad files are refused."""

import os
import random
import sysconfig
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from conf.schema import ConfigError, PromptConfig, PromptTask
from launch.prompts import document, encoder, encodings, prompt
from launch.prompts.document import check_document
from launch.prompts.encoder import Encoder
from launch.prompts.prompt import make_prompt, read_prompt
from launch.prompts.workloads import make_workload
from tests.support import tiny_tokenizers

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
    monkeypatch.setattr(encoder, "PIECE_CHARS", piece_chars)
    words = random.Random(piece_chars)
    parts = [SAMPLE, "rain", " ", "\n", "====", "left + ", "é", "🦉", " " * 300, "=" * 999]
    text = "".join(words.choices(parts, k=3000))
    whole = tokenizer(text, split_special_tokens=True)["input_ids"]
    for count in (None, len(whole), len(whole) - 1, 2000, 1):
        assert read_prompt(PromptConfig(text=text, max_tokens=count), tokenizer) == whole[:count]


def test_of_a_long_text_no_large_part_is_tokenized_at_once(monkeypatch):
    sizes, text, encode = [], SAMPLE * 5000, Encoder._encode
    monkeypatch.setattr(Encoder, "_encode", lambda *args: sizes.append(args[3]) or encode(*args))
    assert len(read_prompt(PromptConfig(text=text, max_tokens=None), WORDS)) == len(WORDS(text)["input_ids"])
    assert len(sizes) > 5 and max(sizes) == encoder.PIECE_CHARS


def test_text_without_a_joint_is_tokenized_in_a_larger_piece(monkeypatch):
    monkeypatch.setattr(encoder, "PIECE_CHARS", 4000)
    joint, missing = encoder._joint, [None, None]
    monkeypatch.setattr(encoder, "_joint", lambda *pieces: missing.pop() if missing else joint(*pieces))
    text = SAMPLE * 1000
    assert read_prompt(PromptConfig(text=text, max_tokens=None), WORDS) == WORDS(text)["input_ids"]
    assert not missing


@pytest.mark.parametrize("kind", tiny_tokenizers.KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("task", list(PromptTask))
@pytest.mark.parametrize("max_tokens", [None, 400])
def test_the_beginning_of_sequence_comes_once_and_the_end_never(kind, task, max_tokens):
    question = "Who is it?" if task is PromptTask.question else None
    config = PromptConfig(text="the cat is it. " * 300, task=task, question=question, max_tokens=max_tokens)
    tokenizer = kind(adds_end=True)
    ids = read_prompt(config, tokenizer)
    assert ids == read_prompt(config, kind())
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token_id not in ids


def test_an_end_of_sequence_is_not_added_to_a_text_read_in_pieces(monkeypatch):
    monkeypatch.setattr(encoder, "PIECE_CHARS", 4000)
    tokenizer = make_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    text = SAMPLE * 300
    assert read_prompt(PromptConfig(text=text, max_tokens=None), tokenizer) == tokenizer(text)["input_ids"][:-1]
    assert read_prompt(PromptConfig(text=text, max_tokens=9), tokenizer) == tokenizer(text)["input_ids"][:9]


@pytest.mark.parametrize("kind", tiny_tokenizers.KINDS, ids=lambda kind: kind.__name__)
def test_the_parts_of_a_prompt_join_without_spaces_of_the_tokenizers_own(kind):
    tokenizer, question = kind(), "Who is it?"
    config = PromptConfig(text="the cat is it.", task=PromptTask.question, question=question, max_tokens=None)
    workload = make_workload(config)
    whole = workload.head + "the cat is it." + workload.tail
    assert read_prompt(config, tokenizer) == tokenizer(whole, split_special_tokens=True)["input_ids"]


def test_special_tokens_of_a_file_are_special_where_that_is_asked_for(monkeypatch):
    monkeypatch.setattr(encoder, "PIECE_CHARS", 4000)
    text = f"system</s>{SAMPLE * 200}</s>\n<s>{SAMPLE * 200}"
    config = PromptConfig(text=text, max_tokens=None, special_tokens=True)
    assert read_prompt(config, WORDS) == WORDS(text)["input_ids"]
    with_its_own = PromptConfig(text=f"<s>{text}", max_tokens=None, special_tokens=True)
    assert read_prompt(with_its_own, WORDS) == WORDS(text)["input_ids"]
    cut = PromptConfig(text=f"<s>{text}", max_tokens=3, special_tokens=True)
    assert read_prompt(cut, WORDS) == WORDS(text)["input_ids"][:3]


@pytest.mark.parametrize(
    ("max_tokens", "num_read", "is_cut"), [(None, 101, False), (102, 101, False), (101, 100, True), (10, 9, True)]
)
def test_a_cut_is_told_and_counted(tmp_path, max_tokens, num_read, is_cut):
    text = "".join(chr(0x4E00 + 7 * number) for number in range(33)) + "ab"  # three bytes a character, none merged
    path = tmp_path / "a.txt"
    path.write_text(text, encoding="utf-8")
    for source in ({"text": text}, {"path": str(path)}):
        made = make_prompt(PromptConfig(**source, max_tokens=max_tokens), WORDS)
        assert (made.num_read, made.num_document, made.is_counted, made.is_cut) == (num_read, 101, True, is_cut)
        assert len(made.ids) == num_read + 1
        assert made.to_plain() == {
            "tokens_read": num_read,
            "document_tokens": 101,
            "document_tokens_are_exact": True,
            "is_cut": is_cut,
            "frame": "nothing",
        }


def test_of_a_question_the_documents_tokens_are_counted_alone():
    config = PromptConfig(text=SAMPLE * 50, task=PromptTask.question, question="Why?", max_tokens=500)
    made = make_prompt(config, WORDS)
    assert made.num_document == len(WORDS(SAMPLE * 50)["input_ids"]) - 1 and made.is_cut
    assert 300 < made.num_read < 500 == len(made.ids)


def test_a_document_is_counted_up_to_a_limit(monkeypatch):
    monkeypatch.setattr(prompt, "COUNTED_TOKENS", 1000)
    made = make_prompt(PromptConfig(text=SAMPLE * 500, max_tokens=10), WORDS)
    assert (made.num_document, made.is_counted, made.is_cut) == (1000, False, True)
    longer = make_prompt(PromptConfig(text=SAMPLE * 500, max_tokens=2000), WORDS)
    assert (longer.num_read, longer.num_document, longer.is_counted) == (1999, 2001, False)


def test_what_cannot_be_read_behind_the_cut_is_not_counted(tmp_path):
    path = tmp_path / "huge.txt"
    path.write_bytes(SAMPLE.encode() * 10_000 + b"\xff")
    made = make_prompt(PromptConfig(path=str(path), max_tokens=100), WORDS)
    assert (made.num_read, made.is_counted, made.is_cut) == (99, False, True) and made.num_document >= 100


def test_a_pipe_is_not_read_again_to_count_it(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_text, args=(SAMPLE * 50,))
    writer.start()
    made = make_prompt(PromptConfig(path=str(path), max_tokens=100), WORDS)
    writer.join()
    assert (made.num_read, made.is_counted, made.is_cut) == (99, False, True)


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
    monkeypatch.setattr(encodings, "BLOCK_BYTES", 3)
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
    monkeypatch.setattr(encodings, "BLOCK_BYTES", 1024)
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


@pytest.mark.parametrize("ending", ["\r\n", "\r", "\n"])
@pytest.mark.parametrize("block_bytes", [1, 3, 1 << 18])
def test_line_ends_of_any_system_are_newlines(tmp_path, monkeypatch, ending, block_bytes):
    monkeypatch.setattr(encodings, "BLOCK_BYTES", block_bytes)
    path = tmp_path / "book.txt"
    path.write_bytes(ending.join(["It rained.", "", "é", "rain", ""]).encode())
    assert read_prompt(PromptConfig(path=str(path)), WORDS) == WORDS("It rained.\n\né\nrain\n")["input_ids"]


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
    for reader in (check_document, lambda config: read_prompt(config, WORDS)):
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
    monkeypatch.setattr(document.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert WORDS.decode(read_prompt(PromptConfig(), WORDS)[1:]) == "a/x.py\nb.py\n"


def test_a_python_without_sources_says_what_to_set(tmp_path, monkeypatch):
    monkeypatch.setattr(document.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"prompt\.path"):
        read_prompt(PromptConfig(), WORDS)
