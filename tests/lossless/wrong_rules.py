"""Rules of acceptance that are not lossless: the tests of losslessness must see each of them fail."""

from __future__ import annotations

import torch

from workers.acceptance import ACCEPT, CHOOSE, REPLACE, MaximalCoupling, distribution, make_coupling, residual
from workers.messages import Draft, Verdict
from workers.models.token_rules import TokenRules


def making(wrong: type[MaximalCoupling], *levels: int):
    """Makes the couplings of `levels` wrong."""

    def make(sampling, random, level, *, is_last):
        if level in levels:
            return wrong(sampling, random, level, block=sampling.block_verification and is_last)
        return make_coupling(sampling, random, level, is_last=is_last)

    return make


class TriForceRule(MaximalCoupling):
    """The retrieval draft of TriForce's published code: a rejected token is drawn anew from p1, which is then reported
    as its proposal. At the last level: no residual."""

    def _verify_tokens(self, draft: Draft, target_probs: torch.Tensor, position: int) -> Verdict:
        accepted = 0
        for index, ratio in enumerate(self._ratios(draft, target_probs)):
            if not self._random.accept(min(1.0, ratio), position + index, self._offset + ACCEPT):
                break
            accepted += 1
        token = self._random.choose(target_probs[accepted], position + accepted, self._offset + REPLACE)
        return Verdict(num_accepted=accepted, next_token=token)


class SwappedRatio(MaximalCoupling):
    """Accepts with draft/target."""

    def _ratios(self, draft: Draft, target_probs: torch.Tensor) -> list[float]:
        return [1 / ratio if ratio else 1.0 for ratio in super()._ratios(draft, target_probs)]


class AlwaysAccepting(MaximalCoupling):
    """Keeps every draft."""

    def _ratios(self, draft: Draft, target_probs: torch.Tensor) -> list[float]:
        return [1.0] * len(draft)


class BonusFromThePositionBefore(MaximalCoupling):
    """Draws the token after a draft that was kept whole from the last draft's own row."""

    def verify(self, draft: Draft, logits: torch.Tensor, position: int):
        shifted = torch.cat([logits[:-1], logits[-2:-1]]) if len(logits) > 1 else logits
        return super().verify(draft, shifted, position)


class RowsShiftedByOne(MaximalCoupling):
    """Judges each drafted token by the row of the token after it."""

    def verify(self, draft: Draft, logits: torch.Tensor, position: int):
        return super().verify(draft, torch.cat([logits[1:], logits[-1:]]), position)


class ProposalStoredUncut(MaximalCoupling):
    """Draws from the cut distribution, hands up the softmax."""

    def draw(self, logits: torch.Tensor, position: int):
        return super().draw(logits, position)[0], torch.softmax(logits / self._sampling.temperature, -1)


class ProposalDrawnUncut(MaximalCoupling):
    """Draws from the softmax, hands up the cut distribution."""

    def draw(self, logits: torch.Tensor, position: int):
        plain = torch.softmax(logits / self._sampling.temperature, -1)
        cut = distribution(logits[None], self._sampling)[0]
        return self._random.choose(plain, position, self._offset + CHOOSE), cut.clamp_min(1e-9)


class HandingUpTheRowBefore(MaximalCoupling):
    """Reports for each token handed up the distribution of the token before it."""

    def verify(self, draft: Draft, logits: torch.Tensor, position: int):
        verdict, probs = super().verify(draft, logits, position)
        return verdict, [probs[0], *probs[:-1]]


class BlockWithTokenResidual(MaximalCoupling):
    """Block verification whose replacement ignores the weight of the prefix."""

    def _verify_block(self, draft: Draft, target_probs: torch.Tensor, position: int) -> Verdict:
        kept, last = -1, len(draft)
        weights = [1.0]
        for ratio in self._ratios(draft, target_probs):
            weights.append(min(1.0, weights[-1] * ratio))
        for index in range(1, last + 1):
            if self._random.accept(weights[index], position + index - 1, self._offset + ACCEPT):
                kept = index
        kept = max(kept, 0)
        rest = target_probs[kept] if kept == last else residual(target_probs[kept], draft.probs[kept])
        return Verdict(num_accepted=kept, next_token=self._random.choose(rest, position + kept, REPLACE))


class CutByTheTokenDropped(MaximalCoupling):
    """Wrong: leaves out a drafted token because of what it is."""

    def verify(self, draft: Draft, logits: torch.Tensor, position: int):
        return super().verify(draft.cut(draft.tokens.index(1)) if 1 in draft.tokens else draft, logits, position)


class BlindToDrafts(TokenRules):
    """Wrong: judges every row of a block with the committed tokens alone."""

    def apply(self, logits: torch.Tensor, committed: list[int], tail: list[int]) -> torch.Tensor:
        return torch.cat([super(BlindToDrafts, self).apply(row[None], committed, []) for row in logits])


class SeeingTheWholeDraft(TokenRules):
    """Wrong: judges every row with all that was drafted, what is behind it included."""

    def apply(self, logits: torch.Tensor, committed: list[int], tail: list[int]) -> torch.Tensor:
        return torch.cat([super(SeeingTheWholeDraft, self).apply(row[None], committed, tail) for row in logits])


class OneTokenLate(TokenRules):
    """Wrong: judges each row without the token right before it."""

    def apply(self, logits: torch.Tensor, committed: list[int], tail: list[int]) -> torch.Tensor:
        num_before = [len(tail) - len(logits) + 1 + row for row in range(len(logits))]
        late = [tail[: max(num - 1, 0)] for num in num_before]
        rows = zip(logits, late, strict=True)
        return torch.cat([super(OneTokenLate, self).apply(row[None], committed, seen) for row, seen in rows])
