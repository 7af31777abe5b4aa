"""A text with facts as a model reads it: tokens, where each fact is among them, and what asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from conf.schema import ConfigError
from launch.prompts.encoder import Encoder
from launch.prompts.needle import Fact, NeedleForm, plant

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPARE_TOKENS = 8
"""Tokens set aside for each fact: the whole text may be tokenized a little differently than its parts."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question for a fact: tokens read behind the text, and where the fact is in it."""

    tokens: list[int]
    answer: list[int]
    """Tokens that are right behind `tokens`."""
    fact_begin: int
    fact_end: int
    """The fact is the text's tokens [fact_begin, fact_end)."""
    depth: float
    """Share of the text's tokens before the fact."""


@dataclass(frozen=True, slots=True)
class NeedlePrompt:
    """The text's tokens, and a question for each fact, in the order of the facts."""

    form: NeedleForm
    tokens: list[int]
    questions: list[Question]


def make_needle_prompt(
    tokenizer: PreTrainedTokenizerBase,
    filler: str,
    form: NeedleForm,
    facts: Sequence[Fact],
    depths: Sequence[float],
    max_tokens: int,
) -> NeedlePrompt:
    """Plants facts in so much of the filler's beginning that all, with question and answer, has `max_tokens` at most.

    `tokenizer` is a fast tokenizer of transformers. Raises ConfigError where the facts alone are too long.
    """
    around = [_around(tokenizer, form, fact) for fact in facts]
    asked = [_encode(tokenizer, question + fact.answer) for (_, question), fact in zip(around, facts, strict=True)]
    # A template has its own beginning of sequence.
    before = _encode(tokenizer, around[0][0])[0] or Encoder(tokenizer).beginning
    num_taken = sum(len(_encode(tokenizer, fact.text)[0]) + SPARE_TOKENS for fact in facts)
    num_taken += max(len(ids) for ids, _ in asked) + len(before)
    if max_tokens < 2 * num_taken:
        raise ConfigError(
            f"context is {max_tokens}; it must be at least {2 * num_taken}, of which {len(facts)} facts of form {form} "
            "take half (fewer needle.depths take less; needle.repeats=0 leaves the task out)"
        )
    _, ends = _encode(tokenizer, filler)
    num_kept = max_tokens - num_taken
    haystack = plant(filler[: ends[num_kept - 1]] if len(ends) > num_kept else filler, facts, depths)
    # Special tokens written in the text are plain text.
    text, ends = _encode(tokenizer, haystack.text, split_special_tokens=True)
    tokens, questions = before + text, []
    for fact, start, (_, question), (ids, id_ends) in zip(facts, haystack.starts, around, asked, strict=True):
        begin = len(before) + _num_ending_by(ends, start)
        end = len(before) + _num_ending_by(ends, start + len(fact.text) - 1) + 1
        num_question = _num_ending_by(id_ends, len(question))
        questions.append(Question(ids[:num_question], ids[num_question:], begin, end, begin / len(tokens)))
    return NeedlePrompt(form, tokens, questions)


def _around(tokenizer: PreTrainedTokenizerBase, form: NeedleForm, fact: Fact) -> tuple[str, str]:
    """The words before the text, and those between it and the answer: a chat template's around a question."""
    if form != NeedleForm.question or not tokenizer.chat_template:
        return "", fact.question
    place = "the-text-goes-here"
    messages = [{"role": "user", "content": place + fact.question}]
    # A template without thinking leaves the word alone.
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert isinstance(prompt, str)
    before, _, after = prompt.partition(place)
    return before, after


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, **options: Any) -> tuple[list[int], list[int]]:
    """Token ids, none that the tokenizer adds, and at which character each ends."""
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False, **options)
    return encoding["input_ids"], [end for _, end in encoding["offset_mapping"]]


def _num_ending_by(ends: list[int], at: int) -> int:
    """Number of a text's tokens that end at or before a character: the index of the one it is in."""
    return sum(end <= at for end in ends)
