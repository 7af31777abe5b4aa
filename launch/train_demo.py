"""Trains the embedded demo pair: python launch/train_demo.py books=FOLDER

A Llama-architecture target and a drafter more than ten times smaller with the same tokenizer. The target is trained on
books and Python source, short contexts first; then it is refined to give its attention to what it makes use of (see
`Stage.narrow` in launch/demo_pair/training_config.py). The drafter learns next tokens, then the target's distribution
(distillation), both on the tokens that its StreamingLLM cache will show it. Everything needed to repeat it is in
conf/train_demo.yaml; an interrupted run resumes from its last checkpoint. Uses the GPU if there is one.
Exit codes: 0 trained; 2 a bad configuration or no books; 130 interrupted.
"""

from __future__ import annotations

import sys

from launch.command_line.outcome import ExitCode
from launch.command_line.overrides import compose_program
from launch.command_line.program import program
from launch.demo_pair.pair import train_pair
from launch.demo_pair.training_config import TrainDemoConfig


@program
def main(argv: list[str]) -> int:
    config: TrainDemoConfig = compose_program("train_demo", argv, "launch/demo_pair/training_config.py")
    train_pair(config)
    return ExitCode.done


if __name__ == "__main__":
    sys.exit(main())
