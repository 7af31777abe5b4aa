"""Training of the demo pair: what a sample shows the model, what counts in the loss, and resuming."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from launch.demo_pair.corpus import SampleMaker, train_tokenizer
from launch.demo_pair.training import (
    UNREADY_TOKENS,
    Steps,
    Trainer,
    cut_windows,
    learning_rate_scale,
    logits_of,
    stretched,
)
from launch.demo_pair.training_config import Schedule, Stage

VOCAB = 300


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
        )
    )


@pytest.fixture(scope="module")
def maker():
    text = "".join(f"def function_{i}(x):\n    return x + {i * 37 % 101}\n" for i in range(2000))
    tokenizer = train_tokenizer([text], VOCAB)
    stream = np.array(tokenizer.encode(text).ids, dtype=np.uint16)
    return SampleMaker(streams=[stream], tokenizer=tokenizer, rng=np.random.default_rng(0))


def test_pieces_of_a_sample_see_each_other():
    model = tiny_llama()
    tokens = torch.arange(1, 41)[None]
    positions = torch.cat([torch.arange(20), torch.arange(500, 520)])[None]
    changed = tokens.clone()
    changed[0, 3] = 200
    difference = (logits_of(model, tokens, positions) - logits_of(model, changed, positions))[0].abs().amax(-1)
    assert (difference[:3] == 0).all() and (difference[20:] > 0).all()


def test_positions_rise_from_zero_in_pieces_within_the_span(maker):
    for seed in range(20):
        maker.rng = np.random.default_rng(seed)
        tokens, positions = maker.sample(256, 1024)
        steps = np.diff(positions)
        assert len(tokens) == len(positions) == 256 and positions[0] == 0 and positions[-1] < 1024
        assert (steps >= 1).all() and 1 <= (steps > 1).sum() <= 7


def test_windows_begin_with_the_sinks():
    values = torch.arange(2 * 23).view(2, 23)
    assert cut_windows(values, sinks=3, window=5).tolist() == [
        [*range(first, first + 3), *range(first + 3 + 5 * index, first + 8 + 5 * index)]
        for first in (0, 23)
        for index in range(4)
    ]
    pairs = values[..., None].expand(-1, -1, 2)
    assert torch.equal(cut_windows(pairs, 3, 5)[..., 1], cut_windows(values, 3, 5))


def trainer(work, maker, stages, teacher=None, **settings) -> Trainer:
    schedule = Schedule(stages=[Stage(**stage) for stage in stages], learning_rate=1e-2, decay_fraction=0.5)
    return Trainer("model", tiny_llama(), schedule, maker, work, num_workers=0, teacher=teacher, **settings)


PLAIN = {"context": 128, "span": 128, "sequences": 2, "tokens": 128 * 2 * 6}
WINDOWS = {"context": 2 + 128 + 1, "span": 131, "sequences": 1, "tokens": 131 * 4, "sinks": 2, "window": 128}


def test_a_token_before_a_gap_does_not_count(tmp_path, maker):
    one = trainer(tmp_path, maker, [PLAIN])
    tokens = torch.randint(0, VOCAB, (1, 21), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(10), torch.arange(90, 101)])[None]
    stage = Stage(context=21, span=200, sequences=1, tokens=21)
    log_probs = logits_of(one.model, tokens[:, :-1], positions[:, :-1]).log_softmax(-1)
    each = -log_probs.gather(-1, tokens[:, 1:, None])[0, :, 0]
    wanted = (each.sum() - each[9]) / 19
    assert one._loss(stage, tokens, positions).item() == pytest.approx(wanted.item(), rel=1e-4)


def test_distillation_asks_for_the_teachers_distribution(tmp_path, maker):
    """The teacher's own loss is its entropy, and any other model's is more."""
    teacher = tiny_llama(seed=1)
    stage = Stage(**WINDOWS | {"distill": True})
    maker.rng = np.random.default_rng(0)
    tokens, positions = (torch.from_numpy(array)[None] for array in maker.sample(stage.context, stage.span))
    one = trainer(tmp_path, maker, [WINDOWS], teacher)
    with torch.no_grad():
        probs = logits_of(teacher, tokens[:, :-1], positions[:, :-1])[0, 2 + UNREADY_TOKENS :].softmax(-1)
        entropy = -(probs * probs.log()).sum(-1).mean()
        others = one._loss(stage, tokens, positions)
        one.model = teacher
        assert one._loss(stage, tokens, positions).item() == pytest.approx(entropy.item(), rel=1e-3)
    assert others > entropy + 0.01


def test_training_lowers_the_loss(tmp_path, maker):
    one = trainer(tmp_path, maker, [PLAIN | {"tokens": 128 * 2 * 60}])
    tokens, positions = Steps(maker, one.schedule.stages[0], 0)[10_000]
    before = one._loss(one.schedule.stages[0], tokens, positions).item()
    one.run()
    assert one._loss(one.schedule.stages[0], tokens, positions).item() < before - 1


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path, maker, monkeypatch):
    stages = [PLAIN, WINDOWS]
    for folder in ("whole", "cut"):
        (tmp_path / folder).mkdir()
    whole = trainer(tmp_path / "whole", maker, stages, seconds_between_checkpoints=0)
    whole.run()

    cut, step_of = trainer(tmp_path / "cut", maker, stages, seconds_between_checkpoints=0), Trainer._train_step

    def interrupted(self, stage, step, *arrays):
        if step == 7:
            raise KeyboardInterrupt
        step_of(self, stage, step, *arrays)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_train_step", interrupted)
        cut.run()
    resumed = trainer(tmp_path / "cut", maker, stages, seconds_between_checkpoints=0)
    assert resumed.step == 7
    resumed.run()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_the_learning_rate_falls_with_the_tokens_left(tmp_path, maker):
    one = trainer(tmp_path, maker, [PLAIN, WINDOWS])
    shares = [one._share_of_tokens_left(step) for step in range(one.total_steps + 1)]
    total = 6 * 256 + 4 * 131
    assert shares[0] == 1 and shares[-1] == 0
    assert shares[3] == pytest.approx(1 - 3 * 256 / total) and shares[8] == pytest.approx(2 * 131 / total)
    assert [learning_rate_scale(1000, share, 0.5) for share in (1, 0.5, 0.25, 0)] == [1, 1, 0.5, 0.03]


NARROW = {"context": 65, "span": 65, "sequences": 1, "tokens": 65, "sinks": 4}


def disagreement(one: Trainer, narrow: int) -> torch.Tensor:
    stage = Stage(**NARROW, narrow=narrow)
    tokens = torch.randint(0, VOCAB, (1, 65), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(65)[None]
    wide = logits_of(one.model, tokens[:, :-1], positions[:, :-1])
    return one._disagreement(stage, tokens[:, :-1], positions[:, :-1], wide, tokens[:, 1:, None])


def test_a_view_that_lacks_nothing_agrees_and_one_that_lacks_much_does_not(tmp_path, maker):
    one = trainer(tmp_path, maker, [PLAIN])
    with torch.no_grad():
        assert disagreement(one, 60).item() == pytest.approx(0, abs=3e-5)
        assert disagreement(one, 24).item() > 1e-4


def test_gradients_of_a_disagreement_reach_the_wide_view_too(tmp_path, maker):
    one = trainer(tmp_path, maker, [PLAIN])
    tokens = torch.randint(0, VOCAB, (1, 64), generator=torch.Generator().manual_seed(1))
    wide = logits_of(one.model, tokens, torch.arange(64)[None]).detach().requires_grad_()
    one._disagreement(Stage(**NARROW, narrow=24), tokens, torch.arange(64)[None], wide, tokens[..., None]).backward()
    assert wide.grad[:, :40].abs().sum() == 0 and wide.grad[:, -16:].abs().sum() > 0


def test_what_the_wide_view_foretells_better_is_not_to_be_unlearned(tmp_path, maker):
    one = trainer(tmp_path, maker, [PLAIN], useful_nats=-100.0)  # as if everything were
    assert disagreement(one, 24).item() == 0


def test_every_second_step_is_stretched_over_as_much_more_text(maker):
    stage = Stage(context=256, span=512, sequences=1, tokens=256, stretch=4)
    last = [int(Steps(maker, stage, 0)[step][1].max()) for step in range(20)]
    assert max(last[::2]) < 512 < max(last[1::2]) < 2048


def test_a_stretched_model_is_that_of_a_run_with_more_positions():
    model, tokens = tiny_llama(), torch.arange(1, 30)[None]
    plain = logits_of(model, tokens, torch.arange(29)[None])
    config = LlamaConfig.from_dict(model.config.to_dict())
    config.rope_parameters = config.rope_parameters | {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048,
    }  # fmt: skip
    config.max_position_embeddings = 8192
    other = LlamaForCausalLM(config)
    other.load_state_dict(model.state_dict())
    with stretched(model, 4):
        inside = logits_of(model, tokens, torch.arange(29)[None])
    assert torch.equal(inside, logits_of(other, tokens, torch.arange(29)[None]))
    assert not torch.equal(inside, plain)
    assert torch.equal(logits_of(model, tokens, torch.arange(29)[None]), plain)
