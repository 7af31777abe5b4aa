"""The rules of a checkpoint's generation_config.json, applied by transformers' own processors in transformers' order.

Two kinds. Processors change a row of logits before the temperature, and most of them depend on the tokens before that
row's place: workers.models.token_rules shows them these, at each level. Warpers cut a distribution off, whatever came
before: workers.acceptance.distribution takes them.

Shapes: n rows, V vocabulary of the target, P tokens of the prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers.generation import logits_process

from conf.schema import ConfigError, SamplingConfig
from workers.acceptance import NO_WARPERS, Warpers
from workers.models.token_rules import Processor, Reads, TokenRules


@dataclass(kw_only=True, frozen=True)
class RuleSetting:
    """What processors depend on beside the value of their key."""

    prompt: torch.Tensor
    """[1, P], on the device of the logits."""
    eos_ids: torch.Tensor
    max_length: int
    """Tokens of prompt and continuation, at most."""
    begin: int
    """Number of tokens before the first place at which the model is free."""

    @property
    def num_prompt(self) -> int:
        """P."""
        return self.prompt.shape[-1]


def _made(kind: Any, *values: Any) -> Processor:
    """A processor of the class `kind`; transformers gives their arguments no types."""
    processor: Processor = kind(*values)
    return processor


_of: Any = logits_process
PROCESSORS: dict[str, tuple[Reads, Callable[[Any, RuleSetting], Processor]]] = {
    "sequence_bias": (Reads.sequence, lambda value, at: _made(_of.SequenceBiasLogitsProcessor, value)),
    "encoder_repetition_penalty": (
        Reads.sequence,
        lambda value, at: _made(_of.EncoderRepetitionPenaltyLogitsProcessor, float(value), at.prompt),
    ),
    "repetition_penalty": (
        Reads.occurrence,
        lambda value, at: _made(_of.RepetitionPenaltyLogitsProcessor, float(value)),
    ),
    "no_repeat_ngram_size": (Reads.sequence, lambda value, at: _made(_of.NoRepeatNGramLogitsProcessor, value)),
    "encoder_no_repeat_ngram_size": (
        Reads.sequence,
        lambda value, at: _made(_of.EncoderNoRepeatNGramLogitsProcessor, value, at.prompt),
    ),
    "bad_words_ids": (Reads.sequence, lambda value, at: _made(_of.NoBadWordsLogitsProcessor, value, at.eos_ids)),
    "min_length": (Reads.sequence, lambda value, at: _made(_of.MinLengthLogitsProcessor, value, at.eos_ids)),
    "min_new_tokens": (
        Reads.sequence,
        lambda value, at: _made(_of.MinNewTokensLengthLogitsProcessor, at.num_prompt, value, at.eos_ids),
    ),
    "forced_bos_token_id": (Reads.sequence, lambda value, at: _made(_of.ForcedBOSTokenLogitsProcessor, value)),
    "forced_eos_token_id": (
        Reads.sequence,
        lambda value, at: _made(_of.ForcedEOSTokenLogitsProcessor, at.max_length, value, at.prompt.device),
    ),
    "remove_invalid_values": (Reads.nothing, lambda value, at: _made(_of.InfNanRemoveLogitsProcessor)),
    "exponential_decay_length_penalty": (
        Reads.sequence,
        lambda value, at: _made(_of.ExponentialDecayLengthPenalty, value, at.eos_ids, at.num_prompt),
    ),
    "suppress_tokens": (
        Reads.nothing,
        lambda value, at: _made(_of.SuppressTokensLogitsProcessor, value, at.prompt.device),
    ),
    "begin_suppress_tokens": (
        Reads.sequence,
        lambda value, at: _made(_of.SuppressTokensAtBeginLogitsProcessor, value, at.begin, at.prompt.device),
    ),
    "renormalize_logits": (Reads.nothing, lambda value, at: _made(_of.LogitNormalization)),
}
"""Keys whose processors change logits, in the order of transformers."""
NEEDING_AN_END = ("min_length", "min_new_tokens", "exponential_decay_length_penalty")
"""Keys that say nothing of a model without an end of sequence."""
WARPERS_BEFORE_CUTS = {"top_h": _of.TopHLogitsWarper}
WARPERS_AFTER_CUTS = {
    "min_p": _of.MinPLogitsWarper,
    "typical_p": _of.TypicalLogitsWarper,
    "epsilon_cutoff": _of.EpsilonLogitsWarper,
    "eta_cutoff": _of.EtaLogitsWarper,
}
"""Keys that cut a distribution off when it is sampled from: before, and after top-k and top-p."""
WARPERS = WARPERS_BEFORE_CUTS | WARPERS_AFTER_CUTS
OURS = ("temperature", "top_k", "top_p")
"""Keys that `sampling` decides."""
REFUSED = (
    "num_beams",
    "num_beam_groups",
    "constraints",
    "force_words_ids",
    "penalty_alpha",
    "dola_layers",
    "guidance_scale",
    "watermarking_config",
    "token_healing",
)
"""Keys with which even greedy decoding is another algorithm."""


@dataclass(kw_only=True, frozen=True)
class ModelRules:
    """What a run takes from its target's generation_config.json, and what it leaves."""

    applied: dict[str, Any]
    """Keys with their values, as plain JSON types."""
    not_applied: dict[str, Any]
    vocab_size: int
    eos_ids: frozenset[int]
    """Ends of a text, which some rules forbid, or favour."""
    notes: tuple[str, ...] = ()
    """Lines for the user."""
    num_prompt_tokens: int = 0
    max_new_tokens: int = 0
    """The most tokens that come behind the prompt; both are known when there is a task."""

    def of_task(self, num_prompt_tokens: int, max_new_tokens: int) -> ModelRules:
        """The same rules for a task of these lengths."""
        return replace(self, num_prompt_tokens=num_prompt_tokens, max_new_tokens=max_new_tokens)

    def report(self) -> dict[str, dict[str, Any]]:
        """For the result of a run."""
        return {"applied": self.applied, "not_applied": self.not_applied}

    def warpers(self) -> Warpers:
        """Those that acceptance.distribution takes; NO_WARPERS where there are none."""

        def made(kinds: dict[str, Any]) -> tuple[Callable[[torch.Tensor], torch.Tensor], ...]:
            found: list[Any] = [_made(kind, self.applied[key]) for key, kind in kinds.items() if key in self.applied]
            return tuple(partial(processor, None) for processor in found)  # they ask for no tokens

        before, after = made(WARPERS_BEFORE_CUTS), made(WARPERS_AFTER_CUTS)
        return Warpers(before_cuts=before, after_cuts=after) if before or after else NO_WARPERS

    def processors(self, setting: RuleSetting) -> list[tuple[Reads, Processor]]:
        """The processors of the keys that are applied, in their order."""
        chosen = [(key, *entry) for key, entry in PROCESSORS.items() if key in self.applied]
        return [(reads, make(self.applied[key], setting)) for key, reads, make in chosen]

    def setting(self, prompt: list[int], device: torch.device) -> RuleSetting:
        """What the processors depend on."""
        first_is_forced = len(prompt) == 1 and "forced_bos_token_id" in self.applied
        eos_ids = [token for token in sorted(self.eos_ids) if token < self.vocab_size]
        return RuleSetting(
            prompt=torch.tensor([prompt], device=device),
            eos_ids=torch.tensor(eos_ids, dtype=torch.long, device=device),
            max_length=len(prompt) + self.max_new_tokens,
            begin=len(prompt) + first_is_forced,
        )

    def for_level(self) -> TokenRules | None:
        """What applies the processors at one level; None where there are none."""
        if not self.applied.keys() & PROCESSORS.keys():
            return None

        def make(tokens: list[int], device: torch.device) -> list[tuple[Reads, Processor]]:
            # A process that was restarted begins with a longer sequence: what is the prompt of it, the task says.
            return self.processors(self.setting(tokens[: self.num_prompt_tokens], device))

        return TokenRules(make, self.vocab_size)


def make_rules(
    values: dict[str, Any],
    *,
    name: str,
    vocab_size: int,
    eos_ids: frozenset[int],
    sampling: SamplingConfig,
    are_wanted: bool,
) -> ModelRules:
    """The rules of a target called `name`, whose file has `values` (see generation_file.values_of).

    Raises ConfigError for a key that would make greedy decoding another algorithm, and for a value that is none.
    """

    def applies(key: str) -> bool:
        if not are_wanted or (key in NEEDING_AN_END and not eos_ids):
            return False
        if key == "min_length" and "min_new_tokens" in values:
            return False  # transformers lets the other one decide
        return key in PROCESSORS or (key in WARPERS and not sampling.is_greedy)

    refused = {key: value for key, value in values.items() if key in REFUSED and not _is_idle(key, values, sampling)}
    if are_wanted and refused:
        raise ConfigError(
            f"model.target is {name!r}, whose generation_config.json has {_listed(refused)}, which cannot be applied; "
            "it must have none of that. generation.use_model_rules=false goes on without all its rules"
        )
    applied = {key: value for key, value in values.items() if applies(key)}
    not_applied = {key: value for key, value in values.items() if key not in applied}
    rules = ModelRules(
        applied=applied,
        not_applied=not_applied,
        vocab_size=vocab_size,
        eos_ids=eos_ids,
        notes=tuple(_notes(applied, not_applied, sampling)),
    )
    _check(rules, name)
    return rules


def _is_idle(key: str, values: dict[str, Any], sampling: SamplingConfig) -> bool:
    """Whether transformers itself would not heed a refused key: contrastive search is greedy, over the top_k best."""
    return key == "penalty_alpha" and not (sampling.is_greedy and values.get("top_k", 50) > 1)


def _notes(applied: dict[str, Any], not_applied: dict[str, Any], sampling: SamplingConfig) -> list[str]:
    """A line for what is applied, and one for what is not and would have changed something."""
    ours = {key: getattr(sampling, key) for key in OURS}
    told = {
        key: value
        for key, value in not_applied.items()
        if not (sampling.is_greedy and (key in OURS or key in WARPERS)) and value != ours.get(key)
    }
    lines = []
    if applied:
        way_out = "generation.use_model_rules=false leaves them out"
        lines.append(f"rules of the model's generation_config.json: {_listed(applied)}; {way_out}")
    if told:
        lines.append(f"not taken from the model's generation_config.json: {_listed(told)}; the run's own keys decide")
    return lines


def _listed(values: dict[str, Any]) -> str:
    """Keys and values for a line of text, long values shortened."""
    texts = {key: str(value) for key, value in values.items()}
    return ", ".join(f"{key}={text if len(text) <= 40 else text[:37] + '...'}" for key, text in texts.items())


def _check(rules: ModelRules, name: str) -> None:
    """Applies each rule to made-up logits. Raises ConfigError for a value that transformers refuses."""
    device = torch.device("cpu")
    for key, value in rules.applied.items():
        one = replace(rules, applied={key: value}, max_new_tokens=1)
        logits = torch.zeros(1, rules.vocab_size)
        try:
            for _, processor in one.processors(one.setting([0], device)):
                processor(torch.zeros(1, 1, dtype=torch.long), logits)
            warpers = one.warpers()
            for warp in warpers.before_cuts + warpers.after_cuts:
                warp(logits)
        except Exception as error:  # whatever a processor makes of a value
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"model.target is {name!r}, whose generation_config.json has {_listed({key: value})}; it must be a "
                f"value that transformers takes ({reason}). generation.use_model_rules=false goes on without its rules"
            ) from error
