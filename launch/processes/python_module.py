"""The one way in which a process of ours starts another: a module of this project, wherever the project is."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]
PYTHONPATH = "PYTHONPATH"


def start_module(module: str, environment: Mapping[str, str], **options: Any) -> subprocess.Popen[bytes]:
    """Starts `python -m module` in a session of its own; `options` are those of subprocess.Popen.

    The module and all that it imports from the project are those of this process: the project's folder comes first on
    the path, and the current one, where a user may have a `conf` or `launch` of his own, is not on it (-P).
    """
    earlier = environment.get(PYTHONPATH)
    path = os.pathsep.join([str(PROJECT), earlier] if earlier else [str(PROJECT)])
    return subprocess.Popen(
        [sys.executable, "-P", "-m", module],
        env={**environment, PYTHONPATH: path},
        start_new_session=True,  # a Ctrl-C in the terminal is the orchestrator's to judge
        **options,
    )
