"""Faults for tests.multiprocess.forked_runs: what goes wrong in which process, at which call of which method."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch

PIPELINE_DRAFTER, PIPELINE_RETRIEVER = 1, 2
SOON = 3
"""The call of a method at which things go wrong: by then the run is under way."""


def before(owner: type, method: str, act: Callable[[], None], call: int = SOON) -> None:
    """`act()` is done in this process before the method's n-th call."""
    original, calls = getattr(owner, method), iter(range(1, 1 << 30))

    def wrapped(self, *args, **kwargs):
        if next(calls) == call:
            act()
        return original(self, *args, **kwargs)

    setattr(owner, method, wrapped)


def changed(owner: type, method: str, change: Callable) -> None:
    """The method returns `change(what it returned)`."""
    original = getattr(owner, method)
    setattr(owner, method, lambda self, *args, **kwargs: change(original(self, *args, **kwargs)))


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def spin() -> None:
    """Lives, and comes to nothing."""
    while True:
        time.sleep(0.01)


def fail() -> None:
    raise OSError("injected")


def restarted_are_waited_for() -> None:
    """In the orchestrator: a round without the lost one, then none before it is there again."""
    from orchestrator.hierarchy import Hierarchy

    original, rounds_without = Hierarchy.round, [0]

    def wrapped(self):
        crew = self.verifier._crew
        lost = [member for member in crew.members.values() if member.back_by is not None]
        rounds_without[0] = rounds_without[0] + 1 if lost else 0
        while rounds_without[0] > 1 and any(member.back_by is not None for member in crew.members.values()):
            crew.pump(0.05)
        return original(self)

    Hierarchy.round = wrapped


# ---- Of the drafter. ----


def unlucky_drafter(rank: int, life: int) -> None:
    """Killed, stopped, stuck, and killed again."""
    from workers.drafter import Drafter

    if rank == 0:
        restarted_are_waited_for()
    if rank == PIPELINE_DRAFTER:
        before(Drafter, "propose", (kill, stop, spin, kill)[life])


def drafter_killed_while_idle(rank: int, life: int) -> None:
    """By the verifier, whose prefill is under way."""
    from workers.target_verifier import TargetVerifier

    if rank == 0:
        restarted_are_waited_for()
    if rank == 3:
        pid_file = Path(os.environ["TMPDIR"]).parent / f"worker-{PIPELINE_DRAFTER}-0"
        before(TargetVerifier, "prefill", lambda: os.kill(int(pid_file.read_text()), signal.SIGKILL), call=1)


def drafts_of_nonsense(rank: int, life: int) -> None:
    """Ids that are in no vocabulary, on both sides of it."""
    from workers.drafter import Drafter

    def nonsense(draft):
        draft.tokens = [(-1, 96, 1 << 40)[index % 3] for index in range(len(draft))]
        return draft

    if rank == PIPELINE_DRAFTER:
        changed(Drafter, "propose", nonsense)


def broken_distributions(rank: int, life: int) -> None:
    """Sums of two, zeros, NaN, too few of them: in turn."""
    from workers.drafter import Drafter

    breaks = (lambda p: 2 * p, torch.zeros_like, lambda p: p * float("nan"), lambda p: p[:1])
    turns = iter(range(1 << 30))

    def broken(draft):
        draft.probs = [breaks[next(turns) % len(breaks)](probs) for probs in draft.probs]
        return draft

    if rank == PIPELINE_DRAFTER:
        changed(Drafter, "propose", broken)


def drafter_of_nan(rank: int, life: int) -> None:
    """Its logits are not finite."""
    from workers.drafter import Drafter

    if rank == PIPELINE_DRAFTER:
        changed(Drafter, "logits_after", lambda logits: logits * float("nan"))


# ---- Of the retriever. ----


def unlucky_retriever(rank: int, life: int) -> None:
    """Killed, raising, stopped; then well."""
    from workers.retrieval_drafter import RetrievalDrafter

    if rank == 0:
        restarted_are_waited_for()
    if rank == PIPELINE_RETRIEVER and life < 3:
        before(RetrievalDrafter, "extend", (kill, fail, stop)[life])


# ---- Of a rank of the verifier. ----


def _in_a_sum(rank: int, victim: int, act: Callable[[], None]) -> None:
    from workers.parallel.collectives import SharedMemoryAllReduce

    if rank == victim:
        before(SharedMemoryAllReduce, "_meet", act, call=60)


def _before_a_verification(rank: int, victim: int, act: Callable[[], None]) -> None:
    from workers.target_verifier import TargetVerifier

    if rank == victim:
        before(TargetVerifier, "verify", act)


def first_verifier_killed(rank: int, life: int) -> None:
    _in_a_sum(rank, 3, kill)


def second_verifier_killed(rank: int, life: int) -> None:
    _in_a_sum(rank, 4, kill)


def second_verifier_stopped(rank: int, life: int) -> None:
    _in_a_sum(rank, 4, stop)


def first_verifier_stuck(rank: int, life: int) -> None:
    _before_a_verification(rank, 3, spin)


def damaged_block_of_second_verifier(rank: int, life: int) -> None:
    """One read of its disk gives another block than was written."""
    from tiers.disk_tier import DiskBlocks

    read, reads = DiskBlocks.read_into, iter(range(1 << 30))

    def read_into(blocks, index, buffer):
        if next(reads) == 10:
            blocks._checksums[index] ^= 1
        read(blocks, index, buffer)

    if rank == 4:
        DiskBlocks.read_into = read_into


def second_verifier_raises(rank: int, life: int) -> None:
    _before_a_verification(rank, 4, fail)


def other_token_of_second_verifier(rank: int, life: int) -> None:
    """Committed long ago, so that the verdict stays what it was: only the digest tells."""
    from workers.target_verifier import TargetVerifier

    verify, calls = TargetVerifier.verify, iter(range(1, 1 << 30))

    def faulty(verifier, draft):
        if next(calls) == SOON:
            verifier.committed[0] ^= 1
            verifier._num_digested = 0
        return verify(verifier, draft)

    if rank == 4:
        TargetVerifier.verify = faulty


def drafter_refuses_its_weights(rank: int, life: int) -> None:
    from conf.schema import ConfigError
    from launch.assembly.role_builder import RoleBuilder

    def refuse() -> None:
        raise ConfigError("model.drafter is 'x', whose weights cannot be read") from OSError("injected")

    if rank == PIPELINE_DRAFTER:
        before(RoleBuilder, "drafter", refuse, call=1)


def second_verifier_raises_while_loading(rank: int, life: int) -> None:
    from launch.assembly.role_builder import RoleBuilder

    if rank == 4:
        before(RoleBuilder, "load_target", fail, call=1)


def verifier_paused(rank: int, life: int) -> None:
    """Stopped, and continued a second later by another process."""
    from workers.target_verifier import TargetVerifier

    def pause() -> None:
        target = os.getpid()
        if os.fork() == 0:
            time.sleep(1.0)
            os.kill(target, signal.SIGCONT)
            os._exit(0)
        stop()

    if rank == 4:
        before(TargetVerifier, "verify", pause)


def slow_verifier(rank: int, life: int) -> None:
    """So that a test has time to act."""
    from workers.target_verifier import TargetVerifier

    if rank > PIPELINE_RETRIEVER:
        changed(TargetVerifier, "verify", _slowly)


def _slowly(verdict):
    time.sleep(0.1)
    return verdict


def second_verifier_stuck(rank: int, life: int) -> None:
    """And says so."""

    def act() -> None:
        Path(os.environ["TMPDIR"]).with_name("stuck").touch()
        spin()

    _before_a_verification(rank, 4, act)
