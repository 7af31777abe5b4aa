"""Times transformers' own generate with an offloaded cache, on the target of the widened pair."""

from __future__ import annotations

from statistics import median

import torch
from transformers import GenerationMixin

from conf.schema import ConfigError, FullCacheConfig
from launch.assembly.prepare import prepare
from launch.command_line.timing import now
from launch.measure.gpu_results import Cells
from launch.measure.gpu_setting import Setting
from launch.prompts.prompt import read_prompt

NEW_TOKENS = 4


def measure_transformers(setting: Setting) -> None:
    """One row, as far as there is a target that another part has loaded. Raises ConfigError.

    The offloaded cache brings a layer's keys and values to the device while the layer before is computed.
    """
    config, device = setting.config, setting.device
    run_config = setting.pair.run_config(FullCacheConfig(), config.transformers_tokens, config.on_chip_budget, gamma2=4)
    prepared = prepare(run_config)
    if setting.pair.target is None:
        raise ConfigError("cells has transformers alone; it must have offloaded or on_chip, which load the model")
    prompt = read_prompt(run_config.prompt, prepared.tokenizer)
    model, times = setting.pair.target.hf_model, TokenTimes(device)
    model.set_attn_implementation("sdpa")
    assert isinstance(model, GenerationMixin)
    with torch.inference_mode():
        ids = torch.tensor([prompt], device=device)
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            cache_implementation="offloaded" if device.type == "cuda" else None,
            streamer=times,
        )
    row: Cells = {
        "tokens of context": len(prompt),
        "TTFT, s": times.seconds[0],
        "TBT, ms": 1e3 * median(times.seconds[1:]),
    }
    setting.results.set_table("transformers, generate with an offloaded cache", [row])


class TokenTimes:
    """Seconds between tokens. transformers calls it a streamer, and gives it the prompt, then each token."""

    def __init__(self, device: torch.device):
        self._device, self._last = device, now(device)
        self.seconds: list[float] = []

    def put(self, tokens: torch.Tensor) -> None:
        """Called with the prompt's tokens first, then with each token that is generated."""
        moment = now(self._device)
        if tokens.numel() == 1:
            self.seconds.append(moment - self._last)
        self._last = moment

    def end(self) -> None:
        """Called after the last token."""
