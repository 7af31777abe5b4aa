"""launch/assembly/run_folder.py: a run has its folder alone while it runs, and no longer."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from conf.schema import ConfigError
from launch.assembly.run_folder import LOCK, claim
from orchestrator.run_files import RESULT, ROUNDS


def test_a_chosen_folder_with_a_running_run_is_refused_with_its_owner(tmp_path):
    folder = tmp_path / "o"
    with claim(folder, is_chosen=True):
        with pytest.raises(ConfigError, match=f"another run is at work .process {os.getpid()} on .*o-2"):
            claim(folder, is_chosen=True)
        assert [path.name for path in tmp_path.iterdir()] == ["o"]
    with claim(folder, is_chosen=True) as again:
        assert again.path == folder
    assert not list(folder.iterdir())


def test_a_default_folder_that_is_taken_gets_a_number(tmp_path):
    folder = tmp_path / "12-00-00"
    with ExitStack() as runs:
        names = [runs.enter_context(claim(folder, is_chosen=False)).path.name for _ in range(3)]
    assert names == ["12-00-00", "12-00-00-2", "12-00-00-3"]


@pytest.mark.parametrize("left", [ROUNDS, RESULT])
def test_files_of_a_run_that_ended_are_replaced_only_where_its_folder_was_chosen(tmp_path, left):
    folder = tmp_path / "o"
    folder.mkdir()
    (folder / left).touch()
    with claim(folder, is_chosen=False) as claimed:
        assert claimed.path.name == "o-2"
    assert not (folder / LOCK).exists()
    with claim(folder, is_chosen=True) as claimed:
        assert claimed.path == folder


def test_many_that_begin_at_once_have_a_folder_each(tmp_path):
    with ThreadPoolExecutor(16) as pool, ExitStack() as runs:
        claims = list(pool.map(lambda _: claim(tmp_path / "o", is_chosen=False), range(16)))
        for each in claims:
            runs.enter_context(each)
        assert {each.path.name for each in claims} == {"o", *(f"o-{number}" for number in range(2, 17))}


def test_the_folder_of_a_run_that_was_killed_is_free_again(tmp_path):
    code = "import sys; from pathlib import Path; from launch.assembly.run_folder import claim\n"
    code += "held = claim(Path(sys.argv[1]), is_chosen=True); print('has it', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"has it\n"
        with pytest.raises(ConfigError, match=f"process {other.pid} on"):
            claim(tmp_path, is_chosen=True)
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert (tmp_path / LOCK).exists()
    with claim(tmp_path, is_chosen=True) as claimed:
        assert str(os.getpid()) in (claimed.path / LOCK).read_text()


@pytest.mark.parametrize("is_chosen", [True, False])
def test_a_folder_that_cannot_be_made_is_refused(tmp_path, is_chosen):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, reason in (("file", "File exists"), ("file/x", "Not a directory"), ("link", "link to .*nowhere")):
        with pytest.raises(ConfigError, match=f"output is .*{reason}"):
            claim(Path(tmp_path, name), is_chosen=is_chosen)
