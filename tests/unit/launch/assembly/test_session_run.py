"""What is said of a document that was cut, and of one that was not."""

from __future__ import annotations

import pytest

from conf.schema import GenerationConfig, PromptConfig, RunConfig
from launch.assembly.session_run import note_of_cut
from launch.prompts.frame import Frame, FrameKind
from launch.prompts.prompt import Prompt


def prompt_of(num_read: int, num_document: int, *, is_counted: bool = True) -> Prompt:
    ids = [0] * (num_read + 1)
    frame = Frame(kind=FrameKind.nothing)
    return Prompt(ids=ids, num_read=num_read, num_document=num_document, is_counted=is_counted, frame=frame)


def config_of(**prompt) -> RunConfig:
    return RunConfig(prompt=PromptConfig(**prompt), generation=GenerationConfig(max_new_tokens=100))


@pytest.mark.parametrize(
    ("prompt", "max_positions", "line"),
    [
        (prompt_of(511, 54_000), 60_000, "prompt: 511 of 54,000 tokens read (prompt.max_tokens=512; null reads all)"),
        (
            prompt_of(511, 54_000),
            54_000,
            "prompt: 511 of 54,000 tokens read (prompt.max_tokens=512; 53901 reads as much as the model has positions "
            "for)",
        ),
        (
            prompt_of(511, 131_072, is_counted=False),
            1_000_000,
            "prompt: 511 of at least 131,072 tokens read (prompt.max_tokens=512; 999901 reads as much as the model has "
            "positions for)",
        ),
        (
            prompt_of(511, 54_000),
            600,
            "prompt: 511 of 54,000 tokens read (prompt.max_tokens=512; the model has positions for no more)",
        ),
    ],
)
def test_a_cut_is_one_line_that_tells_how_more_is_read(prompt, max_positions, line):
    assert note_of_cut(config_of(text="a", max_tokens=512), prompt, max_positions) == line


def test_a_document_that_was_read_whole_and_the_built_in_one_are_no_line():
    assert note_of_cut(config_of(text="a"), prompt_of(511, 511), 9000) is None
    assert note_of_cut(config_of(), prompt_of(511, 512, is_counted=False), 9000) is None
