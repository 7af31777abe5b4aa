"""Trains the embedded demo pair: python launch/train_demo.py books=FOLDER

A Llama-architecture target and a drafter more than ten times smaller with the same tokenizer. The target is trained on
books and Python source, short contexts first; then it is refined to give its attention to what it makes use of (see
`Stage.narrow`). The drafter learns next tokens, then the target's distribution (distillation), both on the tokens that
its StreamingLLM cache will show it. Everything needed to repeat it is in conf/train_demo.yaml; an interrupted run
resumes from its last checkpoint. Uses the GPU if there is one.
"""

import copy
import functools
import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import hydra
import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from tokenizers import Tokenizer
from torch.nn.functional import log_softmax
from torch.utils.data import DataLoader, Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from launch.demo_pair import corpus as demo_corpus

MAX_POSITIONS = 32768
WARMUP_STEPS = 60
SECONDS_BETWEEN_CHECKPOINTS = 60
NOT_JUDGED = 3  # of a narrow view the first third is context only
USEFUL_NATS = 0.5  # by which a token must be foretold better for the tokens out of the narrow view to count as used
AGREEMENT_TEMPERATURE = 0.7  # near that of sampling: it is there that two views must agree
UNREADY_TOKENS = 64  # of a window, behind the sinks, that are not learned: in use, the cache is fuller than that


@dataclass(kw_only=True)
class Stage:
    """Training steps of one shape."""

    context: int
    span: int
    sequences: int
    tokens: int
    distill: bool = False
    """Learn the teacher's distribution, which sees the whole context, instead of the next token alone."""
    sinks: int = 0
    window: int = 0
    """If set, the context is cut into windows, each behind the context's first `sinks` tokens, at positions from 0 on:
    what a StreamingLLM cache of `sinks` + `window` tokens shows."""
    narrow: int = 0
    """If set, the model is also shown the first `sinks` and the last `narrow` tokens alone, and learns to say the same
    there, but for tokens that the others help it to foretell. A small model's attention is spread thinly over all of a
    long context, to little use; that of large models is not (TriForce, arXiv 2404.11912, section 3)."""
    agreement: float = 1.0
    """How much of the loss that is."""
    stretch: float = 1.0
    """Every second step is for the model stretched by YaRN to so many times its positions, over as much text."""

    def stretch_of(self, step: int) -> float:
        return self.stretch if step % 2 else 1.0

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


def learning_rate_scale(step: int, share_of_tokens_left: float, decay_fraction: float) -> float:
    """Warm-up, constant, linear decay to 3 %."""
    return min((step + 1) / WARMUP_STEPS, 1.0, max(0.03, share_of_tokens_left / decay_fraction))


def logits_of(model: LlamaForCausalLM, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """[B, T, V], each token attending to all before it.

    Without a mask, transformers would take a gap between positions for the border of two packed texts, and the pieces
    of a sample would not see each other.
    """
    mask = torch.ones_like(tokens)
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
        out = model(input_ids=tokens, position_ids=positions, attention_mask=mask, use_cache=False)
    return out.logits.float()


@contextmanager
def stretched(model: LlamaForCausalLM, factor: float) -> Iterator[None]:
    """Within it the model has `factor` times its positions, as with `model.max_positions` of a run."""
    plain = model.model.rotary_emb
    if factor != 1:
        config = copy.deepcopy(model.config)
        config.max_position_embeddings = round(MAX_POSITIONS * factor)
        config.rope_parameters |= {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": MAX_POSITIONS,
        }
        model.model.rotary_emb = type(plain)(config).to(next(model.parameters()).device)
    try:
        yield
    finally:
        model.model.rotary_emb = plain


def cut_windows(values: torch.Tensor, sinks: int, window: int) -> torch.Tensor:
    """[B, T, ...] to [B * n, sinks + window, ...]: the windows of each row in turn, behind the row's first values."""
    num_windows = (values.shape[1] - sinks) // window
    rest = values[:, sinks : sinks + num_windows * window].unflatten(1, (num_windows, window))
    first = values[:, None, :sinks].expand(-1, num_windows, *[-1] * (values.ndim - 1))
    return torch.cat([first, rest], dim=2).flatten(0, 1)


class Steps(Dataset):
    """The tokens and positions [sequences, context] of each step, the same in every run."""

    def __init__(self, maker: demo_corpus.SampleMaker, stage: Stage, first: int):
        self._maker, self._stage, self._first = maker, stage, first

    def __len__(self) -> int:
        return self._first + self._stage.steps

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        self._maker.rng = np.random.default_rng([1234, step])
        span = round(self._stage.span * self._stage.stretch_of(step))
        samples = [self._maker.sample(self._stage.context, span) for _ in range(self._stage.sequences)]
        tokens, positions = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*samples, strict=True))
        return tokens, positions


class Trainer:
    """One training run of one model; `teacher` is for the stages that distill."""

    def __init__(self, name: str, model, settings: DictConfig, maker, work: Path, num_workers: int, teacher=None):
        self.name, self.model, self.maker, self.teacher = name, model, maker, teacher
        self.device, self.num_workers = next(model.parameters()).device, num_workers
        self.stages = [Stage(**stage) for stage in settings.stages]
        self.settings, self.checkpoint, self.saved_at = settings, work / f"{name}.pt", time.monotonic()
        self.log = (work / f"{name}.jsonl").open("a")
        self.optimizers = build_optimizers(model, settings.learning_rate)
        self.total_steps, self.step, self.losses = sum(stage.steps for stage in self.stages), 0, []
        if self.checkpoint.exists():
            state = torch.load(self.checkpoint, weights_only=True, map_location=self.device)
            model.load_state_dict(state["model"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.step = state["step"]

    def run(self) -> None:
        first_step = 0
        for stage in self.stages:
            steps = range(max(first_step, self.step), first_step + stage.steps)
            loader = DataLoader(
                Steps(self.maker, stage, first_step), batch_size=None, sampler=steps, num_workers=self.num_workers
            )
            began, first_step = time.monotonic(), first_step + stage.steps
            for step, (tokens, positions) in zip(steps, loader, strict=True):
                self._train_step(stage, step, tokens.to(self.device), positions.to(self.device))
                if (step + 1) % 20 == 0:
                    rate = stage.context * stage.sequences * 20 / (time.monotonic() - began)
                    began = time.monotonic()
                    self._report(step + 1, stage.context, rate)
                is_due = time.monotonic() - self.saved_at > SECONDS_BETWEEN_CHECKPOINTS
                if is_due or step + 1 == self.total_steps:
                    self._save(step + 1)

    def _train_step(self, stage: Stage, step: int, tokens: torch.Tensor, positions: torch.Tensor) -> None:
        with stretched(self.model, stage.stretch_of(step)):
            loss = self._loss(stage, tokens, positions)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        scale = learning_rate_scale(step, self._share_of_tokens_left(step), self.settings.decay_fraction)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.settings.learning_rate * scale
            optimizer.step()
            optimizer.zero_grad()
        self.losses.append(loss.detach())

    def _share_of_tokens_left(self, step: int) -> float:
        total, left, steps_left = 0, 0, self.total_steps - step
        for stage in reversed(self.stages):
            tokens_per_step = stage.context * stage.sequences
            total += stage.steps * tokens_per_step
            left += min(stage.steps, steps_left) * tokens_per_step
            steps_left = max(0, steps_left - stage.steps)
        return left / total

    def _loss(self, stage: Stage, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Cross-entropy with the next tokens, or with the teacher's distribution of them."""
        # A piece's last token does not predict the first of the next piece: the text between was left out.
        counted = positions[:, 1:] - positions[:, :-1] == 1
        wanted, tokens, positions = tokens[:, 1:, None], tokens[:, :-1], positions[:, :-1]
        if stage.distill:
            with torch.no_grad():
                wanted = logits_of(self.teacher, tokens, positions).softmax(-1)
        if stage.window:
            cut = functools.partial(cut_windows, sinks=stage.sinks, window=stage.window)
            tokens, wanted, counted = cut(tokens), cut(wanted), cut(counted)
            counted[:, : stage.sinks + UNREADY_TOKENS] = False
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        logits = logits_of(self.model, tokens, positions)
        log_probs, kept = log_softmax(logits[counted], -1), wanted[counted]
        products = kept * log_probs if stage.distill else log_probs.gather(-1, kept)
        loss = -products.sum(-1).mean()
        if stage.narrow:
            loss = loss + stage.agreement * self._disagreement(stage, tokens, positions, logits, wanted)
        return loss

    def _disagreement(self, stage: Stage, tokens, positions, wide_logits, wanted) -> torch.Tensor:
        """Mean divergence between what the model says of the last tokens with and without all others in view.

        Gradients go through both: what the wide view adds without foretelling better is what is to be unlearned.
        """
        length, num_judged = tokens.shape[1], stage.narrow - stage.narrow // NOT_JUDGED
        view = torch.cat([torch.arange(stage.sinks), torch.arange(length - stage.narrow, length)])
        narrow_logits = logits_of(self.model, tokens[:, view], positions[:, view])[:, -num_judged:]
        wide_logits, wanted = wide_logits[:, -num_judged:], wanted[:, -num_judged:]
        with torch.no_grad():
            of_wanted = [log_softmax(each, -1).gather(-1, wanted)[..., 0] for each in (wide_logits, narrow_logits)]
            judged = of_wanted[0] - of_wanted[1] < USEFUL_NATS
        wide, narrow = (log_softmax(each[judged] / AGREEMENT_TEMPERATURE, -1) for each in (wide_logits, narrow_logits))
        return (wide.exp() * (wide - narrow)).sum() / judged.sum().clamp_min(1)

    def _report(self, step: int, context: int, tokens_per_second: float) -> None:
        record = {
            "step": step,
            "of": self.total_steps,
            "context": context,
            "loss": round(float(torch.stack(self.losses).mean()), 4),
            "tokens_per_s": round(tokens_per_second),
        }
        self.losses.clear()
        print(self.name, record, flush=True)
        self.log.write(json.dumps(record) + "\n")
        self.log.flush()

    def _save(self, step: int) -> None:
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        partial = self.checkpoint.with_suffix(".partial")
        torch.save({"model": self.model.state_dict(), "optimizers": states, "step": step}, partial)
        partial.rename(self.checkpoint)
        self.saved_at = time.monotonic()


def prepare_streams(cfg: DictConfig, work: Path) -> tuple[Tokenizer, list[np.ndarray]]:
    """The tokenizer and one token stream each for books and Python source, made once and kept in `work`."""
    kept = [work / "tokenizer.json", work / "books.npy", work / "python.npy"]
    if cfg.refine_pair is not None and not kept[0].exists():
        shutil.copy(Path(cfg.refine_pair) / "target" / "tokenizer.json", kept[0])
    if not all(path.exists() for path in kept):
        books = [path.read_text(encoding="utf-8") for path in sorted(Path(cfg.books).glob("*.txt"))]
        if not books:
            raise SystemExit(f"books is {cfg.books}; it must be a folder with .txt files")
        files = demo_corpus.python_files(list(cfg.held_out_packages), cfg.max_package_mib << 20)
        python = [path.read_text(encoding="utf-8", errors="ignore") for path in files]
        rng = np.random.default_rng(cfg.seed)
        if not kept[0].exists():
            some_books = [book[at : at + 300_000] for book in books for at in [int(rng.integers(len(book) // 2))]]
            some_python = [python[i] for i in rng.permutation(len(python))[:1200]]
            demo_corpus.train_tokenizer(some_books + some_python, cfg.tokenizer_vocab).save(str(kept[0]))
        tokenizer = Tokenizer.from_file(str(kept[0]))
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

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if cfg.refine_pair is None:
        target, drafter = (build_model(cfg[name], cfg.tokenizer_vocab) for name in ("target", "drafter"))
        Trainer("target", target.to(device), cfg.target, maker, work, cfg.workers).run()
    else:
        folders = (Path(cfg.refine_pair) / name for name in ("target", "drafter"))
        target, drafter = (LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in folders)
    Trainer("refined_target", target.to(device), cfg.refined_target, maker, work, cfg.workers).run()
    target.eval()
    drafter_settings = cfg.drafter if cfg.refine_pair is None else cfg.refined_drafter
    Trainer("drafter", drafter.to(device), drafter_settings, maker, work, cfg.workers, teacher=target).run()
    for name, model in (("target", target), ("drafter", drafter)):
        export(model, work / "tokenizer.json", Path(cfg.assets) / name)


if __name__ == "__main__":
    main()
