"""A transformers model that reads and writes our caches, and the three cached models of the levels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, partial

import torch

from tiers.base import Tier
from tiers.full_cache import FullCache
from tiers.retrieval.selection import RetrievalSelection
from tiers.retrieval_cache import RetrievalCache, RetrievalUpdate
from tiers.streaming_llm_cache import StreamingLLMCache
from workers.attention import few_rows
from workers.attention.attend import ATTENTION_NAME, ForwardPass, Progress, active
from workers.messages import UpdateNotice
from workers.models.layer_major import LayerMajor
from workers.models.rotary import make_length_independent


class CausalModel:
    """Weights on a device; stateless but for rotary tables."""

    def __init__(self, model, device: torch.device):
        self.hf_model = model.eval()
        self.device, self.dtype = device, model.dtype
        self.vocab_size = model.get_output_embeddings().weight.shape[0]
        model.set_attn_implementation(ATTENTION_NAME)
        self._rotary_table = make_length_independent(model)
        self.progress = Progress()
        if device.type == "cpu":
            few_rows.use_in(model)

    @cached_property
    def layer_major(self) -> LayerMajor:
        """Raises TypeError where the model has no plain list of layers."""
        return LayerMajor(self.hf_model, self.device, self.progress)

    def start_sequence(self, num_prompt_tokens: int) -> None:
        """A prompt of so many tokens comes: it fixes the rotation of each position where that depends on length."""
        if self._rotary_table is not None:
            self._rotary_table.read_prompt(num_prompt_tokens)

    @torch.inference_mode()
    def forward(self, tokens: list[int], cache, num_logits: int, **observers) -> torch.Tensor:
        """Reads `tokens` after those in `cache`; logits [num_logits, V] after the last ones. See ForwardPass."""
        first = cache.length
        input_ids = torch.tensor([tokens], device=self.device)
        position_ids = torch.arange(first, first + len(tokens), device=self.device)[None]
        return self.read(input_ids, position_ids, cache, num_logits, first_position=first, **observers)

    def read(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cache,
        num_logits: int,
        first_position: int = 0,
        **observers,
    ) -> torch.Tensor:
        """`forward` of what is on the device, [1, T] each, in inference mode.

        The first position matters where the cache's segments have positions.
        """
        with active(ForwardPass(cache, first_position, **observers, progress=self.progress), input_ids.shape[1]):
            output = self.hf_model(
                input_ids=input_ids, position_ids=position_ids, use_cache=False, logits_to_keep=num_logits
            )
        return output.logits[0]

    @property
    def depends_on_length(self) -> bool:
        """Its rotary tables are made on the host, as positions come."""
        return self._rotary_table is not None


class TargetModel:
    """Level 3: the target on its full cache; see workers.level.CachedModel.

    `selection` chooses what the retrieval cache gets; None where there is no retrieval level.
    """

    def __init__(
        self,
        model: CausalModel,
        cache: FullCache,
        *,
        piece_tokens: int,
        hidden_tier: Tier,
        selection: RetrievalSelection | None,
    ):
        self._model, self._cache, self.vocab_size = model, cache, model.vocab_size
        self._piece_tokens, self._hidden_tier, self._selection = piece_tokens, hidden_tier, selection
        self._observers = {}
        if selection is not None:
            self._observers["observe"] = self._keep_queries
            if (observe_mass := selection.rule.mass_observer) is not None:
                self._observers |= {"observe_mass": observe_mass, "chunk_size": selection.rule.chunk_size}
        self.queries: dict[int, torch.Tensor] = {}
        """Of the last `append`, per layer [H, G, T, D], from position `queries_start` on."""
        self.queries_start = 0
        self.on_prefill_progress = lambda done, total: None
        self.observe_prompt_mass = None
        """For measuring, which takes time: see LayerMajor.prefill."""

    @property
    def length(self) -> int:
        return self._cache.length

    def prefill(self, tokens: list[int]) -> None:
        """Empties the cache and reads the prompt but for its last token, which comes with the first verification."""
        self._model.start_sequence(len(tokens) + 1)
        if self._selection is not None:
            self._selection.reset()
        self.reread(tokens)

    def reread(self, tokens: list[int]) -> None:
        """Empties the cache and reads the sequence's tokens, as before, layer by layer.

        In pieces, which bounds the memory of activations; each position keeps the rotation it had.
        """
        if self._selection is not None:
            self._selection.begin_reading()
        waiting: list[torch.Tensor] = []
        try:
            with self._cache.prefill(len(tokens)) as make_layer_cache:
                self._model.layer_major.prefill(
                    tokens,
                    make_layer_cache,
                    self._piece_tokens,
                    make_hidden=partial(self._allocate_hidden, waiting),
                    observe=None if self._selection is None else self._selection.observe,
                    observe_mass=self.observe_prompt_mass,
                    on_progress=self.on_prefill_progress,
                )
        finally:
            for tensor in waiting:
                self._hidden_tier.free(tensor)

    def _allocate_hidden(self, waiting: list[torch.Tensor], *size: int) -> torch.Tensor:
        waiting.append(self._hidden_tier.allocate(*size, dtype=self._model.dtype))
        return waiting[0]

    def append(self, tokens: list[int], num_logits: int) -> torch.Tensor:
        self.queries_start = self._cache.length
        return self._model.forward(tokens, self._cache, num_logits, **self._observers)

    def truncate(self, length: int) -> None:
        self._cache.truncate(length)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within it, passes are those of a target without a retrieval level: a baseline on the same cache.

        The retrieval level is to follow, not to be rebuilt, with the first pass afterwards.
        """
        observers, self._observers = self._observers, {}
        self._cache.drop_collections()
        try:
            yield
        finally:
            self._observers = observers

    def _keep_queries(self, layer: int, q, k, v) -> None:
        self.queries[layer] = q

    def retrieval_update(self, *, rebuild: bool, budget: int | None = None) -> RetrievalUpdate:
        """What the retrieval cache needs to follow, or, for a rebuild, to start anew; call it after a roll back.

        `budget`: of the chunks to be chosen from now on, if it is to change.
        """
        if budget is not None:
            self._selection.budget = budget
        num_final = self._cache.length - self.queries_start
        queries = {layer: q[:, :, :num_final] for layer, q in self.queries.items()}
        return self._selection.rebuild(queries) if rebuild else self._selection.follow(queries)


class RetrievalModel:
    """Level 2: the target's weights on the retrieval cache; see workers.level.CachedModel."""

    def __init__(self, model: CausalModel, cache: RetrievalCache):
        self._model, self._cache, self.vocab_size = model, cache, model.vocab_size

    @property
    def length(self) -> int:
        return self._cache.length

    @property
    def is_full(self) -> bool:
        return self._cache.is_full

    def load(self, update: RetrievalUpdate) -> None:
        """Takes the verifier's keys and values; the cache then holds the verifier's tokens."""
        self._cache.load(update)

    def append(self, tokens: list[int], num_logits: int) -> torch.Tensor:
        return self._model.forward(tokens, self._cache, num_logits)

    def truncate(self, length: int) -> None:
        self._cache.truncate(length)


class SharedRetrievalModel(RetrievalModel):
    """Its cache is in memory that the verifier's processes write to: a notice says what."""

    def load(self, update: UpdateNotice) -> None:
        self._cache.adopt(
            is_rebuild=update.is_rebuild,
            length=update.length,
            num_slots=update.num_slots,
            num_summaries=update.num_summaries,
        )


class StreamingModel:
    """Level 1: the drafter on its StreamingLLM cache; see workers.level.CachedModel."""

    def __init__(self, model: CausalModel, cache: StreamingLLMCache):
        self._model, self._cache, self.vocab_size = model, cache, model.vocab_size
        self._tokens: list[int] = []

    @property
    def length(self) -> int:
        """Of the sequence, of which the cache holds sinks and window."""
        return len(self._tokens)

    def prefill(self, tokens: list[int]) -> None:
        self._cache.reset()
        self._tokens = []
        # Positions are slots, so whatever the sequence's length, these are all there will be.
        self._model.start_sequence(self._cache.capacity)
        if tokens:
            self.append(tokens, 1)

    def append(self, tokens: list[int], num_logits: int) -> torch.Tensor:
        num_before = len(self._tokens)
        self._tokens += tokens  # in place: of a long sequence a copy takes as long as a token
        try:
            return self._read(tokens, num_before, num_logits)
        except BaseException:
            del self._tokens[num_before:]
            raise

    def _read(self, tokens: list[int], num_before: int, num_logits: int) -> torch.Tensor:
        """The newest `tokens`, which follow `num_before` others; or all that the window then holds."""
        cache = self._cache
        start = cache.window_start_for(len(self._tokens))
        if start != cache.window_start or cache.length != cache.slot(num_before):
            cache.reset()
            cache.window_start = start
            tokens = self._tokens[: cache.sinks] + self._tokens[max(start, cache.sinks) :]
        # The target's vocabulary may be padded to more ids: any other token will do for these, in a draft.
        known = [min(token, self._model.vocab_size - 1) for token in tokens]
        return self._model.forward(known, cache, num_logits)

    def truncate(self, length: int) -> None:
        """A roll back to before the window's start empties the cache: the next `append` reads again what it needs."""
        del self._tokens[length:]
        slot = self._cache.slot(length)
        if length >= self._cache.window_start and slot <= self._cache.length:
            self._cache.truncate(slot)
        elif length < self._cache.window_start:
            self._cache.reset()
