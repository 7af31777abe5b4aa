"""What a checkpoint says of how its text is generated: generation_config.json, and the ids that end a text.

A checkpoint without that file may say the same in config.json, where transformers looks then, too.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from conf.schema import ConfigError

NEUTRAL: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "remove_invalid_values": False,
    "renormalize_logits": False,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "guidance_scale": 1.0,
    "penalty_alpha": 0.0,
    "token_healing": False,
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "length_penalty": 1.0,
    "early_stopping": False,
    "num_return_sequences": 1,
}
"""Values with which a key changes nothing."""
OF_NO_CONCERN = (
    "do_sample",  # sampling.temperature says so
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",  # see `end_ids`
    "decoder_start_token_id",
    "use_cache",
    "cache_implementation",
    "cache_config",
    "max_cache_len",
    "prefill_chunk_size",
    "compile_config",
    "disable_compile",
    "continuous_batching_config",
    "low_memory",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "output_logits",
    "return_dict_in_generate",
    "transformers_version",
    # Speculative decoding of transformers' own, which keeps the distribution as ours does.
    "use_mtp",
    "speculation_type",
    "is_assistant",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "assistant_early_exit",
    "assistant_lookbehind",
    "target_lookbehind",
    "assistant_ensemble_weight",
    "prompt_lookup_num_tokens",
    "max_matching_ngram_size",
)
"""Keys that change no token, or that are read elsewhere."""
MARK = "TEXT"
"""Stands for what an assistant said, to see what its chat template puts behind it."""


def read_generation(key: str, name: str, source: str) -> GenerationConfig:
    """What transformers' `generate` would take as its defaults for `source`, which `key` asked for as `name`.

    Raises ConfigError for a file that transformers cannot read.
    """
    is_folder = Path(source).is_dir()
    try:
        try:
            return GenerationConfig.from_pretrained(source)
        except OSError:
            if is_folder and (Path(source) / GENERATION_CONFIG_NAME).is_file():
                raise  # it is there, and damaged
            return GenerationConfig.from_pretrained(source, config_file_name=CONFIG_NAME, _from_model_config=True)
    except Exception as error:  # whatever transformers makes of a file that is not as it should be
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"{key} is {name!r}, whose {GENERATION_CONFIG_NAME} cannot be read ({reason}); mend it or remove it"
        ) from error


def values_of(generation: GenerationConfig) -> dict[str, Any]:
    """The keys that are set to a value that may change the text, as plain JSON types."""
    known = vars(GenerationConfig())  # type: ignore[no-untyped-call]  # transformers gives it no types
    values: dict[str, Any] = generation.to_dict()
    return {
        key: value
        for key, value in values.items()
        if key in known and key not in OF_NO_CONCERN and not key.startswith("_")
        if value is not None and value not in (known[key], NEUTRAL.get(key))
    }


def end_ids(
    generation: GenerationConfig, config: PreTrainedConfig, source: str, tokenizer: PreTrainedTokenizerBase
) -> frozenset[int]:
    """Ids of the tokens that end a text: all that the checkpoint names, wherever it does.

    generation_config.json; config.json, for the whole model and for its text part; the tokenizer's end of sequence
    and end of turn; and the special token that its chat template puts behind what an assistant said. Defaults of
    transformers' classes, which a checkpoint with another vocabulary did not mean, do not count.
    """
    published, _ = type(config).get_config_dict(source)
    text_config = config.get_text_config()
    parts = [published] + [
        published[part]
        for part in config.sub_configs
        if getattr(config, part, None) is text_config and isinstance(published.get(part), dict)
    ]
    named = [generation.eos_token_id, *(part.get("eos_token_id") for part in parts)]
    named += [tokenizer.eos_token_id, _id_of(tokenizer, getattr(tokenizer, "eot_token", None)), _end_of_turn(tokenizer)]
    return frozenset(token for each in named for token in as_ids(each))


def as_ids(named: Any) -> Iterable[int]:
    """Token ids that a configuration names: one, a list of them, or None."""
    ids = named if isinstance(named, list | tuple) else [named]
    return [token for token in ids if isinstance(token, int) and not isinstance(token, bool) and token >= 0]


def _id_of(tokenizer: PreTrainedTokenizerBase, text: str | None) -> int | None:
    """The id of a token with this text; None where there is none."""
    token: int | None = tokenizer.get_vocab().get(str(text)) if text else None
    return token


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token right behind an assistant's turn, by the chat template; None where there is none."""
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "."}, {"role": "assistant", "content": MARK}]
    try:
        behind = str(tokenizer.apply_chat_template(turns, tokenize=False)).rpartition(MARK)[2].lstrip()
    except Exception:  # a template of its own mind, which this program need not use
        return None
    special = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    found = [text for text in special if behind.startswith(text)]
    return special[max(found, key=len)] if found else None
