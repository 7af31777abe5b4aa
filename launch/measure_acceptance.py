"""Measures how much of a draft the target accepts, by draft cache, budget and context length.

The target continues each document by its own samples. For every token, the distributions of all drafts are held
against the target's on the same text, so that each row has the expected acceptance itself, not the count of a few
lucky draws: sum(min(p, q)) under maximal coupling, and the chance of a common winner under gumbel coupling (Daliri,
Musco, Suresh 2408.07978). One prompt is read once for all budgets.

`compare` holds other rules of choosing chunks against `rule`: Quest's page bound (arXiv 2406.10774), and an oracle that
knows what the tokens to come will attend to; or other ways of storing them (int8, int4) against `retrieval_dtype`.
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
    ChunkDtype,
    ChunkRule,
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
from tiers.attention_mass import DECAY, AttentionMass
from tiers.chunk_index import ChunkIndex, best_chunks
from tiers.context_summary import ContextSummary
from tiers.device_tier import DeviceTier
from tiers.full_cache import DeviceLayer, FullCache
from tiers.quantised_retrieval_cache import make_retrieval_cache
from tiers.retrieval_selection import RetrievalSelection
from tiers.streaming_llm_cache import StreamingLLMCache
from workers.acceptance import KeyedRandom, distribution
from workers.model import RetrievalModel, StreamingModel, TargetModel
from workers.pretrained import load_model

RETRIEVAL, CHOSEN, RECENT, DRAFTER = "retrieval", "chosen chunks alone", "recent window", "drafter"
KINDS = (RETRIEVAL, CHOSEN, RECENT, DRAFTER)
PAGE_BOUND, ORACLE = "page_bound", "oracle"


class PageBound(ChunkIndex):
    """Quest's rule (arXiv 2406.10774, section 3.3): of a chunk, the highest score that a key within the bounds of its
    keys could have."""

    def catch_up(self, cache: FullCache) -> None:
        super().catch_up(cache)
        num_tokens = cache.length // self.chunk_size * self.chunk_size
        chunks = [
            cache.read(layer, 0, num_tokens)[0].unflatten(1, (-1, self.chunk_size)) for layer in range(self._num_layers)
        ]
        self._bounds = [(k.amin(2).float(), k.amax(2).float()) for k in chunks]

    def select(self, layer, q, num_chunks, num_wanted, num_newest, oldest=0):
        """See ChunkRule."""
        low, high = (bound[:, :num_chunks].transpose(1, 2) for bound in self._bounds[layer])
        q = q.flatten(1, 2).float()
        scores = (q.clamp_min(0) @ high + q.clamp_max(0) @ low) * q.shape[-1] ** -0.5
        return best_chunks(torch.softmax(scores, -1).mean(1), num_wanted, num_newest, oldest // self.chunk_size)


class WatchedMass(AttentionMass):
    """Tells the oracle what the target attends to, unless it reads tokens again."""

    def __init__(self, *args, oracle: AttentionMass, **kwargs):
        self.oracle, self.is_paused = oracle, False
        super().__init__(*args, **kwargs)

    def add(self, layer: int, mass: torch.Tensor) -> None:
        if not self.is_paused:
            super().add(layer, mass)
            self.oracle.add(layer, mass)


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
        size, decay = (shape, capacity, cfg.chunk_size, tier), DECAY ** (1 / cfg.rounds_of)
        # Here tokens come one by one: an older token counts for as much less as it does in whole rounds.
        self._oracle = AttentionMass(*size, decay=1.0)
        self._mass = WatchedMass(*size, oracle=self._oracle, decay=decay)
        rules = {
            ChunkRule.attention: self._mass,
            ChunkRule.mean_key: ChunkIndex(*size),
            PAGE_BOUND: PageBound(*size),
            ORACLE: self._oracle,
        }
        summary = ContextSummary(shape, capacity, cfg.summary_tokens, tier)
        num_groups = capacity // cfg.summary_tokens
        self._selections, self._drafts = {}, {}
        for budget in cfg.budgets:
            for name, share, of_rest, num_summaries in (
                (RETRIEVAL, cfg.newest_share, summary, num_groups),
                (CHOSEN, cfg.newest_share, None, 0),
                (RECENT, 1.0, None, 0),
                *((name, cfg.newest_share, summary, num_groups) for name in cfg.compare),
            ):
                rule = name if name in rules else cfg.rule
                dtype = ChunkDtype(name if name in list(ChunkDtype) else cfg.retrieval_dtype)
                key = (name, int(budget))
                selection = RetrievalSelection(cache, rules[rule], facts.windows, budget, share, of_rest)
                self._selections[key] = selection
                sizes = (shape, budget, cfg.new_tokens + 64, 8, tier, num_summaries)
                draft_cache = make_retrieval_cache(dtype.bits, *sizes)
                self._drafts[key] = RetrievalModel(target_weights, draft_cache)
        observing = RetrievalSelection(cache, self._mass, facts.windows, 0, 0.0, summary)
        self._target = TargetModel(
            target_weights,
            cache,
            piece_tokens=PIECE_TOKENS,
            hidden_tier=tier,
            selection=observing,
        )
        streaming = StreamingLLMCache(prepared.drafter.cache_shape, 4, cfg.window, 64, tier)
        self._drafter = StreamingModel(drafter_weights, streaming)

    def run(self, prompt: list[int], seed: int) -> dict[tuple[str, int], dict[str, float]]:
        """Mean acceptance of each draft, by (kind, budget); the drafter's is against the retrieval draft."""
        random, self._sums = KeyedRandom(seed), {}
        self._target.prefill(prompt[:-1])
        self._drafter.prefill(prompt[:-1])
        self._queries: dict[int, list[torch.Tensor]] = {}
        token = self._first_token(random, prompt[-1])
        tokens, targets = [], []
        self._oracle.reset()
        for step in range(self._cfg.new_tokens):
            tokens.append(token)
            targets.append(self._probs(self._target.append([token], 1)[0]))
            for layer, q in self._target.queries.items():
                self._queries.setdefault(layer, []).append(q)
            drafts = {
                key: self._probs(model.append([token], 1)[0]) for key, model in self._drafts.items() if key[0] != ORACLE
            }
            drafter_probs = self._probs(self._drafter.append([token], 1)[0])
            for key, probs in drafts.items():
                self._count(key, targets[-1], probs)
                if key[0] == RETRIEVAL:
                    self._count((DRAFTER, key[1]), probs, drafter_probs)
            token = random.choose(targets[-1], self._target.length, 0)
            if len(tokens) == self._cfg.rounds_of or step == self._cfg.new_tokens - 1:
                self._ask_oracle(tokens, targets)
                self._refresh()
                tokens, targets = [], []
        return self._sums

    def _count(self, key: tuple[str, int], p: torch.Tensor, q: torch.Tensor) -> None:
        entry = self._sums.setdefault(key, {"maximal": 0.0, "gumbel": 0.0})
        entry["maximal"] += float(torch.minimum(p, q).sum()) / self._cfg.new_tokens
        entry["gumbel"] += gumbel_match(p, q) / self._cfg.new_tokens

    def _ask_oracle(self, tokens: list[int], targets: list[torch.Tensor]) -> None:
        """What a draft would have made of `tokens` whose chunks were chosen by their own attention."""
        keys = [key for key in self._drafts if key[0] == ORACLE]
        if keys:
            self._target.truncate(self._target.length - len(tokens))
            for key in keys:
                self._drafts[key].load(self._selections[key].rebuild(dict(self._target.queries)))
                logits = self._drafts[key].append(tokens, len(tokens))
                for target, row in zip(targets, logits, strict=True):
                    self._count(key, target, self._probs(row))
            self._mass.is_paused = True
            self._target.append(tokens, 1)
            self._mass.is_paused = False
        self._oracle.reset()

    def _refresh(self) -> None:
        """As after a verification: true keys and values, or chunks chosen anew for the queries of these tokens."""
        queries = {layer: torch.cat(parts, dim=2) for layer, parts in self._queries.items()}
        self._queries.clear()
        for key, selection in self._selections.items():
            if key[0] == ORACLE:
                continue
            update = selection.rebuild(queries) if self._cfg.rebuild else selection.follow(queries)
            self._drafts[key].load(update)

    def _first_token(self, random: KeyedRandom, token: int) -> int:
        """Reads the prompt's last token, with whose queries the draft caches are built; samples the next one."""
        probs = self._probs(self._target.append([token], 1)[0])
        self._drafter.append([token], 1)
        queries = dict(self._target.queries)
        for key, selection in self._selections.items():
            self._drafts[key].load(selection.rebuild(queries))
        return random.choose(probs, self._target.length, 0)

    def _probs(self, logits: torch.Tensor) -> torch.Tensor:
        return distribution(logits[None], self._sampling)[0]


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
