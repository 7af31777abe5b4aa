"""The typed configuration of launch/analyze.py, and what is checked of it before torch is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore

from conf.model_source import model_source
from conf.schema import (
    STANDARD_INPUT,
    ConfigError,
    ModelConfig,
    PlacementConfig,
    PromptConfig,
    SamplingConfig,
    expand_home,
    require,
)
from launch.assembly.start_checks import check_folder
from launch.prompts.document import check_document
from launch.prompts.needle import NeedleForm

STANDARD_LIBRARY = "standard library"
"""Name of the document that is read where none is given."""


@dataclass(kw_only=True, slots=True)
class NeedleConfig:
    """Facts hidden in the first document, as many at once as there are depths."""

    depths: list[float] = field(default_factory=lambda: [0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    """Shares of the text before each fact."""
    repeats: int = 2
    """Texts of each form, with other facts; 0 leaves the task out."""
    forms: list[NeedleForm] = field(default_factory=list)
    """See launch/prompts/needle.py; empty: question for a model with a chat template, else assignment and passage."""

    def __post_init__(self) -> None:
        legal = bool(self.depths) and all(0 <= depth <= 1 for depth in self.depths)
        require(legal, "needle.depths", self.depths, "shares between 0 and 1, for example [0,0.5,1]")
        require(self.repeats >= 0, "needle.repeats", self.repeats, ">= 0, for example 2")


@dataclass(kw_only=True, slots=True)
class AnalyzeConfig:
    """Measurements, and the model and documents that they are made on."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Only the target takes part."""
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    documents: Any = None  # OmegaConf takes no new keys into a typed dictionary
    """{name: FILE, ...}, UTF-8 texts; null: the source of Python's standard library."""
    context: int = 8192
    """Prompt tokens of each document; a text with facts and a question has at most as many."""
    new_tokens: int = 256
    """Tokens by which the target goes on from each document."""
    budgets: list[int] = field(default_factory=lambda: [256, 512, 1024, 2048])
    """Tokens of a draft cache, per layer and kv head."""
    shown_budget: int = 512
    """One of the budgets: what is shown by layer, distance and depth."""
    chunk_size: int = 8
    """Tokens that are chosen together."""
    newest_share: float = 0.5
    """Share of the budget that the newest tokens get; the recent window has nothing else but the first chunk."""
    rounds_of: int = 8
    """Tokens of a verification, after which each cache chooses anew."""
    needle: NeedleConfig = field(default_factory=NeedleConfig)
    output: str = "outputs/analysis"
    """Folder of tables and figures."""

    def __post_init__(self) -> None:
        expand_home(self, "", "output")
        legal = (
            self.documents is None
            or isinstance(self.documents, dict)
            and all(isinstance(path, str) and path != STANDARD_INPUT for path in self.documents.values())
        )
        require(legal, "documents", self.documents, "null, or names and text files, for example {book: book.txt}")
        for key in ("context", "new_tokens", "chunk_size", "rounds_of"):
            require(getattr(self, key) >= 1, key, getattr(self, key), ">= 1")
        legal = bool(self.budgets) and all(
            budget >= self.chunk_size and budget % self.chunk_size == 0 for budget in self.budgets
        )
        require(legal, "budgets", self.budgets, f"multiples of chunk_size={self.chunk_size}, for example [512,1024]")
        require(self.shown_budget in self.budgets, "shown_budget", self.shown_budget, f"one of budgets={self.budgets}")
        require(0 <= self.newest_share <= 1, "newest_share", self.newest_share, "between 0 and 1")

    @property
    def named_documents(self) -> dict[str, PromptConfig]:
        """The prompt of each document, by its name."""
        documents: dict[str, str | None] = self.documents or {STANDARD_LIBRARY: None}
        prompts = {}
        for name, path in documents.items():
            with said_of_document(name):
                prompts[name] = PromptConfig(path=path, max_tokens=self.context)
        return prompts


ConfigStore.instance().store(name="analyze_schema", node=AnalyzeConfig)


def check_start(config: AnalyzeConfig) -> None:
    """Raises ConfigError for what can be found wrong without torch: folder, model, documents."""
    check_folder("output", config.output, "outputs/analysis")
    model_source("model.target", config.model.target)
    for name, document in config.named_documents.items():
        with said_of_document(name):
            check_document(document)


@contextmanager
def said_of_document(name: str) -> Iterator[None]:
    """Within it, what is wrong with a prompt is said of the document that it is."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(str(error).replace("prompt.path", f"documents.{name}")) from None
