"""Messages between levels and between processes, typed. Loads without torch.

Between levels: a draft goes up, a verdict comes back. Between processes: the orchestrator asks (`Call`), a worker
answers (`Reply`, `Failure`) and tells how it is (`Hello`, `Beat`, `Ended`). How they travel: workers.process.channel.
"""

from __future__ import annotations

from typing import Any

import msgspec

PROTOCOL_VERSION = 1
"""Raised with every change of these types: processes of different versions refuse each other."""

DRAFTER, RETRIEVAL, TARGET = "drafter", "retrieval", "target"
NO_TOKEN = -1


# ---- Between levels. ----


class Draft(msgspec.Struct, kw_only=True, tag=True):
    """Proposed tokens, in order, each with the distribution it was drawn from."""

    tokens: list[int] = []
    origins: list[str] = []
    """The level that first proposed each token."""
    probs: list[Any] | None = None
    """One tensor [vocabulary] for each token; None where acceptance is by equality (gumbel, greedy)."""
    runners_up: list[int] = []
    """The next best token in the place of each, for drafting ahead, else empty; NO_TOKEN where there is none."""
    closeness: list[float] = []
    """How close each runner-up comes to its token, between 0 and 1."""

    def __len__(self) -> int:
        return len(self.tokens)

    def extend(self, other: Draft) -> None:
        """Appends `other`, which continues this draft."""
        self.tokens += other.tokens
        self.origins += other.origins
        self.runners_up += other.runners_up
        self.closeness += other.closeness
        if other.probs is not None:
            self.probs = (self.probs or []) + other.probs

    def cut(self, count: int) -> Draft:
        """The first `count` tokens."""
        return self._part(slice(0, count))

    def without_first(self) -> Draft:
        """All tokens but the first."""
        return self._part(slice(1, None))

    def _part(self, part: slice) -> Draft:
        return Draft(
            tokens=self.tokens[part],
            origins=self.origins[part],
            probs=None if self.probs is None else self.probs[part],
            runners_up=self.runners_up[part],
            closeness=self.closeness[part],
        )

    def runner_up(self, index: int) -> int | None:
        """The runner-up of the token `index`, or None where it is not known."""
        known = index < len(self.runners_up) and self.runners_up[index] != NO_TOKEN
        return self.runners_up[index] if known else None


class Verdict(msgspec.Struct, kw_only=True, tag=True):
    """Judgement of a draft by the verifying level: it keeps a prefix and adds one token of its own."""

    num_accepted: int
    next_token: int


class InnerStep(msgspec.Struct, kw_only=True, tag=True):
    """One verification by the retrieval draft: the tokens it hands up and how the drafter fared."""

    draft: Draft
    num_proposed: int
    num_accepted: int


class UpdateNotice(msgspec.Struct, kw_only=True, tag=True):
    """Tells of true keys and values for the retrieval cache, by one rank of the verifier; see process.update_path."""

    is_rebuild: bool
    length: int
    """Tokens of the sequence that the retrieval cache holds, or follows, after the update."""
    start: int = 0
    """Position of the first token whose keys and values it brings."""
    num_slots: int = 0
    """Slots of each layer that a rebuild wrote to the retriever's memory; 0 where updates come otherwise."""
    num_summaries: list[int] = []
    """Groups of each layer that a rebuild wrote there; see RetrievalCache.written."""
    carried: list[list[Any]] | None = None
    """Tensors that travel with the notice: of each layer k, v, positions and the summary's k, v, log_count."""


# ---- What a role or a process can be asked; each call of a role is its method of the same meaning. ----


class Prefill(msgspec.Struct, tag=True):
    """Starts a session with `tokens`: the prompt, and what `num_commits` commits have added to it."""

    tokens: list[int]
    num_commits: int


class Commit(msgspec.Struct, tag=True):
    """Makes `tokens` final."""

    tokens: list[int]


class Propose(msgspec.Struct, tag=True):
    """Asks a drafter for at most `count` tokens behind the committed ones and `after`; answered by a Draft."""

    after: list[int]
    count: int
    branch: int = 0


class Extend(msgspec.Struct, tag=True):
    """Asks a retriever to verify `draft` behind the committed tokens and `after`; answered by an InnerStep."""

    after: list[int]
    draft: Draft
    branch: int = 0


class Verify(msgspec.Struct, tag=True):
    """Asks a verifier to judge `draft`; answered by a Verdict."""

    draft: Draft


class MakeUpdate(msgspec.Struct, tag=True):
    """Asks a verifier for what the retrieval cache lacks, or for a whole new one; answered by an UpdateNotice."""

    rebuild: bool
    budget: int | None = None


class TakeUpdate(msgspec.Struct, tag=True):
    """Has a retriever take an update."""

    notices: list[UpdateNotice]
    """One notice of each rank of the verifier."""


class NeedsRebuild(msgspec.Struct, tag=True):
    """Asks a retriever whether its room for new tokens is used up; answered by a Plain bool."""


class Reread(msgspec.Struct, tag=True):
    """Has a verifier read all committed tokens again."""


class Survey(msgspec.Struct, tag=True):
    """Asks how much memory is free; the answer are the bytes of each tier."""

    device: str
    disk_folder: str


class Build(msgspec.Struct, tag=True):
    """Asks for roles: weights and caches. `config` and `assignment` are those of launch.processes, as JSON types."""

    config: dict[str, Any]
    assignment: dict[str, Any]


class Attach(msgspec.Struct, tag=True):
    """Tells of memory that other processes share (their `Built.shared`), which is to be mapped."""

    shared: dict[str, Any]


class MakeReport(msgspec.Struct, tag=True):
    """Asks for memory and streaming, for result.json."""


Request = (
    Prefill
    | Commit
    | Propose
    | Extend
    | Verify
    | MakeUpdate
    | TakeUpdate
    | NeedsRebuild
    | Reread
    | Survey
    | Build
    | Attach
    | MakeReport
)


class Call(msgspec.Struct, tag=True):
    """Orchestrator to worker; answered by a Reply or Failure of the same id, in order."""

    id: int
    request: Request


class Close(msgspec.Struct, tag=True):
    """Orchestrator to worker or guard: end; `at_once`: whatever it is doing."""

    at_once: bool = False


class Restart(msgspec.Struct, tag=True):
    """Orchestrator to guard: end the worker and start it anew."""


class DumpStacks(msgspec.Struct, tag=True):
    """Orchestrator to guard: have the worker write the stacks of all its threads to its log."""


class Ping(msgspec.Struct, tag=True):
    """A sign of life: regularly from the orchestrator to everyone, and from each guard to the orchestrator."""


# ---- Worker to orchestrator. ----


class Hello(msgspec.Struct, tag=True):
    """The first message of a connection; what does not begin so, or has another secret, is not heard."""

    version: int
    secret: str
    pid: int
    host: str
    node: int = 0
    num_devices: int = 0
    """CUDA devices of the node."""


class Built(msgspec.Struct, tag=True):
    notes: list[str]
    shared: dict[str, Any]
    """Descriptions of memory that other processes may attach, by name."""


class Plain(msgspec.Struct, tag=True):
    """A result of JSON types: None, bool, dict."""

    value: Any = None


Result = Draft | Verdict | InnerStep | UpdateNotice | Built | Plain


class Reply(msgspec.Struct, tag=True):
    id: int
    result: Result
    state: str = ""
    """State of a role that several ranks play alike, which must be the same; see workers.level.Level.state."""


class Failure(msgspec.Struct, tag=True):
    """A call raised: `kind` is the exception's class."""

    id: int
    kind: str
    message: str
    traceback: str


class Beat(msgspec.Struct, tag=True):
    """A heartbeat, sent regularly by a thread of its own.

    `progress` counts layers read and blocks copied, so it stands still where a process lives and does nothing.
    """

    progress: int
    busy_with: str
    done: int = 0
    total: int = 0
    waits_for_others: bool = False
    """True in a sum over ranks: if the process makes no progress, that may be another's fault."""


class Ended(msgspec.Struct, tag=True):
    """News from a rank's guard: the worker process ended by itself. `exit_code` is subprocess's (-9: SIGKILL)."""

    exit_code: int
    pid: int


Message = Call | Close | Restart | DumpStacks | Ping | Hello | Reply | Failure | Beat | Ended
