"""Facts hidden in a long text at known depths, and what calls for them again at its end.

Needs text and the standard library alone: prompts, workloads, measurements and the demo pair's training text share it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from string import ascii_lowercase


class NeedleForm(StrEnum):
    """Form of a fact, and of what calls for it."""

    assignment = "assignment"
    """`name_key = '482133'`, called for by its left side: as the demo pair has seen it in training."""
    sentence = "sentence"
    """`The number of name is 482133.`, called for by its first words."""
    question = "question"
    """The same sentence, called for by a question, for models that answer."""
    passage = "passage"
    """Random words, called for by their first half: a model that copies what it read can go on."""


@dataclass(frozen=True, slots=True)
class Fact:
    """A text to plant, a question that calls for it at the end of the whole text, and the right answer."""

    text: str
    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Haystack:
    """A text with facts planted in it, and the index of the character at which each of them begins."""

    text: str
    starts: list[int]


PASSAGE_WORDS = 32
WORDS = """
amber anchor april arrow autumn basket beacon bishop bottle branch bridge bronze butter candle canyon carpet castle
cattle cellar cherry circle coffee copper corner cotton cousin crystal dagger desert diamond dragon eagle engine falcon
feather fiddle flower forest garden ginger gravel hammer harbor hazel hunter island ivory jacket jungle kettle ladder
lantern lemon letter lizard marble market meadow mirror monkey needle number ocean olive orange orchard oyster palace
paper parrot pebble pepper pillow planet pocket powder prince rabbit raven ribbon river rocket saddle salmon shadow
silver spider spring stable statue summer sunset temple thread timber tunnel turtle velvet violin walnut window winter
""".split()  # noqa: SIM905


def make_facts(form: NeedleForm, count: int, seed: int) -> list[Fact]:
    """`count` facts with different names, the same for the same seed."""
    rng = random.Random(f"{form}/{seed}")
    if form is NeedleForm.passage:
        return [_passage(rng) for _ in range(count)]
    names: dict[str, None] = {}  # ordered, unlike a set
    while len(names) < count:
        names["".join(rng.choices(ascii_lowercase, k=rng.randint(5, 8)))] = None
    return [named_fact(form, name, str(rng.randint(100_000, 999_999))) for name in names]


def named_fact(form: NeedleForm, name: str, value: str) -> Fact:
    """The fact that `name` has this value, in any form but a passage, which has neither."""
    assert form is not NeedleForm.passage
    if form is NeedleForm.assignment:
        return Fact(f"\n{name}_key = '{value}'\n", f"\n{name}_key = '", f"{value}'")
    sentence = f" The number of {name} is {value}. "
    if form is NeedleForm.sentence:
        return Fact(sentence, f" The number of {name} is", f" {value}.")
    return Fact(sentence, f"\n\nWhat is the number of {name}? Answer with the number alone.", value)


def _passage(rng: random.Random) -> Fact:
    words, half = rng.sample(WORDS, PASSAGE_WORDS), PASSAGE_WORDS // 2
    begin, end = (" ".join(part) for part in (words[:half], words[half:]))
    return Fact(f"\n{begin} {end}\n", f"\n{begin}", f" {end}")


def plant(filler: str, facts: Sequence[Fact], depths: Sequence[float]) -> Haystack:
    """Puts each fact at its depth, a share of the filler from 0 to 1, at the nearest place before where no word is cut.

    Facts at the same depth follow one another as given.
    """
    order = sorted(range(len(facts)), key=lambda index: depths[index])
    pieces: list[str] = []
    starts, begin, length = [0] * len(facts), 0, 0
    for index in order:
        end = _gap_before(filler, round(depths[index] * len(filler)), begin)
        pieces += [filler[begin:end], facts[index].text]
        starts[index] = length + end - begin
        length = starts[index] + len(facts[index].text)
        begin = end
    return Haystack("".join([*pieces, filler[begin:]]), starts)


def _gap_before(text: str, at: int, least: int) -> int:
    """The index behind the last line break in [least, at) or, failing that, the last space; else `least`.

    At the end of the text, or beyond, it is the end.
    """
    if at >= len(text):
        return len(text)
    for gap in ("\n", " "):
        if (found := text.rfind(gap, least, at)) >= 0:
            return found + 1
    return least
