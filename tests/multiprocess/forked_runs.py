"""Runs of launch/run.py over several processes, all of them forked from one that has imported the big libraries.

The ranks, their guards and workers are the real ones, in processes of their own that signals stop and kill; only the
imports, seconds for each process, are spared. What torchrun does for a run, an agent does here: it starts the ranks,
passes signals on, and ends all when one fails. test_torchrun.py and test_runs.py have the real torchrun.

`run_many` has the same processes make one run after another; see many_runs.py.

A test may change what a process does, before it begins, by a function `prepare(rank, life)`: `life` is 0 for the first
process of a rank, 1 for the one that took its place, and so on; the orchestrator is rank 0, life -1.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from conf.schema import PlacementKind, RunConfig, to_plain
from tests.multiprocess import many_runs
from tests.multiprocess.process_group import PRELOADED

MORE_PRELOADED = [
    "launch.run",
    "launch.processes.guard",
    "launch.processes.company",
    "launch.processes.worker_process",
    "transformers.models.llama",
]
ORCHESTRATOR = -1
DEADLINE_SECONDS = 60.0
MANY_RUNS_SECONDS = 180.0
Prepare = Callable[[int, int], None]


def nothing(rank: int, life: int) -> None:
    """As in production."""


@dataclass
class ForkedRun:
    """A run in the background; `folder` has all it leaves."""

    folder: Path
    agent: multiprocessing.process.BaseProcess

    @property
    def output(self) -> str:
        return (self.folder / "stdout").read_text()

    @property
    def errors(self) -> list[str]:
        """Lines of the standard error of all processes."""
        return (self.folder / "stderr").read_text().splitlines()

    @property
    def result(self) -> dict:
        return json.loads((self.folder / "run" / "result.json").read_text())

    @property
    def exit_codes(self) -> dict[int, int]:
        """Of each rank that has ended; negative: by that signal."""
        return {int(rank): code for rank, code in json.loads((self.folder / "codes").read_text()).items()}

    def log_of(self, rank: int) -> str:
        return "".join(path.read_text() for path in (self.folder / "run" / "logs").glob(f"rank{rank}-*.log"))

    def pid_of(self, rank: int, life: int | None = None) -> int:
        """Of the process that torchrun would have started, or of its worker."""
        name = f"rank-{rank}" if life is None else f"worker-{rank}-{life}"
        wait_until(lambda: (self.folder / name).exists(), f"process {name}")
        return int((self.folder / name).read_text())

    @property
    def pids(self) -> list[int]:
        """Of all processes that the run had."""
        patterns = ("rank-*", "guard-*", "worker-*")
        return [int(path.read_text()) for pattern in patterns for path in self.folder.glob(pattern)]

    def living(self) -> list[int]:
        return [pid for pid in self.pids if is_alive(pid)]

    def wait_for_output(self, text: str) -> None:
        wait_until(lambda: text in self.output, f"{text!r} in the output", self.report)

    def wait(self, seconds: float = DEADLINE_SECONDS) -> None:
        """Until all ranks have ended. Raises TimeoutError."""
        self.agent.join(seconds)
        if self.agent.exitcode is None:
            raise TimeoutError(f"the run has not ended after {seconds:g} s:\n{self.report()}")

    def report(self) -> str:
        """What there is to see, for the message of a failed test."""
        logs = "".join(path.read_text() for path in sorted((self.folder / "run").glob("logs/*.log")))
        return "\n".join([self.output, *self.errors, logs])

    def end(self) -> None:
        """Kills what is left."""
        for pid in [self.agent.pid, *self.pids]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.agent.join()


def start(
    folder: Path,
    overrides: list[str],
    num_ranks: int,
    prepare: Prepare = nothing,
    absent: tuple[int, ...] = (),
) -> ForkedRun:
    """`prepare` is a function of a module: it is found there by its name. Ranks that are `absent` are never started."""
    program = partial(_run_program, [*overrides, f"hydra.run.dir={folder / 'run'}"])
    return _start(folder, program, num_ranks, prepare, absent)


@dataclass(kw_only=True)
class Case:
    """One of several runs."""

    config: RunConfig
    prompt: list[int]
    num_tokens: int
    seed: int = 0


def run_many(folder: Path, kind: PlacementKind, num_ranks: int, cases: dict[str, Case]) -> dict[str, Any]:
    """What many_runs.py found out about each case, by name."""
    told = {name: [to_plain(case.config), case.prompt, case.num_tokens, case.seed] for name, case in cases.items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(told))
    run = _start(folder, partial(many_runs.main, folder, kind), num_ranks)
    try:
        run.wait(MANY_RUNS_SECONDS)
    finally:
        run.end()
    assert run.exit_codes == dict.fromkeys(range(num_ranks), 0), run.report()
    return json.loads((folder / "results.json").read_text())


def _start(
    folder: Path,
    program: Callable[[], int],
    num_ranks: int,
    prepare: Prepare = nothing,
    absent: tuple[int, ...] = (),
) -> ForkedRun:
    """Every rank calls `program`, as each process of torchrun starts one."""
    multiprocessing.set_forkserver_preload(PRELOADED + MORE_PRELOADED)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("stdout", "stderr"):
        (folder / name).touch()
    agent = multiprocessing.get_context("forkserver").Process(
        target=_agent, args=(folder, program, num_ranks, prepare, absent)
    )
    agent.start()
    return ForkedRun(folder, agent)


def wait_until(holds: Callable[[], bool], what: str, explain: Callable[[], str] = str) -> None:
    """Raises TimeoutError."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {what} after {DEADLINE_SECONDS:g} s\n{explain()}")
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """A process that has ended and waits for someone to take note of it is none."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# ---- In the agent. ----


def _agent(folder: Path, program: Callable[[], int], num_ranks: int, prepare: Prepare, absent: tuple[int, ...]) -> None:
    os.setsid()
    _die_with_parent()
    for name, stream in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_APPEND), stream)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    of_run = {"WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in of_run.items()} | {"TMPDIR": _made(folder / "tmp")}
    ranks, codes = {}, {}
    for rank in sorted(set(range(num_ranks)) - set(absent)):
        pid = _fork(lambda rank=rank: _rank(folder, rank, program, prepare))
        ranks[pid] = rank
        (folder / f"rank-{rank}").write_text(str(pid))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: _tell(ranks, number))
    while ranks:
        pid, status = os.waitpid(-1, 0)
        codes[ranks.pop(pid)] = os.waitstatus_to_exitcode(status)
        (folder / "codes").write_text(json.dumps(codes))
        if any(codes.values()):
            _tell(ranks, signal.SIGTERM)


def _die_with_parent() -> None:
    """A test that is killed leaves nothing behind."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _made(folder: Path) -> str:
    folder.mkdir()
    return str(folder)


def _tell(pids: dict[int, int], number: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _fork(act: Callable[[], int | None]) -> int:
    """The pid of a process that does this and ends."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        code = act() or 0
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        os._exit(code)


# ---- In a rank, and in its worker. ----


def _run_program(overrides: list[str]) -> int:
    from launch import run

    sys.argv = ["launch/run.py", *overrides]
    return run.main(overrides)


def _rank(folder: Path, rank: int, program: Callable[[], int], prepare: Prepare) -> int:
    _die_with_parent()
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
    if rank == 0:
        prepare(0, ORCHESTRATOR)
    subprocess.Popen = partial(_Forked, folder, rank, prepare, iter(range(1000)))
    return program()


class _Forked:
    """What launch.processes needs of subprocess.Popen: the worker of a rank's guard, or the guard of rank 0."""

    def __init__(
        self,
        folder: Path,
        rank: int,
        prepare: Prepare,
        lives: Iterator[int],
        command: list[str],
        *,
        env: dict[str, str],
        pass_fds: tuple[int, ...] = (),
        preexec_fn: Callable[[], None] = lambda: None,
        start_new_session: bool,
    ):
        self.returncode: int | None = None
        is_guard = command[-1].removesuffix(".py").endswith("guard")  # a file, or a module by -m
        life = None if is_guard else next(lives)

        def act() -> int:
            preexec_fn()
            os.setsid()
            os.environ.clear()
            os.environ.update(env)
            if is_guard:
                from launch.processes.guard import Guard

                return Guard(0.0).run()
            prepare(rank, life)
            from launch.processes import worker_process

            return worker_process.main()

        self.pid = _fork(act)
        (folder / (f"guard-{rank}" if is_guard else f"worker-{rank}-{life}")).write_text(str(self.pid))

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + (1e9 if timeout is None else timeout)
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("worker", timeout)
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
