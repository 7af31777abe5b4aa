"""What stands around a document: the checkpoint's own chat template, or a plain frame for models that have none.

A template's special tokens are special. What comes into it, the question as the document, is plain text, whatever
special tokens it has written in it: nobody who wrote a document speaks for the system, or for the user.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from conf.schema import PromptConfig, PromptTemplate
from launch.prompts.encoder import Encoder, Tokenizer, special_tokens
from launch.prompts.workloads import SYSTEM, Workload

MAX_REASON_CHARS = 120
PLACE = "text-{}-goes-here"
"""Stands for a text while a template is rendered: words that no template changes."""
DOCUMENT_PLACE = PLACE.format("of-the-document")


class FrameKind(StrEnum):
    """Origin of what stands around the document."""

    checkpoint = "checkpoint"
    """The checkpoint's chat template."""
    plain = "plain"
    """USER and ASSISTANT in plain words."""
    nothing = "nothing"
    """A document to be continued has nothing around it."""


@dataclass(frozen=True, slots=True)
class Fragment:
    """A part of a frame; of a template's own parts, special tokens written in them are special tokens."""

    text: str
    is_template: bool


@dataclass(kw_only=True, frozen=True, slots=True)
class Frame:
    """What stands before and after the document, and a line for the user about it."""

    kind: FrameKind
    head: tuple[Fragment, ...] = ()
    tail: tuple[Fragment, ...] = ()
    note: str | None = None

    def encoded_head(self, encoder: Encoder, *, special: bool) -> list[int]:
        """Tokens before the document. `special`: those written in a question count as special tokens, too.

        A template has its own beginning of sequence; to anything else the tokenizer's is added.
        """
        beginning = [] if self.kind is FrameKind.checkpoint else encoder.beginning
        return beginning + _encoded(self.head, encoder, special=special, continues=False)

    def encoded_tail(self, encoder: Encoder, *, special: bool) -> list[int]:
        """Tokens after the document; `special` as above."""
        return _encoded(self.tail, encoder, special=special, continues=True)


def _encoded(fragments: Sequence[Fragment], encoder: Encoder, *, special: bool, continues: bool) -> list[int]:
    ids: list[int] = []
    for fragment in fragments:
        is_special = special or fragment.is_template
        ids += encoder.encode(fragment.text, special=is_special, continues=continues or bool(ids))
    return ids


def make_frame(config: PromptConfig, workload: Workload, tokenizer: Tokenizer) -> Frame:
    """The frame of a workload by `config.template`; a template that cannot be used is said in the frame's note."""
    if not workload.turns:
        return Frame(kind=FrameKind.nothing)
    note = "prompt: a plain USER/ASSISTANT frame, "
    if config.template is PromptTemplate.none:
        note += "as prompt.template=none says"
    elif not tokenizer.chat_template:
        note += "for the checkpoint has no chat template"
    else:
        frame = _chat_frame(workload, tokenizer)
        if isinstance(frame, Frame):
            return frame
        note += f"for the checkpoint's chat template cannot be used ({frame})"
    head, tail = (Fragment(text, is_template=False) for text in (workload.head, workload.tail))
    return Frame(kind=FrameKind.plain, head=(head,), tail=(tail,), note=note)


def _chat_frame(workload: Workload, tokenizer: Tokenizer) -> Frame | str:
    """The checkpoint's template around the document, or why it cannot be."""
    kept_apart: list[str] = []
    specials = special_tokens(tokenizer)

    def inserted(text: str) -> str:
        """The text itself or, if a special token is written in it, what stands for it."""
        if not any(special in text for special in specials):
            return text
        kept_apart.append(text)
        return PLACE.format(len(kept_apart))

    messages = []
    before = workload.opening + DOCUMENT_PLACE + workload.closing
    for turn in workload.turns:
        messages.append({"role": "user", "content": before + inserted(turn.question)})
        messages.append({"role": "assistant", "content": turn.begun + turn.rest})
        before = ""
    messages.pop()
    places = [DOCUMENT_PLACE, *(PLACE.format(number) for number in range(1, len(kept_apart) + 1))]
    system = {"role": "system", "content": SYSTEM.strip()}
    in_parts = [message | {"content": [{"type": "text", "text": message["content"]}]} for message in messages]
    reasons = []
    for attempt, remark in (
        (messages, ""),
        ([system, *messages], f", with the system message {SYSTEM.strip()!r} that it asks for"),
        (in_parts, ""),
    ):
        try:
            rendered, begun = (_rendered(tokenizer, attempt, begins) for begins in (False, True))
        except Exception as error:  # a template is a program: it raises whatever it likes
            reasons.append(f"{type(error).__name__}: {' '.join(str(error).split())[:MAX_REASON_CHARS]}")
            continue
        if any(begun.count(place) != 1 for place in places):
            reasons.append("it does not show the user's message as it is")
            continue
        if begun == rendered:
            remark += ", which has no generation prompt: the answer follows the question at once"
        head, tail = begun.split(DOCUMENT_PLACE)
        return Frame(
            kind=FrameKind.checkpoint,
            head=(Fragment(head, is_template=True),),
            tail=_fragments(tail, places[1:], kept_apart),
            note=f"prompt: the checkpoint's chat template{remark} (prompt.template=none: a plain frame)",
        )
    return reasons[0]


def _rendered(tokenizer: Tokenizer, messages: list[dict[str, Any]], begins_answer: bool) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=begins_answer))


def _fragments(tail: str, places: list[str], texts: list[str]) -> tuple[Fragment, ...]:
    """The rendered text with the texts that were kept apart in their places."""
    fragments = []
    for place, text in zip(places, texts, strict=True):
        before, _, tail = tail.partition(place)
        fragments += [Fragment(before, is_template=True), Fragment(text, is_template=False)]
    return (*fragments, Fragment(tail, is_template=True))
