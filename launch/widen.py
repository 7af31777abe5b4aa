"""Writes a small Llama checkpoint in the shape of a large one that computes the same: python launch/widen.py output=DIR

For measuring where no large pretrained model is at hand: weights, keys and values, and the time they take are those of
the large shape, what it writes and what it accepts of a draft is the small, trained model's. How:
launch/demo_pair/widening.py. Exit codes: 0 written; 2 a bad configuration or source; 130 interrupted.
"""

from __future__ import annotations

import sys

from launch.command_line.outcome import ExitCode
from launch.command_line.overrides import compose_program
from launch.command_line.program import program
from launch.demo_pair.checkpoint import WidenConfig, widen


@program
def main(argv: list[str]) -> int:
    config: WidenConfig = compose_program("widen", argv, "launch/demo_pair/checkpoint.py")
    done = widen(config)
    shape = done.shape
    print(
        f"{done.folder}: {shape.num_layers} layers, hidden {shape.hidden_size}, MLP {shape.intermediate_size}, "
        f"{shape.num_heads} heads and {shape.num_kv_heads} kv heads x {shape.head_dim}, vocabulary {shape.vocab_size}; "
        f"{done.num_bytes / 2**30:.2f} GiB of weights"
    )
    return ExitCode.done


if __name__ == "__main__":
    sys.exit(main())
