"""Tasks around a document: a head and a tail, facts hidden in it, and the answers where they are known.

The summary's words are those of TriForce's runs (arXiv 2404.11912). Needles are "magic numbers" of cities, hidden at
known depths; of several questions over one document all but the last come with their answers, as turns do in a chat.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from conf.schema import PromptConfig, PromptTask
from launch.prompts.needle import Fact

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
class Workload:
    """A task around a document, which comes between `head` and `tail`; these are never cut."""

    head: str = ""
    tail: str = ""
    facts: tuple[Fact, ...] = ()
    """Sentences hidden in the document, each a paragraph of its own."""
    depths: tuple[float, ...] = ()
    """Share of the document before each fact, from 0 to 1."""
    answers: tuple[str, ...] = ()
    """Texts any of which answers the question; empty where no answer is known."""


def make_workload(config: PromptConfig, question: str | None = None, answers: Iterable[str] = ()) -> Workload:
    """The workload of a task. `question` and `answers` are those of a data set's item; prompt.question goes before."""
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
    """Questions about hidden numbers; the last one's fact lies at `config.depth`, those before it evenly spread."""
    count = config.turns
    depths = [(turn + 0.5) / (count - 1) for turn in range(count - 1)] + [config.depth]
    numbers = [str(1000 + 7919 * (turn + 1) % 9000) for turn in range(count)]
    facts = [_magic_number(city, number) for city, number in zip(CITIES[:count], numbers, strict=True)]
    answered = [fact.question + fact.answer for fact in facts[:-1]]
    head = READ_HEAD.format(what="the text", do="answer questions about it")
    return Workload(
        head=head,
        tail=READ_TAIL + "\n\nUSER: ".join([*answered, facts[-1].question]),
        facts=tuple(facts),
        depths=tuple(depths),
        answers=(numbers[-1],),
    )


def _magic_number(city: str, number: str) -> Fact:
    return Fact(
        text=f"\nThe magic number of {city} is {number}.\n",
        question=f"What is the magic number of {city}?\n\nASSISTANT: The magic number of {city} is",
        answer=f" {number}.",
    )
