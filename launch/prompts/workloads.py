"""What is asked of a document: a head and a tail around it, facts hidden in it, and the answers where they are known.

The summary's words are those of TriForce's runs (arXiv 2404.11912). Needles are "magic numbers" of cities, hidden at
known depths; of several questions over one document all but the last come with their answers, as turns do in a chat.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from conf.schema import PromptConfig, PromptTask

READ_HEAD = "You are a helpful assistant. USER: Please read {what} below, and then {do}.\n[start of the text]\n"
READ_TAIL = "\n[end of the text]\n\nNow you have read it. "
SUMMARY = (
    "Please summarize it for me. First, tell me the title and the author, and then tell the story in 500 words."
    "\n\nASSISTANT: "
)
QUESTION = "{question}\n\nASSISTANT: "
CITIES = (
    *("Lima", "Oslo", "Cairo", "Quito", "Hanoi", "Tunis", "Riga", "Accra", "Sofia", "Dakar"),
    *("Minsk", "Perth", "Turin", "Osaka", "Leeds", "Porto", "Basel", "Lyon", "Kyoto", "Graz"),
)


@dataclass(kw_only=True, frozen=True, slots=True)
class Fact:
    """A sentence hidden in the document, a paragraph of its own."""

    depth: float
    sentence: str


@dataclass(kw_only=True, frozen=True, slots=True)
class Workload:
    """The document comes between `head` and `tail`, which are never cut."""

    head: str = ""
    tail: str = ""
    facts: tuple[Fact, ...] = ()
    answers: tuple[str, ...] = ()
    """Any of them answers the question; empty where no answer is known."""


def make_workload(config: PromptConfig, question: str | None = None, answers: Iterable[str] = ()) -> Workload:
    """`question` and `answers` are those of a data set's item; prompt.question goes before."""
    if config.task is PromptTask.summary:
        head = READ_HEAD.format(what="a part of the book", do="give me the summary")
        return Workload(head=head, tail=READ_TAIL + SUMMARY)
    if config.task is PromptTask.question:
        head = READ_HEAD.format(what="the text", do="answer a question about it")
        tail = READ_TAIL + QUESTION.format(question=config.question or question)
        return Workload(head=head, tail=tail, answers=() if config.question else tuple(answers))
    if config.task is PromptTask.needle:
        return _needles(config)
    return Workload()


def _needles(config: PromptConfig) -> Workload:
    """The last question's needle lies at `config.depth`, those of the turns before it evenly spread."""
    cities, count = CITIES[: config.turns], config.turns
    depths = [(turn + 0.5) / (count - 1) for turn in range(count - 1)] + [config.depth]
    numbers = [str(1000 + 7919 * (turn + 1) % 9000) for turn in range(count)]
    facts, turns = [], ""
    for city, number, depth in zip(cities, numbers, depths, strict=True):
        facts.append(Fact(depth=depth, sentence=f"\nThe magic number of {city} is {number}.\n"))
        turns += f"What is the magic number of {city}?\n\nASSISTANT: The magic number of {city} is {number}.\n\nUSER: "
    # The last turn is answered by the model.
    turns = turns.removesuffix(f" {numbers[-1]}.\n\nUSER: ")
    head = READ_HEAD.format(what="the text", do="answer questions about it")
    return Workload(head=head, tail=READ_TAIL + turns, facts=tuple(facts), answers=(numbers[-1],))
