"""The prompt as token ids: a document (launch.prompts.document), cut to what is wanted, with what is asked of it
(launch.prompts.workloads) in a frame around it.

Text is read and tokenized only as far as tokens are wanted, so a prompt cut from a huge file costs what it needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from conf.schema import ConfigError, PromptConfig
from launch.prompts.document import Text, can_be_read_again, is_built_in, source_of, text_pieces
from launch.prompts.encoder import Encoder, Tokenizer
from launch.prompts.frame import Frame, make_frame
from launch.prompts.published_texts import read_item
from launch.prompts.workloads import Workload, make_workload

# A fact is hidden at the end of a line, if there is one so near.
LINE_TOKENS = 64
COUNTED_TOKENS = 1 << 17
"""Of a document that is cut so many tokens are counted, which takes less than a second."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Prompt:
    """A prompt's tokens, and what became of the document."""

    ids: list[int]
    num_read: int
    """Tokens of the document that are in the prompt."""
    num_document: int
    """Tokens of the document, or as many as were counted."""
    is_counted: bool
    """Whether `num_document` is exact; else there are at least so many."""
    frame: Frame

    @property
    def is_cut(self) -> bool:
        """Whether the document goes on beyond what is in the prompt."""
        return self.num_document > self.num_read or not self.is_counted

    def to_plain(self) -> dict[str, Any]:
        """What became of the document, for result.json."""
        return {
            "tokens_read": self.num_read,
            "document_tokens": self.num_document,
            "document_tokens_are_exact": self.is_counted,
            "is_cut": self.is_cut,
            "frame": str(self.frame.kind),
        }


def read_prompt(config: PromptConfig, tokenizer: Tokenizer, at_most: int | None = None) -> list[int]:
    """The tokens of `make_prompt`, for whoever asks no more of a prompt; what was cut is not counted."""
    return make_prompt(config, tokenizer, at_most, counts=False).ids


def make_prompt(
    config: PromptConfig, tokenizer: Tokenizer, at_most: int | None = None, *, counts: bool = True
) -> Prompt:
    """A prompt of the first `config.max_tokens` tokens, never more than `at_most`; raises ConfigError.

    A document is cut to that; what is asked of it never is. `counts`: how much was cut is found out.
    """
    limits = [limit for limit in (config.max_tokens, at_most) if limit is not None]
    limit = min(limits, default=None)
    encoder, special = Encoder(tokenizer), config.special_tokens
    workload = read_workload(config)
    frame = make_frame(config, workload, tokenizer)
    head, tail = frame.encoded_head(encoder, special=special), frame.encoded_tail(encoder, special=special)
    facts = [(depth, encoder.encode(fact.text)) for depth, fact in zip(workload.depths, workload.facts, strict=True)]
    num_beside = len(tail) + sum(len(ids) for _, ids in facts)
    if workload.turns and limit is not None and limit <= len(head) + num_beside:
        num_taken = len(head) + num_beside
        raise ConfigError(
            f"prompt.max_tokens is {config.max_tokens}; it must be at least {num_taken + 1}: prompt.task={config.task} "
            f"takes {num_taken} tokens beside the document"
        )
    # One more than there is room for tells whether there are more.
    count = None if limit is None else limit - num_beside + 1
    document = encoder.encode_first(Text(text_pieces(config)), count, special=special, continues=bool(workload.turns))
    if special and not workload.turns and document[: len(head)] == head:
        head = []  # the file has its own beginning of sequence
    if not document:
        raise ConfigError(f"{source_of(config)} has no tokens; it must have at least one")
    room = None if limit is None else max(0, limit - len(head) - num_beside)
    num_document, read = len(document), document[:room]
    is_counted = num_document == len(read)
    if counts and not is_counted and not is_built_in(config) and can_be_read_again(config):
        num_document, is_counted = _count(config, encoder, num_document)
    return Prompt(
        ids=(head + _with_facts(read, facts, tokenizer) + tail)[:limit],
        num_read=len(read),
        num_document=num_document,
        is_counted=is_counted,
        frame=frame,
    )


def _count(config: PromptConfig, encoder: Encoder, at_least: int) -> tuple[int, bool]:
    """The document's number of tokens, which are `at_least` so many, and whether that is all there are."""
    most = max(COUNTED_TOKENS, at_least)
    try:
        ids = encoder.encode_first(Text(text_pieces(config)), most + 1, special=config.special_tokens)
    except ConfigError:  # what cannot be read lies behind what is
        return at_least, False
    return max(at_least, min(len(ids), most)), len(ids) <= most


def read_workload(config: PromptConfig) -> Workload:
    """The task around the document; raises ConfigError where it belongs to a data set that cannot be read."""
    if config.dataset is None:
        return make_workload(config)
    item = read_item(config.dataset, config.path, config.item)
    return make_workload(config, item.question, item.answers)


def _with_facts(document: list[int], facts: list[tuple[float, list[int]]], tokenizer: Tokenizer) -> list[int]:
    """The document with each fact's tokens at its depth, or at the end of a line shortly before."""
    parts: list[int] = []
    end = len(document)
    for depth, ids in sorted(facts, key=lambda fact: fact[0], reverse=True):
        position = min(end, round(depth * len(document)))
        for near in range(position, max(0, position - LINE_TOKENS), -1):
            if "\n" in tokenizer.decode([document[near - 1]]):
                position = near
                break
        parts = [*ids, *document[position:end], *parts]
        end = position
    return document[:end] + parts
