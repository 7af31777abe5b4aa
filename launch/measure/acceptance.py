"""Measures how much of a draft the target accepts, by draft cache, budget and context length:
python -m launch.measure.acceptance 'documents={NAME: FILE}' key=value ...

The target continues each document by its own samples (launch/analysis/draft_comparison.py). Each row has the expected
acceptance itself: sum(min(p, q)) under maximal coupling, and the chance of a common winner under gumbel coupling
(Daliri, Musco, Suresh 2408.07978).

`compare` holds other rules of choosing chunks against `rule`: Quest's page bound (arXiv 2406.10774), and an oracle that
knows what the tokens to come will attend to; or other ways of storing them (int8, int4) against `retrieval_dtype`.
Keys: conf/measure_acceptance.yaml and `MeasureAcceptanceConfig`. Exit codes: 0 measured; 2 a bad configuration or
input; 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hydra.core.config_store import ConfigStore

from conf.schema import (
    CacheConfig,
    ChunkDtype,
    ConfigError,
    DecodingConfig,
    Dtype,
    GenerationConfig,
    Mode,
    ModelConfig,
    RetrievalCacheConfig,
    RetrievalRuleName,
    RunConfig,
    SamplingConfig,
    StreamingCacheConfig,
    expand_home,
    require,
)
from launch.analysis.compared_rules import HEAVY_HITTER, ORACLE, PAGE_BOUND, TOP_K
from launch.analysis.draft_comparison import ComparisonConfig, DraftCache, DraftComparison
from launch.assembly.prepare import Prepared, prepare
from launch.command_line.outcome import ExitCode
from launch.command_line.overrides import compose_program
from launch.command_line.program import program
from launch.command_line.tables import markdown_table, write_atomically
from launch.prompts.encoder import Encoder
from tiers.device_tier import DeviceTier
from tiers.streaming_llm_cache import StreamingLLMCache
from workers.acceptance import KeyedRandom, distribution
from workers.models.causal_model import CausalModel
from workers.models.loading import load_model
from workers.models.shared_ids_model import on_shared_ids
from workers.models.streaming_model import StreamingModel

RETRIEVAL, CHOSEN, RECENT, DRAFTER = "retrieval", "chosen chunks alone", "recent window", "drafter"
KINDS = (RETRIEVAL, CHOSEN, RECENT, DRAFTER)
RULES = (*RetrievalRuleName, PAGE_BOUND, ORACLE, TOP_K, HEAVY_HITTER)
SINKS, SPARE_TOKENS = 4, 64
"""First tokens that the drafter's StreamingLLM cache keeps, and slots that it has for tokens in flight."""
MAX_CHARS_PER_TOKEN = 16
"""A document is read as far as so many characters for each token of the longest context."""


@dataclass(kw_only=True, slots=True)
class MeasureAcceptanceConfig:
    """Documents, and draft caches to hold against each other."""

    documents: Any = None  # OmegaConf takes no new keys into a typed dictionary
    """{name: FILE, ...}: UTF-8 texts, or folders whose .py files are read in sorted order."""
    target: str = "assets/demo/target"
    drafter: str = "assets/demo/drafter"
    contexts: list[int] = field(default_factory=lambda: [4096, 8192, 16384, 32512])
    """Prompt tokens of each document."""
    budgets: list[int] = field(default_factory=lambda: [256, 512, 1024, 2048])
    """Tokens of the retrieval cache, per layer and kv head."""
    chunk_size: int = 8
    rule: str = "attention"
    """How chunks are chosen: attention, mean_key, page_bound, oracle, top_k or heavy_hitter."""
    retrieval_dtype: ChunkDtype = ChunkDtype.auto
    """How chosen chunks are stored."""
    compare: list[str] = field(default_factory=list)
    """Rules and dtypes, each of which is held against these two."""
    newest_share: float = 0.5
    """Share of the budget that newest tokens take."""
    summary_tokens: int = 64
    """Tokens that are not chosen have a mean key and value for so many of them."""
    window: int = 508
    """Tokens of the drafter's StreamingLLM cache."""
    new_tokens: int = 128
    """Tokens by which the target goes on from each prompt."""
    rounds_of: int = 8
    """Tokens of a verification: then drafted keys and values are replaced by true ones."""
    rebuild: bool = True
    """Whether chunks are chosen anew in each verification, and not only once, for the prompt's last token."""
    temperature: float = 0.6
    top_p: float = 0.9
    dtype: Dtype = Dtype.auto
    output: str = "outputs/acceptance"
    """Folder for rows.jsonl and table.md."""

    def __post_init__(self) -> None:
        expand_home(self, "", "target", "drafter", "output")
        legal = isinstance(self.documents, dict) and bool(self.documents)
        require(legal, "documents", self.documents, "names and text files, for example documents={book: book.txt}")
        for key in ("contexts", "budgets"):
            values = getattr(self, key)
            require(bool(values) and min(values) >= 1, key, values, f"sizes >= 1, for example {key}=[1024]")
        for key in ("chunk_size", "summary_tokens", "window", "new_tokens", "rounds_of"):
            require(getattr(self, key) >= 1, key, getattr(self, key), ">= 1")
        require(self.rule in RULES, "rule", self.rule, f"one of {', '.join(RULES)}")
        for name in self.compare:
            legal = name in (*RULES, *ChunkDtype)
            require(legal, "compare", name, f"of {', '.join((*RULES, *ChunkDtype))}")
        require(0 <= self.newest_share <= 1, "newest_share", self.newest_share, "between 0 and 1")


ConfigStore.instance().store(name="measure_acceptance_schema", node=MeasureAcceptanceConfig)


def read_document(name: str, path: Path) -> str:
    """A text file, or the .py files of a folder. Raises ConfigError."""
    try:
        if path.is_dir():
            return "\n".join(file.read_text(encoding="utf-8", errors="ignore") for file in sorted(path.rglob("*.py")))
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not UTF-8 ({error.reason})"
        raise ConfigError(f"documents.{name} is {str(path)!r}: {reason}; it must be a text file or a folder") from None


def gumbel_match(p: torch.Tensor, q: torch.Tensor) -> float:
    """The chance that p and q [V] have the same winner: sum_i 1 / sum_j max(p_j / p_i, q_j / q_i)."""
    support = ((p > 0) | (q > 0)).nonzero()[:, 0]
    p, q = p[support].double(), q[support].double()
    both = (p > 0) & (q > 0)
    ratios = torch.maximum(p / p[both][:, None], q / q[both][:, None])
    return float((1 / ratios.sum(-1)).sum())


class Measurement:
    """The target, its caches and all drafts over one prompt."""

    def __init__(
        self,
        settings: MeasureAcceptanceConfig,
        prepared: Prepared,
        target: CausalModel,
        drafter: CausalModel,
        num_tokens: int,
    ):
        self._num_new, tier = settings.new_tokens, DeviceTier(prepared.device)
        self._sampling = SamplingConfig(temperature=settings.temperature, top_p=settings.top_p)
        config = ComparisonConfig(
            capacity=num_tokens + settings.new_tokens + 8,
            new_tokens=settings.new_tokens,
            chunk_size=settings.chunk_size,
            rounds_of=settings.rounds_of,
            rebuilds=settings.rebuild,
            summary_tokens=settings.summary_tokens,
            sampling=self._sampling,
        )
        drafts = [draft for budget in settings.budgets for draft in drafts_of(settings, budget)]
        self._comparison = DraftComparison(target, prepared.target, tier, drafts, config)
        assert prepared.drafter is not None and prepared.vocabulary is not None
        streaming = StreamingLLMCache(prepared.drafter.cache_shape, SINKS, settings.window, SPARE_TOKENS, tier)
        self._drafter = on_shared_ids(StreamingModel(drafter, streaming), prepared.vocabulary)
        self._sums: dict[tuple[str, int], dict[str, float]] = {}

    def run(self, prompt: list[int], seed: int) -> dict[tuple[str, int], dict[str, float]]:
        """Mean acceptance by (kind, budget) and coupling: by the target, or of the drafter by the retrieval draft."""
        random, comparison = KeyedRandom(seed), self._comparison
        self._sums = {}

        def choose(probs: torch.Tensor) -> int:
            return random.choose(probs, comparison.length, 0)

        comparison.read(prompt[:-1])
        self._drafter.prefill(prompt)
        token = choose(comparison.start(prompt[-1]))
        for round_ in comparison.rounds(token, self._num_new, choose):
            drafter_logits = [self._drafter.append([token], 1) for token in round_.tokens]
            drafter_probs = [distribution(logits, self._sampling)[0] for logits in drafter_logits]
            for draft, probs in round_.draft_probs.items():
                self._count((draft.name, draft.budget), round_.target_probs, probs)
                if draft.name == RETRIEVAL:
                    self._count((DRAFTER, draft.budget), probs, drafter_probs)
        return self._sums

    def _count(self, key: tuple[str, int], p_rows: Iterable[torch.Tensor], q_rows: Iterable[torch.Tensor]) -> None:
        entry = self._sums.setdefault(key, {"maximal": 0.0, "gumbel": 0.0})
        for p, q in zip(p_rows, q_rows, strict=True):
            entry["maximal"] += float(torch.minimum(p, q).sum()) / self._num_new
            entry["gumbel"] += gumbel_match(p, q) / self._num_new


def drafts_of(settings: MeasureAcceptanceConfig, budget: int) -> list[DraftCache]:
    """The draft caches of one budget, those of `compare` last."""
    share, rule, dtype = settings.newest_share, settings.rule, settings.retrieval_dtype
    drafts = [
        DraftCache(name=RETRIEVAL, budget=budget, rule=rule, newest_share=share, summarises=True, dtype=dtype),
        DraftCache(name=CHOSEN, budget=budget, rule=rule, newest_share=share, dtype=dtype),
        DraftCache(name=RECENT, budget=budget, rule=rule, newest_share=1.0, dtype=dtype),
    ]
    for name in settings.compare:
        is_dtype = name in list(ChunkDtype)
        drafts.append(
            DraftCache(
                name=name,
                budget=budget,
                rule=rule if is_dtype else name,
                newest_share=share,
                summarises=True,
                dtype=ChunkDtype(name) if is_dtype else dtype,
            )
        )
    return drafts


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: one line per document and context, one column per draft and budget."""
    budgets = sorted({row["budget"] for row in rows})
    kinds = [*KINDS, *dict.fromkeys(row["kind"] for row in rows if row["kind"] not in KINDS)]
    columns = [(kind, budget) for kind in kinds for budget in budgets]
    lines = []
    for document, context in sorted({(row["document"], row["context"]) for row in rows}):
        cells = {(r["kind"], r["budget"]): r for r in rows if (r["document"], r["context"]) == (document, context)}
        values = [cells[column] for column in columns]
        numbers = [f"{value['maximal']:.3f} / {value['gumbel']:.3f}" for value in values]
        lines.append([document, str(context), *numbers])
    return markdown_table(["document", "context", *(f"{kind} {budget}" for kind, budget in columns)], lines)


def measure(settings: MeasureAcceptanceConfig) -> None:
    """Writes rows and table to the output folder as they come, and prints them. Raises ConfigError."""
    output = Path(settings.output)
    config = RunConfig(
        model=ModelConfig(target=settings.target, drafter=settings.drafter, dtype=settings.dtype),
        decoding=DecodingConfig(mode=Mode.triforce),
        cache=CacheConfig(
            retrieval=RetrievalCacheConfig(chunk_size=settings.chunk_size),
            streaming=StreamingCacheConfig(window=settings.window),
        ),
        generation=GenerationConfig(max_new_tokens=settings.new_tokens),
    )
    prepared = prepare(config)
    assert prepared.drafter is not None
    num_chars = MAX_CHARS_PER_TOKEN * max(settings.contexts)
    texts = {
        name: read_document(name, Path(os.path.expanduser(path)))[:num_chars]
        for name, path in settings.documents.items()
    }
    target, drafter = (
        load_model(facts, prepared.device, self_check=False) for facts in (prepared.target, prepared.drafter)
    )
    encoder = Encoder(prepared.tokenizer)
    output.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with (output / "rows.jsonl").open("w") as file:
        for name, text in texts.items():
            ids = encoder.beginning + encoder.encode(text, continues=False)
            for context in settings.contexts:
                result = Measurement(settings, prepared, target, drafter, context).run(ids[:context], seed=context)
                for (kind, budget), entry in result.items():
                    rows.append({"document": name, "context": context, "kind": kind, "budget": budget, **entry})
                    file.write(json.dumps(rows[-1]) + "\n")
                file.flush()
                write_atomically(output / "table.md", table(rows))
                print({f"{kind} {budget}": round(entry["maximal"], 3) for (kind, budget), entry in result.items()})
    print(table(rows))


@program
def main(argv: list[str]) -> int:
    measure(compose_program("measure_acceptance", argv, "launch/measure/acceptance.py"))
    return ExitCode.done


if __name__ == "__main__":
    sys.exit(main())
