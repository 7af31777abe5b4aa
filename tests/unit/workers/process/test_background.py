"""workers/process/background.py: a verification beside its caller; a role has its maker's number of threads."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch

from workers.messages import Draft, Verdict
from workers.process.background import InBackground, OwnStream
from workers.process.openmp import release_pool

CPU = torch.device("cpu")


class SlowVerifier:
    """Verifies when it is let."""

    def __init__(self):
        self.may_go_on, self.num_threads, self.is_done = threading.Event(), 0, False

    def verify(self, draft: Draft) -> Verdict:
        self.num_threads = torch.get_num_threads()
        assert self.may_go_on.wait(10)
        self.is_done = True
        if not draft.tokens:
            raise ValueError("nothing to verify")
        return Verdict(num_accepted=len(draft), next_token=threading.get_ident())

    def commit(self, tokens: list[int]) -> int:
        return threading.get_ident()


@pytest.fixture
def verifier():
    slow = SlowVerifier()
    background = InBackground(slow, CPU)
    yield slow, background
    slow.may_go_on.set()
    background.close()


def test_verifies_while_its_caller_goes_on(verifier):
    slow, background = verifier
    background.begin_verify(Draft(tokens=[1]))
    assert background.is_verifying()
    slow.may_go_on.set()
    verdict = background.finish_verify()
    assert verdict.num_accepted == 1 and verdict.next_token != threading.get_ident()
    assert not background.is_verifying()


def test_all_else_is_done_in_the_callers_thread(verifier):
    assert verifier[1].commit([1]) == threading.get_ident()


def test_what_a_verification_raises_its_caller_gets(verifier):
    slow, background = verifier
    slow.may_go_on.set()
    background.begin_verify(Draft())
    with pytest.raises(ValueError, match="nothing to verify"):
        background.finish_verify()


def test_close_waits_for_a_verification_that_nobody_finishes(verifier):
    slow, background = verifier
    background.begin_verify(Draft(tokens=[1]))
    slow.may_go_on.set()
    background.close()
    assert slow.is_done


def in_a_thread(begin: Callable[[], None] = lambda: None) -> int:
    """Processor threads of a new thread."""
    with ThreadPoolExecutor(1, initializer=begin) as threads:
        return threads.submit(torch.get_num_threads).result()


def copying_thread_has_begun() -> None:
    in_a_thread(lambda: torch.set_num_threads(1))


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_a_role_computes_with_as_many_threads_as_its_maker(set_threads):
    set_threads(3)
    stream = OwnStream(CPU)
    copying_thread_has_begun()
    assert in_a_thread() == 1, "what the test is about: a plain thread has what was set last"
    assert in_a_thread(stream.enter_thread) == 3


@pytest.mark.parametrize(("num_threads", "beside", "own"), [(1, 1, 1), (2, 1, 1), (4, 2, 2), (5, 2, 3)])
@pytest.mark.parametrize("draft", [Draft(tokens=[1]), Draft()], ids=["verified", "failed"])
def test_a_verification_and_its_caller_share_the_threads(set_threads, draft, num_threads, beside, own):
    set_threads(num_threads)
    slow = SlowVerifier()
    background = InBackground(slow, CPU)
    copying_thread_has_begun()
    background.begin_verify(draft)
    assert torch.get_num_threads() == beside
    slow.may_go_on.set()
    with suppress(ValueError):
        background.finish_verify()
    background.close()
    assert slow.num_threads == own and torch.get_num_threads() == num_threads


def num_threads_of_process() -> int:
    return len(os.listdir("/proc/self/task"))


def settles_at(wanted: int) -> bool:
    """Threads end a moment after they were told."""
    until = time.monotonic() + 5
    while num_threads_of_process() != wanted and time.monotonic() < until:
        time.sleep(0.01)
    return num_threads_of_process() == wanted


def test_a_pool_that_is_released_is_gone_and_comes_again(set_threads):
    set_threads(3)
    release_pool()
    rows = torch.rand(1 << 20)
    time.sleep(0.1)
    before = num_threads_of_process()
    for _ in range(2):
        rows.exp()
        assert settles_at(before + 2)
        release_pool()
        assert settles_at(before)
