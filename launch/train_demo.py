"""Trains the embedded demo pair: python launch/train_demo.py books=FOLDER

A Llama-architecture target and a drafter about ten times smaller with the same tokenizer. The target is trained on
books and Python source, short contexts first; the drafter then learns the target's distribution (distillation) on the
context that its StreamingLLM cache will show it. Everything needed to repeat it is in conf/train_demo.yaml; an
interrupted run resumes from its last checkpoint.
"""

import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import hydra
import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy, log_softmax
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch import demo_corpus

MAX_POSITIONS = 32768
WARMUP_STEPS = 60


@dataclass(kw_only=True)
class Stage:
    """Training steps of one shape."""

    context: int
    span: int
    sequences: int
    tokens: int
    distill: bool = False
    """Learn the teacher's distribution instead of the next token alone."""

    @property
    def steps(self) -> int:
        return math.ceil(self.tokens / (self.context * self.sequences))


def build_model(shape: DictConfig, vocab_size: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.num_hidden_layers,
            num_attention_heads=shape.num_attention_heads,
            num_key_value_heads=shape.num_attention_heads,
            head_dim=shape.head_dim,
            max_position_embeddings=MAX_POSITIONS,
            rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def build_optimizers(model: LlamaForCausalLM, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def learning_rate_scale(step: int, total_steps: int, decay_fraction: float) -> float:
    """Warm-up, constant, linear decay to 3 %."""
    decay_steps = max(1, int(total_steps * decay_fraction))
    return min((step + 1) / WARMUP_STEPS, 1.0, max(0.03, (total_steps - step) / decay_steps))


def next_token_loss(logits, tokens, positions):
    """A piece's last token does not predict the first of the next piece: the text between was left out."""
    labels = tokens[:, 1:].masked_fill(positions[:, 1:] - positions[:, :-1] != 1, -100)
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())


class Trainer:
    """One training run of one model; `teacher` is for the stages that distill."""

    def __init__(self, name: str, model, settings: DictConfig, maker, work: Path, teacher=None):
        self.name, self.model, self.maker, self.teacher = name, model, maker, teacher
        self.stages = [Stage(**stage) for stage in settings.stages]
        self.settings, self.checkpoint = settings, work / f"{name}.pt"
        self.log = (work / f"{name}.jsonl").open("a")
        self.optimizers = build_optimizers(model, settings.learning_rate)
        self.total_steps, self.step, self.losses = sum(stage.steps for stage in self.stages), 0, []
        if self.checkpoint.exists():
            state = torch.load(self.checkpoint, weights_only=True)
            model.load_state_dict(state["model"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.step = state["step"]

    def run(self) -> None:
        first_step = 0
        for stage in self.stages:
            for step in range(max(first_step, self.step), first_step + stage.steps):
                self._train_step(stage, step)
                if (step + 1) % 20 == 0 or step + 1 == self.total_steps:
                    self._save(step + 1)
            first_step += stage.steps

    def _train_step(self, stage: Stage, step: int) -> None:
        began = time.monotonic()
        self.maker.rng = np.random.default_rng([1234, step])  # a resumed run sees the same samples
        samples = [self.maker.sample(stage.context, stage.span) for _ in range(stage.sequences)]
        tokens, positions = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*samples, strict=True))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = self.model(input_ids=tokens, position_ids=positions, use_cache=False).logits.float()
        criterion = self._distillation_loss if stage.distill else next_token_loss
        loss = criterion(logits, tokens, positions)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        scale = learning_rate_scale(step, self.total_steps, self.settings.decay_fraction)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.settings.learning_rate * scale
            optimizer.step()
            optimizer.zero_grad()
        self.losses.append(loss.item())
        if (step + 1) % 20 == 0:
            self._report(step + 1, stage.context, tokens.numel() / (time.monotonic() - began))

    def _report(self, step: int, context: int, tokens_per_second: float) -> None:
        record = {
            "step": step,
            "of": self.total_steps,
            "context": context,
            "loss": round(float(np.mean(self.losses[-20:])), 4),
            "tokens_per_s": round(tokens_per_second),
        }
        print(self.name, record, flush=True)
        self.log.write(json.dumps(record) + "\n")
        self.log.flush()

    def _distillation_loss(self, logits, tokens, positions):
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            taught = self.teacher(input_ids=tokens, position_ids=positions, use_cache=False).logits.float()
        return -(taught.softmax(-1) * log_softmax(logits, -1)).sum(-1).mean()

    def _save(self, step: int) -> None:
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        partial = self.checkpoint.with_suffix(".partial")
        torch.save({"model": self.model.state_dict(), "optimizers": states, "step": step}, partial)
        partial.rename(self.checkpoint)


def prepare_streams(cfg: DictConfig, work: Path) -> tuple[Tokenizer, list[np.ndarray]]:
    """The tokenizer and one token stream each for books and Python source, made once and kept in `work`."""
    kept = [work / "tokenizer.json", work / "books.npy", work / "python.npy"]
    if not all(path.exists() for path in kept):
        books = [path.read_text(encoding="utf-8") for path in sorted(Path(cfg.books).glob("*.txt"))]
        if not books:
            raise SystemExit(f"books is {cfg.books}; it must be a folder with .txt files")
        files = demo_corpus.python_files(list(cfg.held_out_packages), cfg.max_package_mib << 20)
        python = [path.read_text(encoding="utf-8", errors="ignore") for path in files]
        rng = np.random.default_rng(cfg.seed)
        some_books = [book[at : at + 300_000] for book in books for at in [int(rng.integers(len(book) // 2))]]
        some_python = [python[i] for i in rng.permutation(len(python))[:1200]]
        tokenizer = demo_corpus.train_tokenizer(some_books + some_python, cfg.tokenizer_vocab)
        tokenizer.save(str(kept[0]))
        for path, texts in zip(kept[1:], (books, python), strict=True):
            np.save(path, demo_corpus.token_stream(tokenizer, texts))
    return Tokenizer.from_file(str(kept[0])), [np.load(path) for path in kept[1:]]


def export(model: LlamaForCausalLM, tokenizer_path: Path, folder: Path) -> None:
    """Writes bf16 safetensors, config and tokenizer: a folder that from_pretrained loads."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_path),
        bos_token=demo_corpus.BOS,
        eos_token=demo_corpus.EOS,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(folder)


@hydra.main(version_base=None, config_path="../conf", config_name="train_demo")
def main(cfg: DictConfig) -> None:
    work = Path(cfg.work)
    work.mkdir(parents=True, exist_ok=True)
    (work / "config.yaml").write_text(OmegaConf.to_yaml(cfg))
    torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    tokenizer, streams = prepare_streams(cfg, work)
    print({"books_tokens": len(streams[0]), "python_tokens": len(streams[1])}, flush=True)
    maker = demo_corpus.SampleMaker(streams=streams, tokenizer=tokenizer, rng=np.random.default_rng(cfg.seed))

    target = build_model(cfg.target, cfg.tokenizer_vocab)
    Trainer("target", target, cfg.target, maker, work).run()
    target.eval()
    drafter = build_model(cfg.drafter, cfg.tokenizer_vocab)
    Trainer("drafter", drafter, cfg.drafter, maker, work, teacher=target).run()
    for name, model in (("target", target), ("drafter", drafter)):
        export(model, work / "tokenizer.json", Path(cfg.assets) / name)


if __name__ == "__main__":
    main()
