"""A program for torchrun: launch/run.py, whose workers are made to fail: run_with.py FAULT RANK key=value ...

FAULT is one of `faulty_worker.FAULTS`, in the worker of RANK.
"""

from __future__ import annotations

import os
import sys

from launch import run
from launch.command_line.overrides import start_timeout_s
from launch.processes.guard import Guard

if __name__ == "__main__":
    fault, rank, *arguments = sys.argv[1:]
    if os.environ["RANK"] == rank:
        os.environ["TEST_FAULT"] = fault
        sys.exit(Guard(start_timeout_s(arguments), worker_module="tests.multiprocess.faulty_worker").run())
    sys.exit(run.main(arguments))
