"""Roles that live in other processes, with the methods of orchestrator.roles: the loop knows no processes.

Drafter and retriever may die: then they draft nothing, and the run goes on, losslessly, with what is left. When such a
process is back it is told the committed tokens again. A verifier's ranks all do the same and must agree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from orchestrator.calls import RoleLostError, RunFailedError
from orchestrator.crew import Crew
from orchestrator.placement import DRAFTER_ROLE, RETRIEVER_ROLE, VERIFIER_ROLE
from workers.messages import (
    Built,
    Commit,
    Draft,
    Extend,
    InnerStep,
    MakeUpdate,
    NeedsRebuild,
    Plain,
    Prefill,
    Propose,
    Reply,
    Request,
    Reread,
    Result,
    TakeUpdate,
    UpdateNotice,
    Verdict,
    Verify,
)
from workers.process.peers import peer_name, rank_of

Answer = TypeVar("Answer", bound=Result)


def _agreed(role: str, peers: list[str], request: Request, replies: list[Reply], kind: type[Answer]) -> Answer:
    """The answer, of type `kind`, of all ranks that play a role.

    Raises RunFailedError where they do not agree, or their states do not any more.
    """
    answers = [(_comparable(reply.result), reply.state) for reply in replies]
    for peer, answer in zip(peers, answers, strict=True):
        if answer != answers[0]:
            both = " has ".join([peers[0], f"{answers[0]}, {peer}", f"{answer}"])
            raise RunFailedError(role, rank_of(peer), f"ranks disagree after {type(request).__name__}: {both}")
    result = replies[0].result
    assert isinstance(result, kind), f"{type(request).__name__} was answered by {result!r}"
    return result


def _comparable(result: Result) -> Any:
    """The part of a result that ranks must agree on: all but distributions, which come from the first rank alone."""
    if isinstance(result, InnerStep):
        return result.draft.tokens, result.num_accepted
    return result.tokens if isinstance(result, Draft) else result


class _OptionalRole:
    """A role that the run can do without; `ranks` play it together."""

    def __init__(self, crew: Crew, role: str, ranks: tuple[int, ...]):
        self._crew, self._peers, self._role = crew, [peer_name(rank, role) for rank in ranks], role
        self._members = [crew.members[rank] for rank in ranks]
        self._committed: list[int] = []
        self._num_commits = 0
        self._is_reading = False
        # Whose ranks verify, too, is watched as they are: there is no going on without it.
        self._timeout_s = None if any(member.is_verifier for member in self._members) else crew.limits.draft_s
        crew.on_return[role] = self._on_return

    @property
    def is_there(self) -> bool:
        """Whether the processes of all its ranks are there and can be told something."""
        return not any(member.is_lost for member in self._members)

    @property
    def _can_be_asked(self) -> bool:
        """Whether it is there and has read all committed tokens."""
        return self.is_there and not self._is_reading

    def prefill(self, prompt: list[int]) -> None:
        self._committed, self._num_commits = list(prompt), 0
        self._post(Prefill(self._committed, 0))

    def commit(self, tokens: list[int]) -> None:
        self._committed += tokens
        self._num_commits += 1
        self._post(Commit(tokens))

    def _on_return(self, built: Built) -> None:
        self._is_reading = True
        self._post(Prefill(self._committed, self._num_commits), then=self._on_read)

    def _on_read(self, result: Result) -> None:
        self._is_reading = False
        self._crew.note(f"{self._role} is back")

    def _post(self, request: Request, then: Callable[[Result], None] = lambda result: None) -> None:
        """Asks without waiting; the answer comes before those to later calls."""
        if self.is_there:
            for peer in self._peers:
                self._crew.post(peer, request, then=then)

    def _ask(self, request: Request, kind: type[Answer]) -> Answer | None:
        """The answer, of type `kind`; None where the role is out of order."""
        if not self._can_be_asked:
            return None
        try:
            replies = self._crew.ask(self._peers, request, self._timeout_s)
        except RoleLostError:
            return None
        return _agreed(self._role, self._peers, request, replies, kind)


class RemoteDrafter(_OptionalRole):
    """The drafter in another process; see orchestrator.roles.DrafterRole."""

    def __init__(self, crew: Crew, rank: int):
        super().__init__(crew, DRAFTER_ROLE, (rank,))

    def propose(self, after: list[int], count: int, branch: int = 0) -> Draft:
        return self._ask(Propose(after, count, branch), Draft) or Draft()


class RemoteRetriever(_OptionalRole):
    """The retriever in another process, or in those of the verifier; see orchestrator.roles.RetrieverRole.

    `on_return(built)` connects a restarted one with the verifier; False where its memory is gone again.
    """

    def __init__(self, crew: Crew, ranks: tuple[int, ...], on_return: Callable[[Built], bool]):
        super().__init__(crew, RETRIEVER_ROLE, ranks)
        self._connect = on_return
        self._returned: Built | None = None

    def extend(self, after: list[int], draft: Draft, branch: int = 0) -> InnerStep:
        nothing = InnerStep(draft=Draft(), num_proposed=len(draft), num_accepted=0)
        # One that has just come back has an empty cache until the next refresh.
        return nothing if self._returned else self._ask(Extend(after, draft, branch), InnerStep) or nothing

    def needs_rebuild(self) -> bool:
        if self._returned is not None and self._can_be_asked and self._connect(self._returned):
            self._returned = None
            return True
        result = self._ask(NeedsRebuild(), Plain)
        return result is not None and bool(result.value)

    def refresh(self, notices: list[UpdateNotice]) -> None:
        # It may have come back since the verifier was asked: what it is not connected to, it cannot take.
        if self._returned is None:
            self._ask(TakeUpdate(notices), Plain)

    def _on_return(self, built: Built) -> None:
        super()._on_return(built)
        self._returned = built


class RemoteVerifier:
    """The verifier in other processes, all of which are asked and must answer alike.

    See orchestrator.roles.BackgroundVerifierRole.
    """

    def __init__(self, crew: Crew, ranks: tuple[int, ...]):
        self._crew = crew
        self._peers = [peer_name(rank, VERIFIER_ROLE) for rank in ranks]
        self._verify = Verify(Draft())
        self._verification: list[int] = []

    def prefill(self, prompt: list[int]) -> None:
        self._ask(Prefill(prompt, 0), Plain)

    def verify(self, draft: Draft) -> Verdict:
        return self._ask(Verify(draft), Verdict)

    def begin_verify(self, draft: Draft) -> None:
        self._verify = Verify(draft)
        self._verification = self._crew.post_all(self._peers, self._verify)

    def is_verifying(self) -> bool:
        return not self._crew.are_answered(self._verification)

    def finish_verify(self) -> Verdict:
        replies = self._crew.wait_all(self._verification)
        return _agreed(VERIFIER_ROLE, self._peers, self._verify, replies, Verdict)

    def commit(self, tokens: list[int]) -> None:
        for peer in self._peers:
            self._crew.post(peer, Commit(tokens), then=lambda result: None)

    def retrieval_update(self, *, rebuild: bool, budget: int | None = None) -> list[UpdateNotice]:
        results = [reply.result for reply in self._crew.ask(self._peers, MakeUpdate(rebuild, budget))]
        notices = [result for result in results if isinstance(result, UpdateNotice)]
        assert len(notices) == len(results), f"an update was answered by {results}"
        return notices

    def reread(self) -> None:
        self._ask(Reread(), Plain)

    def _ask(self, request: Request, kind: type[Answer]) -> Answer:
        return _agreed(VERIFIER_ROLE, self._peers, request, self._crew.ask(self._peers, request), kind)
