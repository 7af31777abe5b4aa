"""workers/messages.py: drafts are cut, joined and named the same in all their parts."""

from __future__ import annotations

from workers.messages import NO_TOKEN, Draft


def full(*tokens: int) -> Draft:
    return Draft(
        tokens=list(tokens),
        origins=[f"o{token}" for token in tokens],
        probs=[f"p{token}" for token in tokens],
        runners_up=[token + 10 for token in tokens],
        closeness=[token / 10 for token in tokens],
    )


def test_cut_and_without_first_keep_all_parts_together():
    assert full(1, 2, 3).cut(2) == full(1, 2)
    assert full(1, 2, 3).without_first() == full(2, 3)
    assert full(1).cut(0) == full() and full(1).cut(9) == full(1)


def test_extend_continues_all_parts():
    draft = full(1)
    draft.extend(full(2, 3))
    assert draft == full(1, 2, 3) and len(draft) == 3


def test_without_distributions_there_are_none():
    draft = Draft(tokens=[1])
    draft.extend(Draft(tokens=[2]))
    assert draft.probs is None and draft.cut(1).probs is None


def test_two_drafts_share_no_list():
    one = Draft()
    one.extend(full(1))
    assert Draft() == Draft(tokens=[], origins=[])


def test_a_runner_up_may_be_unknown():
    draft = Draft(tokens=[1, 2, 3], runners_up=[7, NO_TOKEN])
    assert [draft.runner_up(index) for index in range(4)] == [7, None, None, None]
