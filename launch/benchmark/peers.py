"""Programs that a user would run instead, as contenders of launch/bench.py: transformers' generate, and llama.cpp.

Time between tokens is that of a turn over the tokens that came in it, the prompt being read before the first turn:
- transformers, one token at a time: generate goes on, in each turn, with the text so far and its cache; the first token
  of a turn starts the clock. The prompt is read by one plain forward pass.
- assisted generation and prompt lookup: one generation, held up between turns by its streamer.
- llama.cpp (llama-cpp-python): one generation, which waits for its next token to be asked for. The weights are
  converted to GGUF, keys and values f16, flash attention. Its sampler cuts by top_p before the temperature is applied,
  so sampled tokens follow another law there.
All of transformers' attention is sdpa. Peers have the whole cache on the device, transformers_offloaded on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from launch.benchmark.config import PEER_NAMES
from launch.benchmark.contender import Contender
from launch.benchmark.llama_cpp_peer import LlamaCppPeer
from launch.benchmark.shared_models import SharedModels
from launch.benchmark.transformers_peers import (
    GeneratePeer,
    SpeculatingPeer,
    dynamic_cache,
    offloaded_cache,
    static_cache,
)


def _assisted(shared: SharedModels) -> dict[str, Any]:
    """Arguments of generate for assisted generation."""
    return {"assistant_model": shared.assistant}


def _lookup(shared: SharedModels) -> dict[str, Any]:
    """Arguments of generate for prompt lookup."""
    return {"prompt_lookup_num_tokens": shared.settings.prompt_lookup_num_tokens}


PEERS: dict[str, Callable[[SharedModels], Contender]] = {
    "transformers": lambda shared: GeneratePeer(shared=shared, make_cache=dynamic_cache),
    "transformers_static": lambda shared: GeneratePeer(shared=shared, make_cache=static_cache, copies_prompt=True),
    "transformers_offloaded": lambda shared: GeneratePeer(shared=shared, make_cache=offloaded_cache, needs_cuda=True),
    "assisted": lambda shared: SpeculatingPeer(
        shared=shared, make_cache=dynamic_cache, options=_assisted, needs_drafter=True
    ),
    "prompt_lookup": lambda shared: SpeculatingPeer(shared=shared, make_cache=dynamic_cache, options=_lookup),
    "llama_cpp": lambda shared: LlamaCppPeer(shared=shared),
    "llama_cpp_lookup": lambda shared: LlamaCppPeer(shared=shared, uses_lookup=True),
}
"""How each peer is made of the models that peers share."""
assert tuple(PEERS) == PEER_NAMES
