"""Measures how much of a draft the target accepts, by draft cache, budget and context length.

The target continues each document by its own samples (launch/analysis/draft_comparison.py). Each row has the expected
acceptance itself: sum(min(p, q)) under maximal coupling, and the chance of a common winner under gumbel coupling
(Daliri, Musco, Suresh 2408.07978).

`compare` holds other rules of choosing chunks against `rule`: Quest's page bound (arXiv 2406.10774), and an oracle that
knows what the tokens to come will attend to; or other ways of storing them (int8, int4) against `retrieval_dtype`.
"""

from __future__ import annotations

import json
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig

from conf.schema import (
    CacheConfig,
    ChunkDtype,
    DecodingConfig,
    Dtype,
    GenerationConfig,
    Mode,
    ModelConfig,
    RetrievalCacheConfig,
    RunConfig,
    SamplingConfig,
    StreamingCacheConfig,
)
from launch.analysis.draft_comparison import ComparisonConfig, DraftCache, DraftComparison
from launch.assembly.prepare import prepare
from tiers.device_tier import DeviceTier
from tiers.streaming_llm_cache import StreamingLLMCache
from workers.acceptance import KeyedRandom, distribution
from workers.models.loading import load_model
from workers.models.streaming_model import StreamingModel

RETRIEVAL, CHOSEN, RECENT, DRAFTER = "retrieval", "chosen chunks alone", "recent window", "drafter"
KINDS = (RETRIEVAL, CHOSEN, RECENT, DRAFTER)


def read_document(path: Path) -> str:
    """A text file, or the .py files of a folder."""
    if path.is_dir():
        return "\n".join(file.read_text(encoding="utf-8", errors="ignore") for file in sorted(path.rglob("*.py")))
    return path.read_text(encoding="utf-8")


def gumbel_match(p: torch.Tensor, q: torch.Tensor) -> float:
    """The chance that p and q [V] have the same winner: sum_i 1 / sum_j max(p_j / p_i, q_j / q_i)."""
    support = ((p > 0) | (q > 0)).nonzero()[:, 0]
    p, q = p[support].double(), q[support].double()
    both = (p > 0) & (q > 0)
    ratios = torch.maximum(p / p[both][:, None], q / q[both][:, None])
    return float((1 / ratios.sum(-1)).sum())


class Measurement:
    """The target, its caches and all drafts over one prompt."""

    def __init__(self, cfg: DictConfig, prepared, models, num_tokens: int):
        self._cfg, tier = cfg, DeviceTier(prepared.device)
        self._sampling = SamplingConfig(temperature=cfg.temperature, top_p=cfg.top_p)
        target_weights, drafter_weights = models
        config = ComparisonConfig(
            capacity=num_tokens + cfg.new_tokens + 8,
            new_tokens=cfg.new_tokens,
            chunk_size=cfg.chunk_size,
            rounds_of=cfg.rounds_of,
            rebuilds=cfg.rebuild,
            summary_tokens=cfg.summary_tokens,
            sampling=self._sampling,
        )
        drafts = [draft for budget in cfg.budgets for draft in drafts_of(cfg, budget)]
        self._comparison = DraftComparison(target_weights, prepared.target, tier, drafts, config)
        streaming = StreamingLLMCache(prepared.drafter.cache_shape, 4, cfg.window, 64, tier)
        self._drafter = StreamingModel(drafter_weights, streaming)

    def run(self, prompt: list[int], seed: int) -> dict[tuple[str, int], dict[str, float]]:
        """Mean acceptance of each draft, by (kind, budget); the drafter's is against the retrieval draft."""
        random, comparison, self._sums = KeyedRandom(seed), self._comparison, {}

        def choose(probs: torch.Tensor) -> int:
            return random.choose(probs, comparison.length, 0)

        comparison.read(prompt[:-1])
        self._drafter.prefill(prompt)
        token = choose(comparison.start(prompt[-1]))
        for round_ in comparison.rounds(token, self._cfg.new_tokens, choose):
            drafter_logits = [self._drafter.append([token], 1) for token in round_.tokens]
            drafter_probs = [distribution(logits, self._sampling)[0] for logits in drafter_logits]
            for draft, probs in round_.draft_probs.items():
                self._count((draft.name, draft.budget), round_.target_probs, probs)
                if draft.name == RETRIEVAL:
                    self._count((DRAFTER, draft.budget), probs, drafter_probs)
        return self._sums

    def _count(self, key: tuple[str, int], p_rows: list[torch.Tensor], q_rows: list[torch.Tensor]) -> None:
        entry = self._sums.setdefault(key, {"maximal": 0.0, "gumbel": 0.0})
        for p, q in zip(p_rows, q_rows, strict=True):
            entry["maximal"] += float(torch.minimum(p, q).sum()) / self._cfg.new_tokens
            entry["gumbel"] += gumbel_match(p, q) / self._cfg.new_tokens


def drafts_of(cfg: DictConfig, budget: int) -> list[DraftCache]:
    """Those of one budget."""
    share, rule, dtype = cfg.newest_share, cfg.rule, ChunkDtype(cfg.retrieval_dtype)
    drafts = [
        DraftCache(name=RETRIEVAL, budget=budget, rule=rule, newest_share=share, summarises=True, dtype=dtype),
        DraftCache(name=CHOSEN, budget=budget, rule=rule, newest_share=share, dtype=dtype),
        DraftCache(name=RECENT, budget=budget, rule=rule, newest_share=1.0, dtype=dtype),
    ]
    for name in cfg.compare:
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


def table(rows: list[dict]) -> str:
    """Markdown: one line per document and context, one column per draft and budget."""
    budgets = sorted({row["budget"] for row in rows})
    kinds = [*KINDS, *dict.fromkeys(row["kind"] for row in rows if row["kind"] not in KINDS)]
    heads = [f"{kind} {budget}" for kind in kinds for budget in budgets]
    lines = ["| document | context | " + " | ".join(heads) + " |", "|---|---|" + "---|" * len(heads)]
    for document, context in sorted({(row["document"], row["context"]) for row in rows}):
        cells = {(r["kind"], r["budget"]): r for r in rows if (r["document"], r["context"]) == (document, context)}
        values = [cells[kind, budget] for kind in kinds for budget in budgets]
        numbers = [f"{value['maximal']:.3f} / {value['gumbel']:.3f}" for value in values]
        lines.append(f"| {document} | {context} | " + " | ".join(numbers) + " |")
    return "\n".join(lines) + "\n"


@hydra.main(version_base=None, config_path="../conf", config_name="measure_acceptance")
def main(cfg: DictConfig) -> None:
    output = Path(cfg.output)
    output.mkdir(parents=True, exist_ok=True)
    config = RunConfig(
        model=ModelConfig(target=cfg.target, drafter=cfg.drafter, dtype=Dtype(cfg.dtype)),
        decoding=DecodingConfig(mode=Mode.triforce),
        cache=CacheConfig(
            retrieval=RetrievalCacheConfig(chunk_size=cfg.chunk_size),
            streaming=StreamingCacheConfig(window=cfg.window),
        ),
        generation=GenerationConfig(max_new_tokens=cfg.new_tokens),
    )
    prepared = prepare(config)
    models = [load_model(facts, prepared.device, self_check=False) for facts in (prepared.target, prepared.drafter)]
    rows = []
    with (output / "rows.jsonl").open("w") as file:
        for name, path in cfg.documents.items():
            ids = prepared.tokenizer(read_document(Path(path))[: 16 * max(cfg.contexts)])["input_ids"]
            for context in cfg.contexts:
                result = Measurement(cfg, prepared, models, context).run(ids[:context], seed=context)
                for (kind, budget), entry in result.items():
                    rows.append({"document": name, "context": context, "kind": kind, "budget": budget, **entry})
                    file.write(json.dumps(rows[-1]) + "\n")
                file.flush()
                (output / "table.md").write_text(table(rows))
                print({f"{kind} {budget}": round(entry["maximal"], 3) for (kind, budget), entry in result.items()})
    print(table(rows))


if __name__ == "__main__":
    main()
