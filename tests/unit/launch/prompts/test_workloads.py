"""What is asked of a document is in the prompt as a whole, facts lie where they are said to, bad input is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from conf.schema import ConfigError, Dataset, PromptConfig, PromptTask
from launch.prompts import published_texts
from launch.prompts.document import check_document
from launch.prompts.prompt import read_prompt, read_workload
from launch.prompts.published_texts import HUB
from tests.unit.launch.prompts.test_prompt import BOS, WORDS

LINES = "".join(f"It rained on night {number}.\n" for number in range(400))
NEEDLE = PromptTask.needle


def text_of(**config) -> str:
    ids = read_prompt(PromptConfig(**config), WORDS)
    assert ids[0] == BOS and ids.count(BOS) == 1
    assert config.get("max_tokens") is None or len(ids) == config["max_tokens"]
    return WORDS.decode(ids[1:])


def test_the_document_is_cut_and_what_is_asked_is_not():
    prompt = text_of(text=LINES, max_tokens=900, task=PromptTask.summary)
    head, document, tail = (
        prompt.partition("[start of the text]\n")[0],
        prompt,
        prompt.partition("[end of the text]")[2],
    )
    assert "part of the book" in head and LINES[:100] in document and LINES not in document
    assert "in 500 words" in tail and tail.endswith("ASSISTANT: ")


def test_a_short_document_is_there_as_a_whole():
    prompt = text_of(text="A fox.", max_tokens=None, task=PromptTask.question, question="Who is it?")
    assert "[start of the text]\nA fox.\n[end of the text]" in prompt
    assert prompt.endswith("Who is it?\n\nASSISTANT: ")


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.9, 1.0])
def test_a_needle_lies_at_its_depth_between_two_lines(depth):
    config = {"text": LINES, "max_tokens": 3000, "task": NEEDLE, "depth": depth}
    prompt = text_of(**config)
    (answer,) = read_workload(PromptConfig(**config)).answers
    document = prompt.partition("[start of the text]\n")[2].partition("\n[end of the text]")[0]
    needle = f"\nThe magic number of Lima is {answer}.\n"
    before, found, after = document.partition(needle)
    assert found and prompt.count(answer) == 1
    assert len(before) / (len(before) + len(after)) == pytest.approx(depth, abs=0.02)
    assert not before or before.endswith("\n") or depth == 1
    assert prompt.endswith("What is the magic number of Lima?\n\nASSISTANT: The magic number of Lima is")


def test_turns_are_answered_but_for_the_last_and_each_has_its_fact():
    config = {"text": LINES, "max_tokens": 4000, "task": NEEDLE, "turns": 4, "depth": 0.1}
    prompt = text_of(**config)
    (answer,) = read_workload(PromptConfig(**config)).answers
    assert prompt.count("What is the magic number of") == 4
    assert prompt.count("The magic number of Lima is") == 2 and prompt.count(answer) == 1
    assert prompt.rstrip().endswith("is") and prompt.index(answer) < len(prompt) / 3


def test_facts_leave_the_document_as_it_was():
    prompt = text_of(text=LINES, max_tokens=2500, task=NEEDLE, turns=3)
    document = prompt.partition("[start of the text]\n")[2].partition("\n[end of the text]")[0]
    for sentence in [line for line in document.split("\n") if "magic" in line]:
        document = document.replace(f"\n{sentence}\n", "", 1)
    assert LINES.startswith(document) and len(document) > 3000


def test_no_room_for_a_document_is_refused():
    with pytest.raises(ConfigError, match=r"prompt.max_tokens is 20; it must be at least \d+: prompt.task=needle"):
        read_prompt(PromptConfig(text=LINES, max_tokens=20, task=NEEDLE), WORDS)


@pytest.fixture
def books(tmp_path) -> Path:
    """PG-19 as first published."""
    (tmp_path / "test").mkdir()
    for name in ("20", "10"):
        (tmp_path / "test" / f"{name}.txt").write_text(f"Book {name}. {LINES}")
    return tmp_path


@pytest.fixture
def stories(tmp_path) -> Path:
    """NarrativeQA as first published."""
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp/abc.content").write_bytes(b"A caf\xe9 on a rainy night. " + LINES.encode())
    with (tmp_path / "qaps.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["document_id", "set", "question", "answer1", "answer2"])
        writer.writerow(["xyz", "train", "Not this one?", "no", "no"])
        writer.writerow(["abc", "test", "What was the weather?", "Rain", "It rained"])
        writer.writerow(["gone", "test", "Where?", "a", "b"])
    return tmp_path


def test_books_are_read_in_sorted_order(books):
    assert text_of(dataset=Dataset.pg19, path=str(books), item=1, max_tokens=50).startswith("Book 20. It rained")


def test_line_ends_of_a_data_set_are_newlines(books):
    path = books / "test" / "10.txt"
    before = text_of(dataset=Dataset.pg19, path=str(books), max_tokens=50)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    published_texts.read_item.cache_clear()
    assert text_of(dataset=Dataset.pg19, path=str(books), max_tokens=50) == before


def test_a_story_comes_with_its_question_and_answers(stories):
    config = PromptConfig(dataset=Dataset.narrativeqa, path=str(stories), task=PromptTask.question, max_tokens=400)
    assert "What was the weather?\n\nASSISTANT: " in WORDS.decode(read_prompt(config, WORDS))
    assert read_workload(config).answers == ("Rain", "It rained")


@pytest.mark.parametrize(
    ("dataset", "config", "words"),
    [
        (Dataset.pg19, {"item": 2}, ["prompt.item is 2", "below 2"]),
        (Dataset.pg19, {"path": "nowhere"}, ["prompt.path is 'nowhere'", "folder", ".txt"]),
        (Dataset.pg19, {"path": "a\0b"}, ["prompt.path", "folder"]),
        (Dataset.narrativeqa, {"item": 7}, ["prompt.item is 7", "below 2"]),
        (Dataset.narrativeqa, {"item": 1}, ["gone.content", "download_stories.sh"]),
    ],
    ids=str,
)
def test_a_data_set_that_is_not_there_is_refused(books, stories, dataset, config, words):
    config = PromptConfig(**{"path": str(books), "dataset": dataset} | config)
    for reader in (check_document, lambda config: read_prompt(config, WORDS)):
        with pytest.raises(ConfigError) as caught:
            reader(config)
        assert all(word in str(caught.value) for word in words)


def test_without_the_package_the_hub_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"package datasets: pip install 'tierforce\[data\]', or set prompt.path"):
        check_document(PromptConfig(dataset=Dataset.pg19))


@pytest.mark.parametrize("dataset", list(Dataset))
def test_a_folder_laid_out_as_on_the_hub_is_read(tmp_path, dataset):
    pytest.importorskip("datasets", reason="Requires: datasets")
    row = {"text": f"A book. {LINES}"}
    if dataset is Dataset.narrativeqa:
        answers = [{"text": "Rain"}, {"text": "It rained"}]
        row = {"document": {"text": f"A book. {LINES}"}, "question": {"text": "Weather?"}, "answers": answers}
    for split in ("train", "test"):
        line = json.dumps(row) if split == "test" else json.dumps(row).replace("A book", "Another")
        (tmp_path / f"{split}.jsonl").write_text("\n".join([line] * 2))
    config = PromptConfig(dataset=dataset, path=str(tmp_path), item=1, max_tokens=100)
    assert WORDS.decode(read_prompt(config, WORDS)[1:]).startswith("A book. It rained")
    if dataset is Dataset.narrativeqa:
        asked = PromptConfig(dataset=dataset, path=str(tmp_path), task=PromptTask.question)
        assert read_workload(asked).answers == ("Rain", "It rained")
    with pytest.raises(ConfigError, match="prompt.item is 2"):
        check_document(PromptConfig(dataset=dataset, path=str(tmp_path), item=2))


def test_a_folder_of_something_else_is_refused(tmp_path):
    pytest.importorskip("datasets", reason="Requires: datasets")
    (tmp_path / "rows.jsonl").write_text('{"title": "A book"}')
    with pytest.raises(ConfigError, match=f"whose columns are title; it must have those of {HUB[Dataset.pg19]}"):
        check_document(PromptConfig(dataset=Dataset.pg19, path=str(tmp_path)))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"text": "a", "dataset": Dataset.pg19}, ["prompt.text"]),
        ({"item": 3}, ["prompt.item is 3", "prompt.dataset"]),
        ({"item": -1, "dataset": Dataset.pg19}, ["prompt.item is -1", ">= 0"]),
        ({"task": NEEDLE, "depth": 1.5}, ["prompt.depth is 1.5", "between 0"]),
        ({"task": NEEDLE, "turns": 0}, ["prompt.turns is 0", "between 1 and 20"]),
        ({"turns": 2}, ["prompt.turns is 2", "prompt.task=needle"]),
        ({"task": PromptTask.question}, ["prompt.question is None", "narrativeqa"]),
        ({"task": PromptTask.question, "question": ""}, ["prompt.question is ''"]),
        ({"question": "Who?"}, ["prompt.question is 'Who?'", "prompt.task=question"]),
    ],
    ids=str,
)
def test_keys_that_contradict_are_refused(config, words):
    with pytest.raises(ConfigError) as caught:
        PromptConfig(**config)
    assert all(word in str(caught.value) for word in words)
