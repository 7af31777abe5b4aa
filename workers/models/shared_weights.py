"""One copy of the target's weights for two processes on one device: a verifier gives them, a retriever takes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tiers.shared_memory import SharedArena, arena_bytes, attached, cuda_handle, from_cuda_handle
from workers.checkpoint.facts import ModelFacts
from workers.models.causal_model import CausalModel
from workers.models.skeleton import make_skeleton
from workers.parallel.tensor_parallel import set_parameter


class SharedWeights:
    """The weights of a loaded model, for others to use; keep it as long as they do.

    On the CPU they move to shared memory, one after another; on a GPU they stay, and others get the driver's handles.
    """

    def __init__(self, model: CausalModel):
        state = model.hf_model.state_dict(keep_vars=True)
        own_names: dict[int, str] = {}
        self._tied: dict[str, str] = {}
        for name, tensor in state.items():
            first = own_names.setdefault(id(tensor), name)
            if first != name:
                self._tied[name] = first
        self._tensors = {name: state[name] for name in own_names.values()}
        self._arena: SharedArena | None = None
        if model.device.type != "cuda":
            self._move_to_arena()

    def _move_to_arena(self) -> None:
        sizes = [tensor.numel() * tensor.element_size() for tensor in self._tensors.values()]
        self._arena = SharedArena(arena_bytes(*sizes), torch.device("cpu"))
        for tensor in self._tensors.values():
            place = self._arena.allocate(*tensor.shape, dtype=tensor.dtype)
            place.copy_(tensor.data)
            tensor.data = place

    def description(self) -> dict[str, Any]:
        """Handles of the weights, for `load_shared_model`; JSON types and bytes."""
        shared: dict[str, Any] = {"names": list(self._tensors), "tied": self._tied}
        if self._arena is not None:
            return shared | {"arena": self._arena.description()}
        return shared | {"cuda": [cuda_handle(tensor.data) for tensor in self._tensors.values()]}


def load_shared_model(facts: ModelFacts, description: dict[str, Any], device: torch.device) -> CausalModel:
    """The whole model of `facts` on another process's weights: no file is read, no memory taken."""
    if "arena" in description:
        tensors = attached(description["arena"])
    else:
        tensors = [from_cuda_handle(handle) for handle in description["cuda"]]
    model = make_skeleton(facts.config, facts.dtype)
    weights = dict(zip(description["names"], tensors, strict=True))
    weights |= {name: weights[first] for name, first in description["tied"].items()}
    for name, tensor in weights.items():
        set_parameter(model, name, tensor)
    assert not any(parameter.is_meta for parameter in model.parameters()), "weights are lacking"
    module: nn.Module = model  # whose `to` has types
    module.to(device)
    return CausalModel(model, device)
