"""Keys `model`, `prompt`, `decoding`, `sampling`, `generation`: what is generated, and how. Standard library only."""

import math
from dataclasses import dataclass, field

from conf.values import (
    AUTO,
    GREEDY_BELOW_TEMPERATURE,
    MAX_AUTO_GAMMA1,
    MAX_AUTO_GAMMA2,
    MAX_GAMMA1,
    MAX_GAMMA2,
    MAX_STOP_STRINGS,
    MAX_TURNS,
    Coupling,
    CudaGraphs,
    Dataset,
    Dtype,
    Mode,
    Overlap,
    PromptTask,
    PromptTemplate,
    expand_home,
    require,
    unescaped,
)


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The pair of models."""

    target: str = "assets/demo/target"
    """Local folder or hub id of the target model; a relative folder is looked for here, then in the project. In this
    and every other path ~ and ~user at the beginning are home directories."""
    drafter: str = "assets/demo/drafter"
    """Local folder or hub id of the drafter, or `lookup` (n-gram lookup in the context), or `none`.

    Its tokenizer must have the target's texts for at least 90 % of the ids; it never drafts the others."""
    dtype: Dtype = Dtype.auto
    """Number format of weights, activations and caches of both models."""
    max_positions: int | None = None
    """Positions (tokens) of the target, if it is to have more than it was trained on: YaRN (arXiv 2309.00071) stretches
    its rotary embedding, as Qwen's model cards advise; null: as its configuration says."""
    self_check: bool = True
    """Compare our attention with transformers' own on a few tokens after loading; refuse the model on a mismatch."""

    def __post_init__(self) -> None:
        expand_home(self, "model.", "target", "drafter")
        require(bool(self.target), "model.target", self.target, "a local folder or a hub id")
        legal = self.max_positions is None or self.max_positions >= 1
        require(legal, "model.max_positions", self.max_positions, ">= 1, for example 131072, or null")
        require(bool(self.drafter), "model.drafter", self.drafter, "a local folder, a hub id, lookup or none")


@dataclass(kw_only=True, slots=True)
class PromptConfig:
    """The document that is read, and the task that is set about it.

    It is a file, a text, an item of a data set, or (none of them) the source of Python's standard library.
    """

    path: str | None = None
    """A UTF-8 text file, any system's line ends in it being newlines, or -, which is standard input (of rank 0); with
    `dataset`, the folder that has it."""
    text: str | None = None
    """The document itself."""
    max_tokens: int | None = 8192
    """The document is cut so that the prompt has so many tokens; null reads all of it."""
    dataset: Dataset | None = None
    """pg19: books; narrativeqa: stories with questions. From the folder `path`, else from the hub."""
    item: int = 0
    """Number of the book, or of the question, in the data set, from 0."""
    task: PromptTask = PromptTask.continuation
    """continuation: go on writing; summary: tell the story; question: answer `question`; needle: find facts that are
    hidden in the document, and whose answer is known."""
    question: str | None = None
    """Question asked after the document with task=question; null: that of narrativeqa's item."""
    template: PromptTemplate = PromptTemplate.auto
    """Frame of summary, question and needle: auto: the checkpoint's chat template, if it has one; none: plain words."""
    special_tokens: bool = False
    """Special tokens that are written in the document or the question become special tokens, for a file that has a
    template written in it; else they are plain text."""
    depth: float = 0.5
    """Place of the needle asked for last: 0 is the document's beginning, 1 its end."""
    turns: int = 1
    """Questions of task=needle over one document, each about a needle of its own; all but the last are answered."""

    def __post_init__(self) -> None:
        expand_home(self, "prompt.", "path")
        both = self.path is not None and self.text is not None
        require(not both, "prompt.text", self.text, "unset where prompt.path is set")
        legal = self.max_tokens is None or self.max_tokens >= 1
        require(legal, "prompt.max_tokens", self.max_tokens, ">= 1, or null for the whole text")
        require(self.text is None or self.text != "", "prompt.text", self.text, "at least one character")
        both = self.text is not None and self.dataset is not None
        require(not both, "prompt.text", self.text, "unset where prompt.dataset is set")
        require(self.item >= 0, "prompt.item", self.item, ">= 0, for example 0")
        require(self.item == 0 or self.dataset is not None, "prompt.item", self.item, "0 where prompt.dataset is null")
        require(0 <= self.depth <= 1, "prompt.depth", self.depth, "between 0 (the beginning) and 1 (the end)")
        legal = 1 <= self.turns <= MAX_TURNS
        require(legal, "prompt.turns", self.turns, f"between 1 and {MAX_TURNS}")
        legal = self.turns == 1 or self.task is PromptTask.needle
        require(legal, "prompt.turns", self.turns, "1 unless prompt.task=needle")
        if self.task is PromptTask.question:
            legal = bool(self.question) or (self.question is None and self.dataset is Dataset.narrativeqa)
            require(legal, "prompt.question", self.question, "a question, unless prompt.dataset=narrativeqa has one")
        else:
            require(self.question is None, "prompt.question", self.question, "null unless prompt.task=question")


@dataclass(kw_only=True, slots=True)
class DecodingConfig:
    """The speculation hierarchy."""

    mode: Mode = Mode.triforce
    """triforce: all levels; retrieval: no drafter; streaming: drafter straight to the target; autoregressive: none."""
    gamma1: int | str = 2
    """Tokens drafted per inner step; 0 leaves the drafter out; auto: chosen before each round from measured costs and
    running acceptance. The tokens of a seed then depend on the machine's speed, unless sampling.coupling is gumbel."""
    gamma2: int | str = 8
    """Tokens proposed per verification, at least; 0 is autoregressive decoding; auto: chosen likewise, 0 among them."""
    overlap: Overlap = Overlap.off
    """Drafting while the target verifies: off: nothing; ahead: what follows if the whole block is accepted;
    outcomes: what follows each likely outcome, best with sampling.coupling=gumbel."""
    cuda_graphs: CudaGraphs = CudaGraphs.auto
    """Record forward passes of drafter and retrieval draft as CUDA graphs, which saves launching their kernels one by
    one. auto is off: they have not been run on a card yet (docs/gpu.md)."""

    def __post_init__(self) -> None:
        for key, value, limit in (("gamma1", self.gamma1, MAX_GAMMA1), ("gamma2", self.gamma2, MAX_GAMMA2)):
            legal = value == AUTO if isinstance(value, str) else 0 <= value <= limit
            require(legal, f"decoding.{key}", value, f"an integer between 0 and {limit}, or auto")

    @property
    def most_gamma1(self) -> int:
        """Tokens drafted per inner step, at most: what gamma1 may be in any round."""
        return MAX_AUTO_GAMMA1 if self.gamma1 == AUTO else int(self.gamma1)

    @property
    def most_gamma2(self) -> int:
        """Tokens proposed per verification, at most, in any round."""
        return MAX_AUTO_GAMMA2 if self.gamma2 == AUTO else int(self.gamma2)


@dataclass(kw_only=True, slots=True)
class SamplingConfig:
    """Sampling of the target; every level samples alike."""

    temperature: float = 0.6
    """0 is greedy."""
    top_p: float = 0.9
    """Keep the smallest set of tokens with at least this probability; 1 is off."""
    top_k: int = 0
    """Keep this many most probable tokens; 0 is off."""
    seed: int | None = 0
    """Random numbers are keyed by it; null draws one and reports it."""
    coupling: Coupling = Coupling.maximal
    """maximal: rejection sampling with residual; gumbel: tokens that do not depend on the drafter."""
    block_verification: bool = False
    """Judge a block as a whole at the last level (arXiv 2403.10444); with `maximal` only."""

    def __post_init__(self) -> None:
        temperature, top_p = self.temperature, self.top_p
        legal = math.isfinite(temperature) and 0 <= temperature <= 100
        require(legal, "sampling.temperature", temperature, "between 0 (greedy) and 100")
        require(math.isfinite(top_p) and 0 < top_p <= 1, "sampling.top_p", top_p, "above 0 and at most 1 (off)")
        require(self.top_k >= 0, "sampling.top_k", self.top_k, ">= 0 (0 is off)")
        legal = self.seed is None or 0 <= self.seed < 2**64
        require(legal, "sampling.seed", self.seed, "between 0 and 2**64 - 1, or null")
        legal = not (self.block_verification and self.coupling == Coupling.gumbel)
        require(legal, "sampling.block_verification", True, "false with sampling.coupling=gumbel")

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.temperature < GREEDY_BELOW_TEMPERATURE


@dataclass(kw_only=True, slots=True)
class GenerationConfig:
    """Length of what is generated."""

    max_new_tokens: int = 256
    """Tokens; fewer if the end of sequence, a stop string or the model's last position comes first."""
    stop: list[str] = field(default_factory=list)
    r"""Generation ends before the first of these strings; the text is cut there. In them \n, \t, \r, \\, \", \' and
    \uXXXX are newline, tab, carriage return, backslash, quotes and a character by its number; any other backslash is
    one. A string that is a special token of the target, such as <|im_end|>, ends generation before that token."""
    ignore_eos: bool = False
    """Go on past the end-of-sequence token, for measuring; what is drawn does not change."""
    use_model_rules: bool = True
    """Apply what the target's generation_config.json says of the choice of tokens (penalties, bans, least lengths,
    cut-offs) as transformers' `generate` does, but for temperature, top_k and top_p, which `sampling` decides."""

    def __post_init__(self) -> None:
        require(self.max_new_tokens >= 1, "generation.max_new_tokens", self.max_new_tokens, ">= 1, for example 256")
        require(all(self.stop_strings), "generation.stop", self.stop, "a list of non-empty strings")
        legal = len(self.stop) <= MAX_STOP_STRINGS
        require(legal, "generation.stop", f"{len(self.stop)} strings", f"at most {MAX_STOP_STRINGS}")

    @property
    def stop_strings(self) -> list[str]:
        """`stop` with its escapes read; the key itself keeps what was typed. Raises ConfigError."""
        return [unescaped("generation.stop", text) for text in self.stop]
