"""What a CUDA graph does, on a CPU: the operations of a pass are noted once, and done again on the same memory.

A replay sees nothing of Python: tensors are those of the recording, results are written to where its results were.
So a number that the host put into the pass, and that would have to change, stays what it was.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Notes(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


class OperationRecorder:
    """See workers.models.cuda_graphs.Recorder. Counts recordings and replays."""

    def __init__(self):
        self.num_recordings = self.num_replays = 0

    def __call__(self, run):
        self.num_recordings += 1
        with self.notes() as notes:
            result = run()

        def replay() -> torch.Tensor:
            self.num_replays += 1
            self.do_again(notes)
            return result

        return replay

    notes = _Notes

    @staticmethod
    def do_again(notes: _Notes) -> None:
        for func, args, kwargs, out in notes.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tensors_of(out), tensors_of(again), strict=True):
                if old.data_ptr() != new.data_ptr():  # not a view, nor in place
                    assert old.shape == new.shape
                    old.copy_(new)


def tensors_of(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
