"""Tasks around a document: what is said before and after it, facts hidden in it, and the answers where they are known.

The summary's words are those of TriForce's runs (arXiv 2404.11912). Needles are "magic numbers" of cities, hidden at
known depths; of several questions over one document all but the last come with their answers, as turns do in a chat.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from conf.schema import PromptConfig, PromptTask
from launch.prompts.needle import Fact

OPENING = "Please read {what} below, and then {do}.\n[start of the text]\n"
CLOSING = "\n[end of the text]\n\nNow you have read it. "
SUMMARY = "Please summarize it for me. First, tell me the title and the author, and then tell the story in 500 words."
SYSTEM, USER, ASSISTANT = "You are a helpful assistant. ", "USER: ", "ASSISTANT: "
BETWEEN = "\n\n"
"""The frame of a prompt for models without a chat template, as in TriForce's runs."""
CITIES = (
    *("Lima", "Oslo", "Cairo", "Quito", "Hanoi", "Tunis", "Riga", "Accra", "Sofia", "Dakar"),
    *("Minsk", "Perth", "Turin", "Osaka", "Leeds", "Porto", "Basel", "Lyon", "Kyoto", "Graz"),
)


@dataclass(kw_only=True, frozen=True, slots=True)
class Exchange:
    """A question with its answer, which is in two parts."""

    question: str
    begun: str = ""
    """Beginning of the answer, which the frame for models without a chat template writes for the last turn, too."""
    rest: str = ""
    """The rest of the answer, which the last turn leaves to the model."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Workload:
    """A task around a document, which comes between `opening` and `closing`; these are never cut."""

    opening: str = ""
    closing: str = ""
    turns: tuple[Exchange, ...] = ()
    """Questions after the document; the last is to be answered. None: the document is to be continued."""
    facts: tuple[Fact, ...] = ()
    """Sentences hidden in the document, each a paragraph of its own."""
    depths: tuple[float, ...] = ()
    """Share of the document before each fact, from 0 to 1."""
    answers: tuple[str, ...] = ()
    """Texts any of which answers the question; empty where no answer is known."""

    @property
    def head(self) -> str:
        """All that comes before the document for a model without a chat template."""
        return f"{SYSTEM}{USER}{self.opening}" if self.turns else ""

    @property
    def tail(self) -> str:
        """All that comes after the document for a model without a chat template."""
        if not self.turns:
            return ""
        *before, last = self.turns
        asked = [f"{turn.question}{BETWEEN}{ASSISTANT}{turn.begun}{turn.rest}" for turn in before]
        asked.append(f"{last.question}{BETWEEN}{ASSISTANT}{last.begun}")
        return self.closing + f"{BETWEEN}{USER}".join(asked)


def make_workload(config: PromptConfig, question: str | None = None, answers: Iterable[str] = ()) -> Workload:
    """The workload of a task. `question` and `answers` are those of a data set's item; prompt.question goes before."""
    if config.task is PromptTask.summary:
        opening = OPENING.format(what="a part of the book", do="give me the summary")
        return Workload(opening=opening, closing=CLOSING, turns=(Exchange(question=SUMMARY),))
    if config.task is PromptTask.question:
        opening = OPENING.format(what="the text", do="answer a question about it")
        asked = config.question or question
        assert asked is not None, "a configuration has a question, or a data set that has one"
        known = () if config.question else tuple(answers)
        return Workload(opening=opening, closing=CLOSING, turns=(Exchange(question=asked),), answers=known)
    if config.task is PromptTask.needle:
        return _needles(config)
    return Workload()


def _needles(config: PromptConfig) -> Workload:
    """Questions about hidden numbers; the last one's fact lies at `config.depth`, those before it evenly spread."""
    count = config.turns
    depths = [(turn + 0.5) / (count - 1) for turn in range(count - 1)] + [config.depth]
    numbers = [str(1000 + 7919 * (turn + 1) % 9000) for turn in range(count)]
    facts = [_magic_number(city, number) for city, number in zip(CITIES[:count], numbers, strict=True)]
    return Workload(
        opening=OPENING.format(what="the text", do="answer questions about it"),
        closing=CLOSING,
        turns=tuple(
            Exchange(question=fact.question, begun=f"The magic number of {city} is", rest=fact.answer)
            for city, fact in zip(CITIES[:count], facts, strict=True)
        ),
        facts=tuple(facts),
        depths=tuple(depths),
        answers=(numbers[-1],),
    )


def _magic_number(city: str, number: str) -> Fact:
    return Fact(
        text=f"\nThe magic number of {city} is {number}.\n",
        question=f"What is the magic number of {city}?",
        answer=f" {number}.",
    )
