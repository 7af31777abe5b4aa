"""A program for torchrun: launch/run.py, whose workers are made to fail: run_with.py FAULT RANK key=value ...

FAULT is one of `faulty_worker.FAULTS`, in the worker of RANK.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from launch import run
from launch.processes import guard

if __name__ == "__main__":
    fault, rank, *arguments = sys.argv[1:]
    if os.environ["RANK"] == rank:
        os.environ["TEST_FAULT"] = fault
        guard.WORKER_PROGRAM = Path(__file__).with_name("faulty_worker.py")
    sys.exit(run.main(arguments))
