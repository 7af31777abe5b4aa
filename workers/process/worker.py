"""The process of a worker: builds its roles, then serves each of them in a thread of its own.

    thread            line               does
    main              <rank>.process     build, attach shared memory, report, end
    one for a role    <rank>.<role>      what the orchestrator asks of the role, in order
    beat              <rank>.beat        heartbeats with progress; ends the process at once when told to, and when the
                                         orchestrator is gone: a process that nobody directs must not live on

The threads of one process share its weights. Only the main thread builds; a role is idle then.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, Protocol

import torch

from conf.schema import ConfigError
from workers.messages import (
    Attach,
    Beat,
    Build,
    Built,
    Call,
    Close,
    Commit,
    Draft,
    Extend,
    Failure,
    InnerStep,
    MakeReport,
    MakeUpdate,
    NeedsRebuild,
    Plain,
    Prefill,
    Propose,
    Reply,
    Request,
    Reread,
    Result,
    Survey,
    TakeUpdate,
    Verify,
)
from workers.process.background import OwnStream
from workers.process.channel import ChannelError, Line, PingListener
from workers.process.peers import BEAT, PROCESS
from workers.process.tensor_frames import from_raw, to_raw

logger = logging.getLogger(__name__)

BEAT_SECONDS = 0.5
MAX_SILENCE_SECONDS = 4.0
"""Longest silence of an orchestrator on another host: eight times its pings."""
NOBODY_DIRECTS = 4
"""Exit code of a process whose orchestrator is gone."""


class RoleSet(Protocol):
    """The roles of one process, as `build` makes them, and what they have in common; launch has the real one."""

    roles: dict[str, Any]
    """Roles by name; each has the methods that its requests call (see `respond`)."""
    notes: list[str]
    """Remarks for the user."""
    shared: dict[str, Any]
    """Descriptions of memory that other processes may attach; see workers.messages.Built."""
    is_first_shard: bool
    """True for the one of several ranks that do the same whose answers are used."""
    device: torch.device
    """Device on which the roles compute."""

    def attach(self, shared: dict[str, Any]) -> bool:
        """Maps memory that others share; False where it is gone with the process that had it."""

    def report(self) -> dict[str, Any]:
        """Memory and streaming, for result.json."""

    def progress(self) -> tuple[int, int, int]:
        """A count that grows while anything is computed; the prompt's tokens that were read, and all of them."""

    def waits_for_others(self) -> bool:
        """True while a thread is in a sum over ranks."""

    def close(self) -> None: ...


def respond(role: Any, request: Request) -> Result:
    """Calls the method of a role that a request stands for. Raises TypeError for a request to the process."""
    result: Result
    match request:
        case Prefill():
            result = Plain(role.prefill(request.tokens, request.num_commits))
        case Commit():
            result = Plain(role.commit(request.tokens))
        case Propose():
            result = role.propose(request.after, request.count, request.branch)
        case Extend():
            result = role.extend(request.after, request.draft, request.branch)
        case Verify():
            result = role.verify(request.draft)
        case MakeUpdate():
            result = role.retrieval_update(rebuild=request.rebuild, budget=request.budget)
        case TakeUpdate():
            result = Plain(role.refresh(request.notices))
        case NeedsRebuild():
            result = Plain(role.needs_rebuild())
        case Reread():
            result = Plain(role.reread())
        case _:
            raise TypeError(f"{type(request).__name__} is for no role")
    return result


class Worker:
    """Serves the roles of this process.

    `connect(line)` opens a Line of that name; `build(config, assignment)` makes a RoleSet, whose roles then have a
    _RoleThread each. `survey(device, disk folder)` tells the free bytes of each tier, and what else the orchestrator
    wants to know.
    """

    def __init__(
        self,
        connect: Callable[..., Line],
        pings: Callable[[], PingListener],
        survey: Callable[[str, str], dict[str, int]],
        build: Callable[[dict[str, Any], dict[str, Any]], RoleSet],
    ):
        self._connect, self._make_pings, self._survey, self._build = connect, pings, survey, build
        self._role_set: RoleSet | None = None
        self._threads: dict[str, _RoleThread] = {}
        self._busy_with = ""

    def run(self) -> None:
        """Serves until it is told to end."""
        threading.Thread(target=self._beat, name=BEAT, daemon=True).start()
        line = self._connect(PROCESS, to_raw, from_raw)
        try:
            while not isinstance(message := line.receive(), Close):
                if isinstance(message, Call):
                    self._busy_with = type(message.request).__name__
                    line.send(_answer(message, lambda: self._act(message.request)))
                    self._busy_with = ""
        finally:
            self._end_roles()
            line.close()

    def _act(self, request: Request) -> Result:
        match request:
            case Survey():
                return Plain(self._survey(request.device, request.disk_folder))
            case Build():
                return self._build_roles(request)
            case Attach():
                return Plain(self._built().attach(request.shared))
            case MakeReport():
                return Plain(self._built().report())
        raise TypeError(f"{type(request).__name__} is for a role")

    def _built(self) -> RoleSet:
        assert self._role_set is not None, "asked before there is a role"
        return self._role_set

    def _build_roles(self, request: Build) -> Built:
        self._end_roles()
        began = time.monotonic()
        role_set = self._role_set = self._build(request.config, request.assignment)
        for name, role in role_set.roles.items():
            line = self._connect  # in its thread: a socket belongs to the one that made it
            stream = OwnStream(role_set.device)
            self._threads[name] = _RoleThread(name, role, line, stream, strips_probs=not role_set.is_first_shard)
        roles = ", ".join(role_set.roles) or "no role"
        logger.info("%s on %s, built in %.1f s", roles, role_set.device, time.monotonic() - began)
        return Built(role_set.notes, role_set.shared)

    def _end_roles(self) -> None:
        for thread in self._threads.values():
            thread.tell_to_end()
        for thread in self._threads.values():
            thread.join()
        self._threads.clear()
        if self._role_set is not None:
            self._role_set.close()
            self._role_set = None
            logger.info("ended")

    # ---- The heartbeat. ----

    def _beat(self) -> None:
        line, pings = self._connect(BEAT), self._make_pings()
        while True:
            message = line.receive(BEAT_SECONDS)
            if isinstance(message, Close):
                if message.at_once:
                    os._exit(0)
                return line.close()
            if pings.seconds_of_silence() > MAX_SILENCE_SECONDS:
                print("the orchestrator is gone", file=sys.stderr, flush=True)
                os._exit(NOBODY_DIRECTS)
            line.send(self._state())

    def _state(self) -> Beat:
        role_set, busy = self._role_set, self._busy_with
        if role_set is None:
            # Loading weights is no count that could stand still: start_timeout_s watches it.
            return Beat(time.monotonic_ns(), busy)
        busy = " ".join([busy, *(thread.busy_with for thread in list(self._threads.values()) if thread.busy_with)])
        count, done, total = role_set.progress()
        return Beat(count, busy.strip(), done, total, role_set.waits_for_others())


class _RoleThread:
    """The thread that serves one role, with a line of its own.

    With `strips_probs` drafts go out without distributions: another rank, which does the same, sends them.
    """

    def __init__(self, name: str, role: Any, connect: Callable[..., Line], stream: OwnStream, *, strips_probs: bool):
        self._name, self._role, self._connect = name, role, connect
        self._stream, self._strips_probs = stream, strips_probs
        self._stop = threading.Event()
        self.busy_with = ""
        self._thread = threading.Thread(target=self._run, name=name)
        self._thread.start()

    def _run(self) -> None:
        self._stream.enter_thread()
        line = self._connect(self._name, to_raw, from_raw)
        while not self._stop.is_set():
            try:
                message = line.receive(BEAT_SECONDS)
            except (ChannelError, ValueError):
                logger.exception("%s: a message that cannot be read", self._name)
                continue
            if isinstance(message, Call):
                self.busy_with = type(message.request).__name__
                line.send(_answer(message, lambda: self._act(message.request), self._state))  # noqa: B023
                self.busy_with = ""
        line.close()

    def _act(self, request: Request) -> Result:
        with self._stream.call():
            result = respond(self._role, request)
        if self._strips_probs and isinstance(result, InnerStep):
            result.draft = Draft(tokens=result.draft.tokens, origins=result.draft.origins)
        return result

    def _state(self) -> str:
        """State of a role that several ranks may play, to be compared; empty for one without a cached model."""
        return self._role.state() if hasattr(self._role, "state") else ""

    def tell_to_end(self) -> None:
        """Tells the thread to end when it has done what it is doing."""
        self._stop.set()

    def join(self) -> None:
        self._thread.join()


def _answer(call: Call, act: Callable[[], Result], state: Callable[[], str] = lambda: "") -> Reply | Failure:
    """The answer to a call: what `act` returns, with the role's state afterwards, or what it raises."""
    try:
        return Reply(call.id, act(), state())
    except Exception as error:  # whatever it is, it must reach the orchestrator, which decides
        logger.exception("%s failed", type(call.request).__name__)
        root: BaseException = error
        while root.__cause__ is not None and not isinstance(root, ConfigError):  # which is a message to the user
            root = root.__cause__
        text = (str(root).splitlines() or [""])[0]
        return Failure(call.id, type(root).__name__, text, traceback.format_exc())
