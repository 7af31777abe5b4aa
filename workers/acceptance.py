"""Logits -> distribution -> token -> acceptance. The one file to read for losslessness; every level uses it.

Shapes: V vocabulary, n drafted tokens. `target_probs` belongs to the level that verifies, `draft_probs` to the level
that proposed, whichever the two are. Greedy decoding is a one-hot distribution, so no rule needs a special case for it.

A level is lossless if each token it hands up has, given its prefix, exactly the distribution of that level's model:
    maximal    Leviathan et al. 2211.17192, Chen et al. 2302.01318: accept x with min(1, target/draft), else draw from
               the normalised residual max(target - draft, 0). Highest acceptance for a single draft.
    block      Sun et al. 2403.10444: the same, judging the block as a whole; never accepts less. Its verdict on a token
               depends on later ones, so a token must not be cut off the block because of its own value.
    gumbel     Daliri, Musco, Suresh 2408.07978: every level takes the winner of one race, argmax(log p + Gumbel noise),
               whose noise depends on (seed, position) alone. A draft is accepted if it is the target's own winner, so
               the tokens do not depend on the drafts at all.

Long because what makes a distribution, draws from it and judges by it is to be read in one place.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from conf.schema import Coupling, SamplingConfig
from workers.messages import NO_TOKEN, Draft, Verdict

# Purposes of random numbers. Each level has its own numbers: `level * NUM_PURPOSES + purpose`.
CHOOSE, ACCEPT, REPLACE, RACE = range(4)
NUM_PURPOSES = 4
SUM_TOLERANCE = 1e-3
MOST_NOISE_BYTES = 64 << 20
"""Of the noise of races that is kept. What is not kept is made again, the same."""
NUM_CANDIDATES = 128
"""Tokens that top-k and top-p look at first on a CPU: a whole vocabulary is rarely worth sorting."""


class NotFiniteError(ArithmeticError):
    """A row of logits has NaN, +inf, or no finite value: the model or its input is broken."""


@dataclass(kw_only=True, frozen=True)
class Warpers:
    """Further cuts of a distribution that is sampled from: each takes and gives logits [n, V], -inf for what is cut."""

    before_cuts: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = ()
    """Between temperature and top-k."""
    after_cuts: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = ()
    """After top-p."""


NO_WARPERS = Warpers()


def distribution(logits: torch.Tensor, sampling: SamplingConfig, warpers: Warpers = NO_WARPERS) -> torch.Tensor:
    """The probabilities [n, V] from which a model with these logits [n, V] samples: float64 stays, else float32.

    Temperature, then top-k, then top-p, `warpers` around them (as transformers orders them); temperature 0 gives
    one-hot rows. Exactly `top_k` tokens stay, and the smallest set whose probability reaches `top_p`; ties go to the
    lower id. Raises NotFiniteError.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    best = logits.amax(-1, keepdim=True)
    if not bool(torch.isfinite(best).all()):
        raise NotFiniteError("logits are not finite")
    if sampling.is_greedy:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    logits = (logits - best) / sampling.temperature
    for warp in warpers.before_cuts:
        logits = warp(logits)
    probs = _most_probable(logits, sampling)
    if not warpers.after_cuts:
        return probs
    logits = probs.log()
    for warp in warpers.after_cuts:
        logits = warp(logits)
    return torch.softmax(logits, -1)


def _most_probable(logits: torch.Tensor, sampling: SamplingConfig) -> torch.Tensor:
    """The probabilities [n, V] that top-k and top-p leave."""
    probs = torch.softmax(logits, -1)
    vocab_size = logits.shape[-1]
    cuts_ranks = 0 < sampling.top_k < vocab_size
    if not cuts_ranks and sampling.top_p >= 1:
        return probs
    most = NUM_CANDIDATES if logits.device.type == "cpu" else vocab_size  # a GPU sorts faster than it is asked
    if most < vocab_size and (not cuts_ranks or sampling.top_k < most):
        ids = logits.topk(most, sorted=False).indices.sort(-1).values
        ordered, order = logits.gather(-1, ids).sort(stable=True, dim=-1, descending=True)
        ids = ids.gather(-1, order)
        kept = _cut(probs.gather(-1, ids), sampling)
        # Tokens like the last candidate may not be among them: none of those kept may be one.
        if not bool(((kept > 0) & (ordered == ordered[..., -1:])).any()):
            return torch.zeros_like(probs).scatter_(-1, ids, kept)
    ids = logits.sort(stable=True, dim=-1, descending=True).indices
    return torch.empty_like(probs).scatter_(-1, ids, _cut(probs.gather(-1, ids), sampling))


def _cut(probs: torch.Tensor, sampling: SamplingConfig) -> torch.Tensor:
    """Descending probabilities [n, m] with those that top-k and top-p leave, adding up to 1, and 0 for the others.

    Sums run from the first to the last, so that what is behind the last that stays changes no bit.
    """
    if 0 < sampling.top_k < probs.shape[-1]:
        probs = probs.clone()
        probs[..., sampling.top_k :] = 0
        probs = probs / probs.cumsum(-1)[..., -1:]
    if sampling.top_p < 1:
        before = probs.cumsum(-1) - probs
        # The most probable token stays whatever rounding says of its `before`.
        before[..., 0] = 0
        probs = probs.masked_fill(before >= sampling.top_p, 0)
    return probs / probs.cumsum(-1)[..., -1:]


class RandomSource(Protocol):
    """Source of all random decisions; tests replace it by one that walks every branch."""

    def start_round(self, index: int) -> None:
        """Begins verification number `index`."""

    def choose(self, probs: torch.Tensor, position: int, purpose: int) -> int:
        """A token drawn from `probs` [V] for the sequence position `position`."""

    def accept(self, probability: float, position: int, purpose: int) -> bool:
        """True with `probability`."""

    def race(self, probs: torch.Tensor, position: int) -> int:
        """The winner of position's race under `probs` [V]; the same noise for every level."""

    def scores(self, probs: torch.Tensor, position: int) -> torch.Tensor:
        """The scores [V] of the position's race: its winner has the highest."""


class KeyedRandom:
    """Random numbers that depend on seed, position, purpose and the verification's index alone (Philox).

    So a run repeats, a replay after a restart is identical, and processes draw alike without talking. The index is
    part of the key because a position that was drafted and rejected is drafted again: with block verification the
    first verdict depended on the first draw, so the second must be a fresh one. Races leave it out: there the token
    of a position must be the same however often it is drafted.
    """

    def __init__(self, seed: int):
        self._seed, self._round = seed, 0
        self._noise: OrderedDict[tuple[int, int], torch.Tensor] = OrderedDict()

    def start_round(self, index: int) -> None:
        self._round = index

    def _generator(self, position: int, purpose: int, index: int) -> np.random.Generator:
        counter = np.array([0, position, purpose, index], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(counter=counter, key=np.array([self._seed, 0], dtype=np.uint64)))

    def uniform(self, position: int, purpose: int) -> float:
        """A number in [0, 1)."""
        return float(self._generator(position, purpose, self._round).random())

    def choose(self, probs: torch.Tensor, position: int, purpose: int) -> int:
        cumulative = probs.double().cumsum(-1)
        threshold = cumulative[-1] * self.uniform(position, purpose)
        token = torch.searchsorted(cumulative, threshold, right=True)
        # Rounding may put the threshold on the total: the last possible token, not the last of the vocabulary.
        last = torch.searchsorted(cumulative, cumulative[-1])
        return int(torch.minimum(token, last))

    def accept(self, probability: float, position: int, purpose: int) -> bool:
        return self.uniform(position, purpose) < probability

    def race(self, probs: torch.Tensor, position: int) -> int:
        return int(self.scores(probs, position).argmax())

    def scores(self, probs: torch.Tensor, position: int) -> torch.Tensor:
        """The scores [V] of the position's race: the highest wins."""
        # argmax(log p + Gumbel) = argmax(p / E) with E exponential; double, because ties in float would favour low ids.
        return probs.double() / self._exponentials(position, probs)

    def _exponentials(self, position: int, probs: torch.Tensor) -> torch.Tensor:
        """The race's noise [V], kept for a while: each level asks for the same positions."""
        key = (position, probs.shape[-1])
        if key not in self._noise:
            values = self._generator(position, RACE, 0).standard_exponential(probs.shape[-1])
            self._noise[key] = torch.from_numpy(np.maximum(values, 1e-300)).to(probs.device)
            row_bytes = self._noise[key].nbytes
            while len(self._noise) > max(1, MOST_NOISE_BYTES // row_bytes):
                self._noise.popitem(last=False)
        return self._noise[key]


def round_key(num_commits: int, branch: int) -> int:
    """Index for `start_round`: drafts made ahead on different guesses, or not (0), have numbers of their own."""
    return branch << 32 | num_commits


def readable_draft(draft: Draft, vocab_size: int) -> Draft:
    """`draft` up to its first id outside the vocabulary, which no model may read."""
    unknown = [index for index, token in enumerate(draft.tokens) if not 0 <= token < vocab_size]
    return draft.cut(unknown[0]) if unknown else draft


def usable_draft(draft: Draft, vocab_size: int) -> Draft:
    """`draft` up to its first unusable token: an id outside the vocabulary, or a distribution that is none."""
    draft = readable_draft(draft, vocab_size)
    for index, (probs, token) in enumerate(zip(draft.probs or (), draft.tokens, strict=False)):
        if not _is_distribution_with(probs, token):
            return draft.cut(index)
    return draft


def _is_distribution_with(probs: torch.Tensor, token: int) -> bool:
    """True if `probs` [V] sums to one and can have given `token`."""
    return token < len(probs) and abs(float(probs.sum()) - 1) <= SUM_TOLERANCE and float(probs[token]) > 0


class MaximalCoupling:
    """Rejection sampling with residual; `level` keys its random numbers."""

    def __init__(
        self,
        sampling: SamplingConfig,
        random: RandomSource,
        level: int,
        *,
        block: bool = False,
        warpers: Warpers = NO_WARPERS,
    ):
        self._sampling, self._random, self._block, self._warpers = sampling, random, block, warpers
        self._offset = level * NUM_PURPOSES

    def start_round(self, index: int) -> None:
        self._random.start_round(index)

    def draw(self, logits: torch.Tensor, position: int) -> tuple[int, torch.Tensor]:
        """A token for `position` and the distribution it was drawn from; logits [V]."""
        probs = distribution(logits[None], self._sampling, self._warpers)[0]
        return self._random.choose(probs, position, self._offset + CHOOSE), probs

    def verify(self, draft: Draft, logits: torch.Tensor, position: int) -> tuple[Verdict, list[torch.Tensor]]:
        """Judges `draft` as far as it is usable, whose first token is for `position`, by logits [n + 1, V].

        Returns the verdict and the distributions [V] of the tokens handed up: num_accepted + 1 of them.
        """
        target_probs = distribution(logits, self._sampling, self._warpers)
        draft = usable_draft(draft, logits.shape[-1])
        judge = self._verify_block if self._block else self._verify_tokens
        verdict = judge(draft, target_probs, position)
        return verdict, list(target_probs[: verdict.num_accepted + 1])

    def runners_up(self, logits: torch.Tensor, tokens: list[int], position: int) -> tuple[list[int], list[float]]:
        """For each of `tokens`, from `position` on: the most probable other token, and how close it comes.

        `logits` [>= n, V] are those the tokens were judged by.
        """
        return _second_places(distribution(logits[: len(tokens)], self._sampling, self._warpers), tokens)

    def _verify_tokens(self, draft: Draft, target_probs: torch.Tensor, position: int) -> Verdict:
        accepted, ratios = 0, self._ratios(draft, target_probs)
        for index, ratio in enumerate(ratios):
            if not self._random.accept(min(1.0, ratio), position + index, self._offset + ACCEPT):
                break
            accepted += 1
        rest = target_probs[accepted]
        if accepted < len(draft):
            rest = residual(rest, _probs_of(draft)[accepted])
        token = self._random.choose(rest, position + accepted, self._offset + REPLACE)
        return Verdict(num_accepted=accepted, next_token=token)

    def _verify_block(self, draft: Draft, target_probs: torch.Tensor, position: int) -> Verdict:
        """Algorithm 2 of 2403.10444; `weights[i]` is its p_i, the chance that the first i tokens could all be kept."""
        count, weights, rests = len(draft), [1.0], []
        for ratio in self._ratios(draft, target_probs):
            weights.append(min(1.0, weights[-1] * ratio))
        for index in range(count):
            draft_probs = _padded(_probs_of(draft)[index], target_probs)
            rests.append((weights[index] * target_probs[index] - draft_probs).clamp_min(0))
        rests.append(target_probs[count])
        accepted = 0
        for index in range(1, count + 1):
            weight = weights[index]
            if index < count and weight < 1:
                mass = float(rests[index].sum())
                weight = mass / (mass + 1 - weight)
            if self._random.accept(weight, position + index - 1, self._offset + ACCEPT):
                accepted = index
        rest = rests[accepted]
        total = rest.sum()
        # Without mass left the rejection had probability zero, up to rounding.
        rest = rest / total if float(total) > 0 else target_probs[accepted]
        token = self._random.choose(rest, position + accepted, self._offset + REPLACE)
        return Verdict(num_accepted=accepted, next_token=token)

    def _ratios(self, draft: Draft, target_probs: torch.Tensor) -> list[float]:
        """The target's probability of each drafted token, divided by the draft's."""
        if not len(draft):
            return []
        tokens = torch.tensor(draft.tokens, device=target_probs.device)
        target = target_probs[: len(draft)].gather(-1, tokens[:, None])[:, 0]
        drafted = torch.stack([probs[token] for probs, token in zip(_probs_of(draft), draft.tokens, strict=True)])
        drafted = drafted.to(target.device)  # of a lookup, or of another process, they are on the host
        ratios: list[float] = (target.double() / drafted.double()).tolist()
        return ratios


def _probs_of(draft: Draft) -> list[torch.Tensor]:
    """The distributions [V] that the draft was drawn from, which the maximal coupling cannot do without."""
    assert draft.probs is not None, "a draft without its distributions"
    return draft.probs


class GumbelCoupling:
    """The race; also greedy decoding, where the winner is the most probable token whatever the noise."""

    def __init__(self, sampling: SamplingConfig, random: RandomSource, *, warpers: Warpers = NO_WARPERS):
        self._sampling, self._random, self._warpers = sampling, random, warpers

    def start_round(self, index: int) -> None:
        self._random.start_round(index)

    def _winner(self, probs: torch.Tensor, position: int) -> int:
        return int(probs.argmax()) if self._sampling.is_greedy else self._random.race(probs, position)

    def draw(self, logits: torch.Tensor, position: int) -> tuple[int, None]:
        """The winner of the position's race by logits [V]; the level above needs no distribution."""
        return self._winner(distribution(logits[None], self._sampling, self._warpers)[0], position), None

    def verify(self, draft: Draft, logits: torch.Tensor, position: int) -> tuple[Verdict, None]:
        """Judges `draft` by logits [n + 1, V]: keeps it as far as it equals this level's own tokens."""
        probs = distribution(logits, self._sampling, self._warpers)
        accepted, token = 0, self._winner(probs[0], position)
        while accepted < len(draft) and token == draft.tokens[accepted]:
            accepted += 1
            token = self._winner(probs[accepted], position + accepted)
        return Verdict(num_accepted=accepted, next_token=token), None

    def runners_up(self, logits: torch.Tensor, tokens: list[int], position: int) -> tuple[list[int], list[float]]:
        """The second place in each token's race, or among its probabilities if decoding is greedy."""
        if self._sampling.is_greedy:
            return _second_places(torch.softmax(logits[: len(tokens)].float(), -1), tokens)
        probs = distribution(logits[: len(tokens)], self._sampling, self._warpers)
        races = [self._random.scores(row, position + index) for index, row in enumerate(probs)]
        return _second_places(torch.stack(races), tokens)


def _second_places(scores: torch.Tensor, tokens: list[int]) -> tuple[list[int], list[float]]:
    """The best other token than each of `tokens` by scores [n, V] >= 0, and its share of the token's own score."""
    own_ids = torch.tensor(tokens, device=scores.device)[:, None]
    own = scores.gather(-1, own_ids)
    best, ids = scores.scatter(-1, own_ids, 0).max(-1)
    closeness = (best / own[:, 0].clamp_min(torch.finfo(scores.dtype).tiny)).clamp(0, 1)
    pairs = zip(ids.tolist(), best.tolist(), strict=True)
    return [token if score > 0 else NO_TOKEN for token, score in pairs], closeness.tolist()


def add_runners_up(draft: Draft, runners_up: list[int], closeness: list[float]) -> None:
    """Adds the runners-up of the draft's newest tokens, and how close each comes to its token."""
    draft.runners_up += runners_up
    draft.closeness += closeness


def residual(target_probs: torch.Tensor, draft_probs: torch.Tensor) -> torch.Tensor:
    """norm(max(target - draft, 0)), [V]; `target_probs` itself where nothing is left (equal up to rounding)."""
    rest = (target_probs - _padded(draft_probs, target_probs)).clamp_min(0)
    total = rest.sum()
    return rest / total if float(total) > 0 else target_probs


def _padded(draft_probs: torch.Tensor, target_probs: torch.Tensor) -> torch.Tensor:
    """The draft's distribution on the target's device; ids that the drafter's vocabulary lacks have probability 0."""
    draft_probs = draft_probs.to(target_probs.device)
    missing = target_probs.shape[-1] - draft_probs.shape[-1]
    return torch.nn.functional.pad(draft_probs, (0, missing)) if missing else draft_probs


def make_coupling(
    sampling: SamplingConfig, random: RandomSource, level: int, *, is_last: bool, warpers: Warpers = NO_WARPERS
) -> MaximalCoupling | GumbelCoupling:
    """The coupling of a level (1 drafter, 2 retrieval draft, 3 target; `is_last`: the target)."""
    if sampling.is_greedy or sampling.coupling == Coupling.gumbel:
        return GumbelCoupling(sampling, random, warpers=warpers)
    block = sampling.block_verification and is_last
    return MaximalCoupling(sampling, random, level, block=block, warpers=warpers)
