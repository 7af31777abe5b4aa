"""A transformers model that reads and writes our caches; each level's cached model is one with a cache of its kind."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from tiers.base import KVCache, PassCache
from tiers.fixed_slots import SlotCache
from workers.attention import few_rows
from workers.attention.forward_pass import ATTENTION_NAME, NOBODY, ForwardPass, Observers, Progress, active
from workers.models.layer_major import LayerMajor
from workers.models.rotary import make_length_independent


class DraftingModel(Protocol):
    """The weights of a draft level: a CausalModel, or one whose passes are recorded (see cuda_graphs)."""

    vocab_size: int

    def start_sequence(self, num_prompt_tokens: int) -> None: ...
    def forward(self, tokens: list[int], cache: SlotCache, num_logits: int) -> torch.Tensor: ...


class CausalModel:
    """Weights on a device; stateless but for rotary tables."""

    def __init__(self, model: PreTrainedModel, device: torch.device):
        untyped: Any = model  # transformers gives these methods no types
        self.hf_model: PreTrainedModel = untyped.eval()
        self.device, self.dtype = device, model.dtype
        self.vocab_size: int = untyped.get_output_embeddings().weight.shape[0]
        model.set_attn_implementation(ATTENTION_NAME)
        self._rotary_table = make_length_independent(model)
        self.progress = Progress()
        if device.type == "cpu":
            few_rows.use_in(model)

    @cached_property
    def layer_major(self) -> LayerMajor:
        """The model, to be read layer by layer. Raises TypeError where it has no plain list of layers."""
        return LayerMajor(self.hf_model, self.device, self.progress)

    def start_sequence(self, num_prompt_tokens: int) -> None:
        """A prompt of so many tokens comes: it fixes the rotation of each position where that depends on length."""
        if self._rotary_table is not None:
            self._rotary_table.read_prompt(num_prompt_tokens)

    def read_again(self, num_tokens: int) -> None:
        """The first `num_tokens` tokens of the sequence are read again; see RotaryTable.read_again."""
        if self._rotary_table is not None:
            self._rotary_table.read_again(num_tokens)

    @torch.inference_mode()
    def forward(
        self, tokens: list[int], cache: KVCache, num_logits: int, observers: Observers = NOBODY
    ) -> torch.Tensor:
        """Reads `tokens` after those in `cache`; logits [num_logits, V] after the last ones."""
        first = cache.length
        input_ids = torch.tensor([tokens], device=self.device)
        position_ids = torch.arange(first, first + len(tokens), device=self.device)[None]
        return self.read(input_ids, position_ids, cache, num_logits, first_position=first, observers=observers)

    def read(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cache: PassCache,
        num_logits: int,
        first_position: int = 0,
        observers: Observers = NOBODY,
    ) -> torch.Tensor:
        """`forward` of tokens that are on the device, ids and positions [1, T] each, in inference mode.

        `first_position` matters where the cache's segments have positions.
        """
        with active(ForwardPass(cache, first_position, observers, progress=self.progress), input_ids.shape[1]):
            output = self.hf_model(
                input_ids=input_ids, position_ids=position_ids, use_cache=False, logits_to_keep=num_logits
            )
        logits: torch.Tensor = output.logits[0]
        return logits

    @property
    def depends_on_length(self) -> bool:
        """True where the rotary tables are made on the host, as positions come."""
        return self._rotary_table is not None
