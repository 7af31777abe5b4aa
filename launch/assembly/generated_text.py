"""Generated tokens as text: how they are decoded, and what stop strings are to this tokenizer."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from conf.schema import PromptTask
from launch.assembly.task import Task
from launch.prompts.encoder import special_tokens
from orchestrator.text_stream import TextStream, TokenKinds

SPECIAL_ELSEWHERE = re.compile(
    r"<[|｜][^|｜\s]+[|｜]>|</?s>|<(bos|eos|pad|unk|start_of_turn|end_of_turn)>|\[/?(INST|TOOL_CALLS|TOOL_RESULTS)\]"
)
"""Texts that are special tokens of widely used models."""


@dataclass(kw_only=True, slots=True)
class Stops:
    """Stop strings as a tokenizer has them."""

    texts: list[str]
    """All of them: even a special token may be written out."""
    token_ids: dict[str, int]
    """Ids of those that are special tokens, which leave no trace in the text."""
    notes: dict[str, str] = field(default_factory=dict)
    """Why one may never be found, by the stop string."""

    def to_plain(self) -> list[dict[str, Any]]:
        """The stop strings for result.json."""
        return [
            {"text": text, "token_id": self.token_ids.get(text), "note": self.notes.get(text)} for text in self.texts
        ]


def make_stops(texts: list[str], tokenizer: Any) -> Stops:
    """The stop strings as this tokenizer of transformers has them."""
    specials = special_tokens(tokenizer)
    stops = Stops(texts=texts, token_ids={text: specials[text] for text in texts if text in specials})
    for text in texts:
        if text not in specials and (note := _doubt(text, tokenizer, specials)):
            stops.notes[text] = note
    return stops


def _doubt(text: str, tokenizer: Any, specials: dict[str, int]) -> str | None:
    """Why a text that is no special token may never be found."""
    if inside := [special for special in specials if special in text]:
        return f"it is searched for in the text, where the special token {inside[0]!r} leaves no trace"
    if SPECIAL_ELSEWHERE.fullmatch(text) and text not in tokenizer.get_vocab():
        return "it is no token of model.target, and found only where it is written out letter by letter"
    if missing := [character for character in dict.fromkeys(text) if not _can_be_written(character, tokenizer)]:
        return f"it may never be found: no token of model.target has {missing[0]!r} in its text"
    return None


def _can_be_written(character: str, tokenizer: Any) -> bool:
    """Whether the character survives the tokenizer, or else is in the text of some token."""
    ids = tokenizer(character, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    decode = _decoder(tokenizer)
    return character in decode(ids) or character in decode(sorted(tokenizer.get_vocab().values()))


def make_text_stream(task: Task) -> TextStream:
    """The text of a task's tokens. That of a continuation goes on where the prompt ends; an answer is a new text."""
    tokenizer = task.prepared.tokenizer
    vocabulary = tokenizer.get_vocab()
    stops = make_stops(task.config.generation.stop_strings, tokenizer)
    single_bytes = (vocabulary.get(f"<0x{byte:02X}>") for byte in range(256))
    return TextStream(
        _decoder(tokenizer),
        stops.texts,
        stop_ids=frozenset(stops.token_ids.values()),
        kinds=TokenKinds(
            hidden=frozenset(special_tokens(tokenizer).values()),
            single_bytes=frozenset(token for token in single_bytes if token is not None),
        ),
        after=task.prompt_ids if task.config.prompt.task is PromptTask.continuation else (),
    )


def _decoder(tokenizer: Any) -> partial[str]:
    return partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
