"""The training of one model of the demo pair: what each step shows it, what it loses by, and how it is resumed."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.nn.functional import log_softmax
from torch.utils.data import DataLoader, Dataset
from transformers import LlamaForCausalLM

from launch.command_line.timing import now
from launch.demo_pair.corpus import SampleMaker
from launch.demo_pair.training_config import Schedule, Stage

WARMUP_STEPS = 60
SECONDS_BETWEEN_CHECKPOINTS = 60.0
REPORTED_STEPS = 20
NOT_JUDGED = 3
"""Divisor of a narrow view: its first third is context only."""
USEFUL_NATS = 0.5
"""Nats by which a token must be foretold better for the tokens out of the narrow view to count as used."""
AGREEMENT_TEMPERATURE = 0.7
"""Temperature at which two views must agree, near that of sampling."""
UNREADY_TOKENS = 64
"""First tokens of a window, behind the sinks, that are not learned: in use, the cache is fuller than that."""

Sample: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""Tokens and positions of a step, each [sequences, context]."""


def build_optimizers(model: LlamaForCausalLM, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def learning_rate_scale(step: int, share_of_tokens_left: float, decay_fraction: float) -> float:
    """The factor of the learning rate: warm-up, constant, linear decay to 3 %."""
    return min((step + 1) / WARMUP_STEPS, 1.0, max(0.03, share_of_tokens_left / decay_fraction))


def logits_of(model: LlamaForCausalLM, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, V] behind tokens [B, T] at these positions, each token attending to all before it.

    Without a mask, transformers would take a gap between positions for the border of two packed texts, and the pieces
    of a sample would not see each other.
    """
    mask = torch.ones_like(tokens)
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
        out = model(input_ids=tokens, position_ids=positions, attention_mask=mask, use_cache=False)
    assert isinstance(out.logits, torch.Tensor)
    return out.logits.float()


@contextmanager
def stretched(model: LlamaForCausalLM, factor: float) -> Iterator[None]:
    """Within it the model has `factor` times its positions, as with `model.max_positions` of a run."""
    plain = model.model.rotary_emb
    if factor != 1:
        config = copy.deepcopy(model.config)
        num_positions = config.max_position_embeddings
        config.max_position_embeddings = round(num_positions * factor)
        rope: dict[str, Any] = dict(config.rope_parameters or {})
        config.rope_parameters = rope | {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": num_positions,
        }
        model.model.rotary_emb = type(plain)(config).to(next(model.parameters()).device)
    try:
        yield
    finally:
        model.model.rotary_emb = plain


def cut_windows(values: torch.Tensor, sinks: int, window: int) -> torch.Tensor:
    """[B, T, ...] to [B * n, sinks + window, ...]: the windows of each row in turn, behind the row's first values."""
    num_windows = (values.shape[1] - sinks) // window
    rest = values[:, sinks : sinks + num_windows * window]
    rest = rest.view(len(rest), num_windows, window, *rest.shape[2:])
    first = values[:, None, :sinks].expand(-1, num_windows, *[-1] * (values.ndim - 1))
    return torch.cat([first, rest], dim=2).flatten(0, 1)


class Steps(Dataset[Sample]):
    """The sample of each step, the same in every run."""

    def __init__(self, maker: SampleMaker, stage: Stage, first: int):
        self._maker, self._stage, self._first = maker, stage, first

    def __len__(self) -> int:
        return self._first + self._stage.steps

    def __getitem__(self, step: int) -> Sample:
        self._maker.rng = np.random.default_rng([1234, step])
        span = round(self._stage.span * self._stage.stretch_of(step))
        samples = [self._maker.sample(self._stage.context, span) for _ in range(self._stage.sequences)]
        tokens, positions = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*samples, strict=True))
        return tokens, positions


class Trainer:
    """One training run of one model, which goes on from its checkpoint in `work` if there is one.

    `teacher` is for the stages that distill, `num_workers` are processes that prepare samples (0: none but this one).
    """

    def __init__(
        self,
        name: str,
        model: LlamaForCausalLM,
        schedule: Schedule,
        maker: SampleMaker,
        work: Path,
        num_workers: int,
        teacher: LlamaForCausalLM | None = None,
        *,
        useful_nats: float = USEFUL_NATS,
        seconds_between_checkpoints: float = SECONDS_BETWEEN_CHECKPOINTS,
    ):
        self.name, self.model, self.maker, self.teacher = name, model, maker, teacher
        self.device, self.num_workers = next(model.parameters()).device, num_workers
        self.schedule, self.checkpoint, self.saved_at = schedule, work / f"{name}.pt", now()
        self._useful_nats, self._seconds_between_checkpoints = useful_nats, seconds_between_checkpoints
        self.log = (work / f"{name}.jsonl").open("a")
        self.optimizers = build_optimizers(model, schedule.learning_rate)
        self.total_steps, self.step = sum(stage.steps for stage in schedule.stages), 0
        self.losses: list[torch.Tensor] = []
        """Losses since the last report."""
        if self.checkpoint.exists():
            state = torch.load(self.checkpoint, weights_only=True, map_location=self.device)
            model.load_state_dict(state["model"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.step = state["step"]

    def run(self) -> None:
        """All steps that are left."""
        first_step = 0
        for stage in self.schedule.stages:
            steps = range(max(first_step, self.step), first_step + stage.steps)
            loader = DataLoader(
                Steps(self.maker, stage, first_step), batch_size=None, sampler=steps, num_workers=self.num_workers
            )
            began, first_step = now(), first_step + stage.steps
            for step, (tokens, positions) in zip(steps, loader, strict=True):
                self._train_step(stage, step, tokens.to(self.device), positions.to(self.device))
                if (step + 1) % REPORTED_STEPS == 0:
                    rate = stage.tokens_per_step * REPORTED_STEPS / (now() - began)
                    began = now()
                    self._report(step + 1, stage.context, rate)
                is_due = now() - self.saved_at > self._seconds_between_checkpoints
                if is_due or step + 1 == self.total_steps:
                    self._save(step + 1)

    def _train_step(self, stage: Stage, step: int, tokens: torch.Tensor, positions: torch.Tensor) -> None:
        with stretched(self.model, stage.stretch_of(step)):
            loss = self._loss(stage, tokens, positions)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        scale = learning_rate_scale(step, self._share_of_tokens_left(step), self.schedule.decay_fraction)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.schedule.learning_rate * scale
            optimizer.step()
            optimizer.zero_grad()
        self.losses.append(loss.detach())

    def _share_of_tokens_left(self, step: int) -> float:
        total, left, steps_left = 0, 0, self.total_steps - step
        for stage in reversed(self.schedule.stages):
            total += stage.steps * stage.tokens_per_step
            left += min(stage.steps, steps_left) * stage.tokens_per_step
            steps_left = max(0, steps_left - stage.steps)
        return left / total

    def _loss(self, stage: Stage, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Cross-entropy with the next tokens, or with the teacher's distribution of them."""
        # A piece's last token does not predict the first of the next piece: the text between was left out.
        counted = positions[:, 1:] - positions[:, :-1] == 1
        wanted, tokens, positions = tokens[:, 1:, None], tokens[:, :-1], positions[:, :-1]
        if stage.distill:
            assert self.teacher is not None
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

    def _disagreement(
        self,
        stage: Stage,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        wide_logits: torch.Tensor,
        wanted: torch.Tensor,
    ) -> torch.Tensor:
        """Mean divergence between what the model says of the last tokens with and without all others in view.

        Tokens and positions [B, T], logits of the wide view [B, T, V], the tokens to be foretold [B, T, 1]. Gradients
        go through both views: what the wide one adds without foretelling better is what is to be unlearned.
        """
        length, num_judged = tokens.shape[1], stage.narrow - stage.narrow // NOT_JUDGED
        view = torch.cat([torch.arange(stage.sinks), torch.arange(length - stage.narrow, length)])
        narrow_logits = logits_of(self.model, tokens[:, view], positions[:, view])[:, -num_judged:]
        wide_logits, wanted = wide_logits[:, -num_judged:], wanted[:, -num_judged:]
        with torch.no_grad():
            of_wanted = [log_softmax(each, -1).gather(-1, wanted)[..., 0] for each in (wide_logits, narrow_logits)]
            judged = of_wanted[0] - of_wanted[1] < self._useful_nats
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
        self.saved_at = now()
