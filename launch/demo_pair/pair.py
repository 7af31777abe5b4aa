"""The demo pair from configuration to finished checkpoints: first the target, then the drafter that learns from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from launch.demo_pair.corpus import BOS, EOS, SampleMaker, prepare_streams
from launch.demo_pair.training import Trainer
from launch.demo_pair.training_config import NewModel, TrainDemoConfig

MAX_POSITIONS = 32768
NAMES = ("target", "drafter")


def train_pair(config: TrainDemoConfig) -> None:
    """Trains, or goes on with, target and drafter, and writes both to `config.assets`. Raises ConfigError."""
    work = Path(config.work)
    work.mkdir(parents=True, exist_ok=True)
    (work / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    tokenizer, streams = prepare_streams(config, work)
    print({"books_tokens": len(streams[0]), "python_tokens": len(streams[1])}, flush=True)
    maker = SampleMaker(streams=streams, tokenizer=tokenizer, rng=np.random.default_rng(config.seed))

    if config.refine_pair is None:
        target, drafter = (build_model(shape, config.tokenizer_vocab) for shape in (config.target, config.drafter))
    else:
        folders = (Path(config.refine_pair) / name for name in NAMES)
        target, drafter = (LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in folders)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for model in (target, drafter):
        torch.nn.Module.to(model, device)  # transformers' own method is typed as if `self` were an argument
    if config.refine_pair is None:
        Trainer("target", target, config.target, maker, work, config.workers).run()
    Trainer("refined_target", target, config.refined_target, maker, work, config.workers).run()
    target.train(False)
    drafter_schedule = config.drafter if config.refine_pair is None else config.refined_drafter
    Trainer("drafter", drafter, drafter_schedule, maker, work, config.workers, teacher=target).run()
    for name, model in zip(NAMES, (target, drafter), strict=True):
        export(model, work / "tokenizer.json", Path(config.assets) / name)


def build_model(shape: NewModel, vocab_size: int) -> LlamaForCausalLM:
    """A Llama model of this shape with random weights."""
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


def export(model: LlamaForCausalLM, tokenizer_path: Path, folder: Path) -> None:
    """Writes bf16 safetensors, config and tokenizer: a folder that from_pretrained loads."""
    torch.nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(folder)
    make_tokenizer: Callable[..., PreTrainedTokenizerFast] = PreTrainedTokenizerFast  # its constructor has no types
    tokenizer = make_tokenizer(
        tokenizer_file=str(tokenizer_path),
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(folder)
