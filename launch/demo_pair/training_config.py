"""The typed configuration of launch/train_demo.py: conf/train_demo.yaml has the settings of the embedded pair."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore

from conf.schema import expand_home, require


@dataclass(kw_only=True, slots=True)
class Stage:
    """Training steps of one shape."""

    context: int
    """Tokens of a sample."""
    span: int
    """Tokens of the text that a sample is taken from; where it is more than `context`, the sample is pieces of it."""
    sequences: int
    """Samples of a step."""
    tokens: int
    """Tokens of all steps, which are as many as it takes."""
    distill: bool = False
    """Learn the teacher's distribution, which sees the whole context, instead of the next token alone."""
    sinks: int = 0
    """First tokens of the context that every window, and the narrow view, begin with."""
    window: int = 0
    """If set, the context is cut into windows, each behind the context's first `sinks` tokens, at positions from 0 on:
    what a StreamingLLM cache of `sinks` + `window` tokens shows."""
    narrow: int = 0
    """If set, the model is also shown the first `sinks` and the last `narrow` tokens alone, and learns to say the same
    there, but for tokens that the others help it to foretell. A small model's attention is spread thinly over all of a
    long context, to little use; that of large models is not (TriForce, arXiv 2404.11912, section 3)."""
    agreement: float = 1.0
    """Weight of that agreement in the loss."""
    stretch: float = 1.0
    """Every second step is for the model stretched by YaRN to so many times its positions, over as much text."""

    def __post_init__(self) -> None:
        for key in ("context", "sequences", "tokens"):
            require(getattr(self, key) >= 1, f"stages.{key}", getattr(self, key), ">= 1")
        require(self.span >= self.context, "stages.span", self.span, f"at least context={self.context}")

    def stretch_of(self, step: int) -> float:
        """The factor by which the model's positions are stretched in this step."""
        return self.stretch if step % 2 else 1.0

    @property
    def tokens_per_step(self) -> int:
        return self.context * self.sequences

    @property
    def steps(self) -> int:
        return math.ceil(self.tokens / self.tokens_per_step)


@dataclass(kw_only=True, slots=True)
class Schedule:
    """Stages of one training run, one after another, and its learning rate."""

    stages: list[Stage] = field(default_factory=list)
    learning_rate: float
    decay_fraction: float
    """Share of all tokens over which the learning rate falls, at the end."""


@dataclass(kw_only=True, slots=True)
class NewModel(Schedule):
    """A Llama model to be made, with as many kv heads as query heads, and its training run."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int


@dataclass(kw_only=True, slots=True)
class TrainDemoConfig:
    """One demo pair to train."""

    books: str | None = None
    """Folder of UTF-8 .txt files (public-domain books)."""
    held_out_packages: list[str] = field(default_factory=list)
    """Installed packages whose source is never trained on: for measuring."""
    max_package_mib: int
    """Source taken from one installed package at most, so that none dominates."""
    work: str
    """Folder for token arrays, checkpoints and logs; an interrupted run resumes here."""
    assets: str
    """Folder that the finished pair is written to."""
    threads: int
    """Threads of torch on the CPU."""
    workers: int
    """Processes that prepare samples."""
    seed: int
    tokenizer_vocab: int
    refine_pair: str | None = None
    """Folder of an earlier pair, to go on from it with `refined_target` and `refined_drafter`."""
    target: NewModel
    refined_target: Schedule
    """How the trained target goes on: it learns to make do with a narrow view, wherever the whole one does not help."""
    drafter: NewModel
    refined_drafter: Schedule
    """How an earlier pair's drafter goes on, instead of `drafter`."""

    def __post_init__(self) -> None:
        expand_home(self, "", "books", "work", "assets", "refine_pair")
        require(self.books is not None, "books", self.books, "a folder with .txt files, for example books=texts")
        require(self.threads >= 1, "threads", self.threads, ">= 1")
        require(self.workers >= 0, "workers", self.workers, ">= 0")


ConfigStore.instance().store(name="train_demo_schema", node=TrainDemoConfig)
