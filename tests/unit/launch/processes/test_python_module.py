"""launch/processes/python_module.py: what a process of ours starts is of the same project, wherever the user is."""

from __future__ import annotations

import ast
import os
import subprocess
from pathlib import Path

from launch.processes.python_module import PROJECT, PYTHONPATH, start_module


def path_of_child(environment: dict[str, str], folder: Path) -> list[str]:
    """`sys.path` of a process that is started in `folder`."""
    child = start_module("site", environment, stdout=subprocess.PIPE, cwd=folder)
    text = child.communicate(timeout=60)[0].decode()
    return ast.literal_eval(text[text.index("[") : text.index("]") + 1])


def test_the_project_comes_first_and_the_user_s_folder_not_at_all(tmp_path):
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "__init__.py").touch()
    plain = {name: value for name, value in os.environ.items() if name != PYTHONPATH}
    for environment in (plain, plain | {PYTHONPATH: "/of/the/user"}):
        path = path_of_child(environment, tmp_path)
        assert path[0] == str(PROJECT) and (PROJECT / "launch" / "run.py").exists()
        assert ("/of/the/user" in path) == (PYTHONPATH in environment)
        assert not {"", str(tmp_path)} & set(path)
