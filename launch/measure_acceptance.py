"""Measures how much of a draft the target accepts, by draft cache, budget and context length.

The target continues each document by its own samples. For every token, the distributions of all drafts are held
against the target's on the same text, so that each row has the expected acceptance itself, not the count of a few
lucky draws: sum(min(p, q)) under maximal coupling, and the chance of a common winner under gumbel coupling (Daliri,
Musco, Suresh 2408.07978). One prompt is read once for all budgets.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conf.schema import (
    CacheConfig,
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
from launch.engine import prepare
from launch.sizing import PIECE_TOKENS
from tiers.chunk_index import ChunkIndex
from tiers.context_summary import ContextSummary
from tiers.device_tier import DeviceTier
from tiers.full_cache import DeviceLayer, FullCache
from tiers.retrieval_cache import RetrievalCache
from tiers.retrieval_selection import RetrievalSelection
from tiers.streaming_llm_cache import StreamingLLMCache
from workers.acceptance import KeyedRandom, distribution
from workers.model import RetrievalModel, StreamingModel, TargetModel
from workers.pretrained import load_model

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
        self._cfg, facts, tier = cfg, prepared.target, DeviceTier(prepared.device)
        self._sampling = SamplingConfig(temperature=cfg.temperature, top_p=cfg.top_p)
        shape, capacity = facts.cache_shape, num_tokens + cfg.new_tokens + 8
        target_weights, drafter_weights = models
        cache = FullCache([DeviceLayer(shape, capacity, tier) for _ in facts.windows], facts.windows, None)
        index = ChunkIndex(shape, capacity, cfg.chunk_size, tier)
        summary = ContextSummary(shape, capacity, cfg.summary_tokens, tier)
        num_groups = capacity // cfg.summary_tokens
        self._selections, self._drafts = {}, {}
        for budget in cfg.budgets:
            for name, share, of_rest, num_summaries in (
                (RETRIEVAL, cfg.newest_share, summary, num_groups),
                (CHOSEN, cfg.newest_share, None, 0),
                (RECENT, 1.0, None, 0),
            ):
                key = (name, int(budget))
                self._selections[key] = RetrievalSelection(cache, index, facts.windows, budget, share, of_rest)
                draft_cache = RetrievalCache(shape, budget, cfg.new_tokens + 64, 8, tier, num_summaries)
                self._drafts[key] = RetrievalModel(target_weights, draft_cache)
        self._target = TargetModel(
            target_weights,
            cache,
            piece_tokens=PIECE_TOKENS,
            hidden_tier=tier,
            selection=next(iter(self._selections.values())),
        )
        streaming = StreamingLLMCache(prepared.drafter.cache_shape, 4, cfg.window, 64, tier)
        self._drafter = StreamingModel(drafter_weights, streaming)

    def run(self, prompt: list[int], seed: int) -> dict[tuple[str, int], dict[str, float]]:
        """Mean acceptance of each draft, by (kind, budget); the drafter's is against the retrieval draft."""
        random, sums = KeyedRandom(seed), {}
        self._target.prefill(prompt[:-1])
        self._drafter.prefill(prompt[:-1])
        self._queries: dict[int, list[torch.Tensor]] = {}
        token = self._first_token(random, prompt[-1])
        for step in range(self._cfg.new_tokens):
            target_probs = self._probs(self._target.append([token], 1))
            for layer, q in self._target.queries.items():
                self._queries.setdefault(layer, []).append(q)
            drafts = {key: self._probs(model.append([token], 1)) for key, model in self._drafts.items()}
            drafter_probs = self._probs(self._drafter.append([token], 1))
            pairs = {key: (target_probs, probs) for key, probs in drafts.items()}
            pairs |= {(DRAFTER, key[1]): (p, drafter_probs) for key, p in drafts.items() if key[0] == RETRIEVAL}
            for key, (p, q) in pairs.items():
                entry = sums.setdefault(key, {"maximal": 0.0, "gumbel": 0.0})
                entry["maximal"] += float(torch.minimum(p, q).sum()) / self._cfg.new_tokens
                entry["gumbel"] += gumbel_match(p, q) / self._cfg.new_tokens
            token = random.choose(target_probs, self._target.length, 0)
            if (step + 1) % self._cfg.rounds_of == 0:
                self._refresh()
        return sums

    def _refresh(self) -> None:
        """As after a verification: true keys and values, or chunks chosen anew for the queries of these tokens."""
        queries = {layer: torch.cat(parts, dim=2) for layer, parts in self._queries.items()}
        self._queries.clear()
        for key, selection in self._selections.items():
            update = selection.rebuild(queries) if self._cfg.rebuild else selection.follow()
            self._drafts[key].load(update)

    def _first_token(self, random: KeyedRandom, token: int) -> int:
        """Reads the prompt's last token, with whose queries the draft caches are built; samples the next one."""
        probs = self._probs(self._target.append([token], 1))
        self._drafter.append([token], 1)
        queries = dict(self._target.queries)
        for key, selection in self._selections.items():
            self._drafts[key].load(selection.rebuild(queries))
        return random.choose(probs, self._target.length, 0)

    def _probs(self, logits: torch.Tensor) -> torch.Tensor:
        return distribution(logits, self._sampling)[0]


def table(rows: list[dict]) -> str:
    """Markdown: one line per document and context, one column per draft and budget."""
    budgets = sorted({row["budget"] for row in rows})
    heads = [f"{kind} {budget}" for kind in KINDS for budget in budgets]
    lines = ["| document | context | " + " | ".join(heads) + " |", "|---|---|" + "---|" * len(heads)]
    for document, context in sorted({(row["document"], row["context"]) for row in rows}):
        cells = {(r["kind"], r["budget"]): r for r in rows if (r["document"], r["context"]) == (document, context)}
        values = [cells[kind, budget] for kind in KINDS for budget in budgets]
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
