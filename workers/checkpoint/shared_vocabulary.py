"""The ids that target and drafter share: which may be drafted, and what the drafter reads in place of the others."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from difflib import SequenceMatcher

from conf.schema import ConfigError
from workers.checkpoint.facts import ModelFacts

LEAST_SHARE = 0.9
"""Of the target's ids those that a drafter must share: less is another family, whose drafts would seldom be right."""
LEAST_AGREEMENT = 0.5
"""Of SAMPLE's tokens those that both tokenizers must read alike: the same words, cut otherwise, are drafted in vain."""
SAMPLE = """\
The old lighthouse keeper wrote 1,847 letters between 1902 and 1931; only a dozen of them were ever answered. "I do not
mind," he said to Anna (who had asked), "for the sea reads them too."

def mean(values: list[float]) -> float:
    if not values:
        raise ValueError(f"no values: {values!r}")
    return sum(values) / len(values)  # never an integer

Der Zug fährt über die Brücke, où l'été n'arrive qu'en août. ¿Quién sabe? Привет, мир! 长城很长。 東京は晴れです。
| name | https://example.org/a_b?c=1&d=2 | 3.14e-8 | αβγ | NASA's McDonald & Co. |
"""


@dataclass(kw_only=True)
class SharedVocabulary:
    """What the vocabularies of a target and its drafter have in common, by id.

    An id is shared if it has the same text in both tokenizers and a row in both models.
    """

    num_shared: int
    num_target_ids: int
    """Ids of the target's tokenizer."""
    agreement: float
    """The share of tokens of ordinary text that both tokenizers read alike, in the same order."""
    not_drafted: list[int] = field(default_factory=list)
    """Rows of the drafter that are not shared: their probability in a draft is 0. None where the tokenizers are equal,
    whatever their padding."""
    stand_ins: dict[int, int] = field(default_factory=dict)
    """For each of the target's ids that is not shared the id that the drafter reads: of the last token that its
    own tokenizer makes of the text, which is the same word elsewhere, a part of it, or the token for unknown words."""

    @property
    def is_whole(self) -> bool:
        """Whether ids mean the same to both, so that nothing is left out or read otherwise."""
        return not self.not_drafted and not self.stand_ins

    def report(self) -> dict[str, float]:
        """How much is shared, for result.json."""
        return {"shared_ids": self.num_shared, "target_ids": self.num_target_ids, "agreement": self.agreement}

    def notes(self) -> list[str]:
        """Lines for the user about what differs."""
        notes = []
        if not self.is_whole:
            share = 100 * self.num_shared / self.num_target_ids
            notes.append(
                f"model.drafter shares {self.num_shared:,} of the target's {self.num_target_ids:,} token ids "
                f"({share:.1f}%): the others are never drafted"
            )
        if self.agreement < 1:
            notes.append(
                f"model.drafter: its tokenizer reads {100 * (1 - self.agreement):.1f}% of ordinary text otherwise than "
                "the target's: fewer drafts will be accepted"
            )
        return notes


def shared_vocabulary(target: ModelFacts, drafter: ModelFacts) -> SharedVocabulary:
    """What both have in common. Raises ConfigError where it is too little to draft by."""
    # What has no row in the target is never read or drawn by it.
    ours = {token: text for token, text in _texts(target).items() if token < _num_rows(target)}
    theirs, num_rows = _texts(drafter), _num_rows(drafter)
    both_rows = min(num_rows, _num_rows(target))
    shared = {token for token, text in ours.items() if token < both_rows and theirs.get(token) == text}
    if len(shared) < LEAST_SHARE * len(ours):
        first = min(ours.keys() - shared)
        raise ConfigError(
            f"model.drafter is {drafter.source!r}; its tokenizer must share at least {LEAST_SHARE:.0%} of the token "
            f"ids of model.target={target.source!r}, and shares {len(shared):,} of {len(ours):,}: id {first} is "
            f"{theirs.get(first)!r} there and {ours[first]!r} in the target's. Name a drafter of the same family, or "
            "model.drafter=lookup"
        )
    agreement = _agreement(target, drafter)
    if agreement < LEAST_AGREEMENT:
        raise ConfigError(
            f"model.drafter is {drafter.source!r}; its tokenizer must cut text into words as that of "
            f"model.target={target.source!r} does: of ordinary text {agreement:.0%} of the tokens are the same, and "
            f"it must be at least {LEAST_AGREEMENT:.0%}. Name a drafter of the same family, or model.drafter=lookup"
        )
    vocabulary = SharedVocabulary(num_shared=len(shared), num_target_ids=len(ours), agreement=agreement)
    if ours != theirs or len(shared) < len(ours):
        vocabulary.not_drafted = [token for token in range(num_rows) if token not in shared]
        vocabulary.stand_ins = _stand_ins(target, drafter, ours.keys() - shared, num_rows, other=min(shared))
    return vocabulary


def _texts(facts: ModelFacts) -> dict[int, str]:
    """The text of each id, as the tokenizer writes it down."""
    return {token: text for text, token in facts.tokenizer.get_vocab().items()}


def _num_rows(facts: ModelFacts) -> int:
    """Ids that the model has an embedding and a logit for."""
    return int(facts.config.get_text_config().vocab_size)


def _stand_ins(
    target: ModelFacts, drafter: ModelFacts, foreign: Collection[int], num_rows: int, *, other: int
) -> dict[int, int]:
    """What the drafter reads for each of `foreign`, below `num_rows`; `other` where its tokenizer makes nothing."""
    if not foreign:
        return {}
    ids = sorted(foreign)
    texts = [target.tokenizer.decode([token]) for token in ids]
    made = drafter.tokenizer(texts, add_special_tokens=False)["input_ids"]
    last = [tokens[-1] if tokens else other for tokens in made]
    return {token: stand_in if stand_in < num_rows else other for token, stand_in in zip(ids, last, strict=True)}


def _agreement(target: ModelFacts, drafter: ModelFacts) -> float:
    """The share of SAMPLE's tokens that both tokenizers have in the same order."""
    ours, theirs = (facts.tokenizer(SAMPLE, add_special_tokens=False)["input_ids"] for facts in (target, drafter))
    return SequenceMatcher(None, ours, theirs, autojunk=False).ratio()
