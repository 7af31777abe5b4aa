"""workers/background.py: a verification beside its caller; a role has as many processor threads as its maker."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from workers.background import InBackground, OwnStream
from workers.messages import Draft, Verdict

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


def test_a_role_computes_with_as_many_threads_as_its_maker():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        slow = SlowVerifier()
        slow.may_go_on.set()
        background, stream = InBackground(slow, CPU), OwnStream(CPU)
        copying_thread_has_begun()
        assert in_a_thread() == 1, "what the test is about: a plain thread has what was set last"
        background.begin_verify(Draft(tokens=[1]))
        background.finish_verify()
        background.close()
        copying_thread_has_begun()
        assert in_a_thread(stream.enter_thread) == 3 == slow.num_threads
    finally:
        torch.set_num_threads(before)
