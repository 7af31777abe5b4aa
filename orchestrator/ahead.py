"""Drafting ahead: while the target verifies a block, the levels below draft what may follow each likely outcome.

A verification that streams its cache leaves the compute units idle. Its outcome is (how many tokens it accepts, the
token it adds); a `_Path` is a guess of it, with a draft that follows:

    all accepted      the added token is guessed by the retrieval draft itself, as the first token of the path
    token i rejected  the added token is guessed to be the runner-up of token i (under the gumbel coupling: the second
                      place in the same race; otherwise the most probable other token)

The next step always goes to the likeliest path that is not long enough yet: every token drafted saves as much time if
its path is hit. (Outcome caches: Saguaro, arXiv 2603.03251; drafting ahead for full acceptance: PEARL, 2408.11850.)

Why it is lossless: each token of a path comes with the distribution it was drawn from, with random numbers of the
path's own; whether a path is used depends on the verdict and on what it assumed, never on the tokens behind; and which
path is worked on depends on the block alone, and on time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from conf.schema import Overlap
from workers.messages import Draft, InnerStep, Verdict

INITIAL_ACCEPTANCE, INITIAL_HITS, MEMORY = 0.85, 0.6, 0.9
"""First values of the running means, before anything was measured; the share of a mean that an update leaves."""
MIN_PROBABILITY = 0.005
"""Least probability of a path that is worth drafting: others push out of the cache what is likelier."""


@dataclass(kw_only=True)
class _Path:
    """A guess of the verdict, and a draft that follows it."""

    num_accepted: int
    prefix: list[int]
    """Tokens behind the committed ones that the draft follows: accepted ones and, of a rejection, the guess."""
    guess: int | None
    """Guess of the token that the target adds; None where the path's own first token is the guess."""
    probability: float
    branch: int
    draft: Draft = field(default_factory=Draft)
    steps: list[tuple[int, int]] = field(default_factory=list)
    is_dead: bool = False

    def follows(self, verdict: Verdict) -> bool:
        guess = self.guess if self.guess is not None else next(iter(self.draft.tokens), None)
        return (verdict.num_accepted, verdict.next_token) == (self.num_accepted, guess)

    def continuation(self) -> Draft:
        """The draft behind the guess."""
        return self.draft if self.guess is not None else self.draft.without_first()


@dataclass(kw_only=True)
class AheadRecord:
    """Counts of one verification: what was drafted ahead during it, and whether it was of use."""

    num_steps: int = 0
    num_paths: int = 0
    is_hit: bool = False
    num_tokens: int = 0
    """Drafted tokens that the next block begins with."""


class DraftingAhead:
    """Drafts what may follow each likely verdict; `step(after, count, branch)` drafts up to about `count` tokens."""

    def __init__(self, overlap: Overlap, step: Callable[[list[int], int, int], InnerStep]):
        self._overlap, self._step, self._block_tokens = overlap, step, 0
        self._acceptance, self._hits_behind_all, self._hits_of_corrections = (
            INITIAL_ACCEPTANCE,
            INITIAL_HITS,
            INITIAL_HITS,
        )
        self._paths: list[_Path] = []
        self._block = Draft()
        self.record = AheadRecord()
        self.next_draft = Draft()
        """Draft that the next block begins with."""
        self.next_steps: list[tuple[int, int]] = []
        """Inner steps that made `next_draft`: (proposed, accepted) of each."""

    def draft_while(self, is_waiting: Callable[[], bool], block: Draft, remaining: int, block_tokens: int) -> None:
        """Drafts paths behind `block`, which is being verified, of up to `block_tokens`.

        `remaining` tokens may still be generated.
        """
        self._block, self._block_tokens, self.record = block, block_tokens, AheadRecord()
        self._paths = self._guesses(block)
        while is_waiting():
            path = self._likeliest(remaining)
            if path is None:
                return
            self._extend(path, self._room(path, remaining))

    def _guesses(self, block: Draft) -> list[_Path]:
        chances = self._acceptance_of_each(block)
        reached, paths = 1.0, []
        for index, chance in enumerate(chances):
            if self._overlap is Overlap.outcomes and (guess := block.runner_up(index)) is not None:
                probability = reached * (1 - chance) * self._hits_of_corrections
                prefix = [*block.tokens[:index], guess]
                paths.append(
                    _Path(num_accepted=index, prefix=prefix, guess=guess, probability=probability, branch=index + 1)
                )
            reached *= chance
        behind_all = reached * self._hits_behind_all
        paths.append(
            _Path(
                num_accepted=len(block),
                prefix=list(block.tokens),
                guess=None,
                probability=behind_all,
                branch=len(block) + 1,
            )
        )
        return [path for path in paths if path.probability >= MIN_PROBABILITY]

    def _acceptance_of_each(self, block: Draft) -> list[float]:
        """The running acceptance, spread by how close each token's runner-up was: the mean stays."""
        if not block.closeness or len(block.closeness) != len(block):
            return [self._acceptance] * len(block)
        mean = sum(block.closeness) / len(block.closeness)
        risk = 1 - self._acceptance
        return [max(0.02, 1 - risk * closeness / mean) if mean else self._acceptance for closeness in block.closeness]

    def _likeliest(self, remaining: int) -> _Path | None:
        open_paths = [path for path in self._paths if not path.is_dead and self._room(path, remaining) > 0]
        return max(open_paths, key=lambda path: path.probability, default=None)

    def _room(self, path: _Path, remaining: int) -> int:
        """Tokens that the path may still grow by: to a block, and not past the last token but one."""
        guess_in_draft = path.guess is None
        length = len(path.draft) - guess_in_draft
        in_sequence = remaining - 2 - path.num_accepted - length
        return min(self._block_tokens - length, in_sequence)

    def _extend(self, path: _Path, room: int) -> None:
        step = self._step([*path.prefix, *path.draft.tokens], room, path.branch)
        self.record.num_paths += not path.draft.tokens
        self.record.num_steps += 1
        if not len(step.draft):
            path.is_dead = True
            return
        path.draft.extend(step.draft)
        path.steps.append((step.num_proposed, step.num_accepted))

    def take(self, verdict: Verdict) -> None:
        """Ends drafting: keeps the draft of the path that the verdict hit, if any, for `take_next`."""
        self._learn(verdict)
        hit = next((path for path in self._paths if path.draft.tokens and path.follows(verdict)), None)
        self.next_draft, self.next_steps = Draft(), []
        if hit is not None:
            self.next_draft, self.next_steps = hit.continuation(), hit.steps
            self.record.is_hit, self.record.num_tokens = True, len(self.next_draft)
        self._paths = []

    def _learn(self, verdict: Verdict) -> None:
        for index in range(min(verdict.num_accepted + 1, len(self._block))):
            accepted = index < verdict.num_accepted
            self._acceptance = MEMORY * self._acceptance + (1 - MEMORY) * accepted
        if verdict.num_accepted < len(self._block):
            is_hit = self._block.runner_up(verdict.num_accepted) == verdict.next_token
            self._hits_of_corrections = MEMORY * self._hits_of_corrections + (1 - MEMORY) * is_hit
            return
        behind_all = next((path for path in self._paths if path.guess is None and path.draft.tokens), None)
        if behind_all is not None:
            is_hit = behind_all.follows(verdict)
            self._hits_behind_all = MEMORY * self._hits_behind_all + (1 - MEMORY) * is_hit

    def take_next(self) -> tuple[Draft, list[tuple[int, int]]]:
        """Hands out, once, the draft that the next block begins with and the inner steps that made it."""
        draft, steps = self.next_draft, self.next_steps
        self.next_draft, self.next_steps = Draft(), []
        return draft, list(steps)
