"""A task without models, for what is made of its tokenizer, its prompt and its keys alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from conf.schema import GenerationConfig, PromptConfig, PromptTask, RunConfig
from launch.assembly.task import Task


def task_of(
    tokenizer: Any, prompt_ids: list[int] | None = None, *, stop: list[str] | None = None, is_continuation: bool = True
) -> Task:
    task = PromptTask.continuation if is_continuation else PromptTask.summary
    return Task(
        config=RunConfig(prompt=PromptConfig(task=task), generation=GenerationConfig(stop=stop or [])),
        prepared=cast(Any, SimpleNamespace(tokenizer=tokenizer)),
        prompt_ids=prompt_ids or [],
        max_new_tokens=100,
        seed=0,
    )
