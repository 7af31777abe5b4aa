"""When the retrieval cache is due for a rebuild."""

from __future__ import annotations

import pytest

from orchestrator.rebuild_policy import RebuildPolicy


def due_at(policy: RebuildPolicy, acceptances: list[tuple[int, int]]) -> list[int]:
    """The verifications, counted from 1, after which it is due; it is then rebuilt."""
    due = []
    for count, (num_proposed, num_accepted) in enumerate(acceptances, start=1):
        if policy.is_due(num_proposed, num_accepted):
            due.append(count)
            policy.rebuilt()
    return due


def test_never_means_never():
    assert due_at(RebuildPolicy("never"), [(8, 8), (8, 0)] * 50) == []


@pytest.mark.parametrize("every", [1, 2, 5])
def test_a_number_means_every_so_many_verifications(every):
    assert due_at(RebuildPolicy(every), [(8, 4)] * 12) == list(range(every, 13, every))


@pytest.mark.parametrize("rebuild", [2, "adaptive"])
def test_verifications_of_nothing_do_not_count(rebuild):
    some = [(8, 8)] * 3 + [(8, 1)] * 9
    spread = [pair for real in some for pair in ((0, 0), real)]
    assert due_at(RebuildPolicy(rebuild), spread) == [2 * count for count in due_at(RebuildPolicy(rebuild), some)]


def test_adaptive_waits_while_acceptance_holds_or_rises():
    assert due_at(RebuildPolicy("adaptive"), [(8, 4)] * 40) == []
    assert due_at(RebuildPolicy("adaptive"), [(8, count) for count in range(9)]) == []


def test_adaptive_rebuilds_once_the_recent_mean_is_more_than_5_percent_below_the_running_mean():
    steady = [(100, 80)] * 16
    # Means over 20: the recent four at 76 pull the running mean to 79.2, 95% of which is 75.24; at 74 to 78.8, 74.86.
    assert due_at(RebuildPolicy("adaptive"), steady + [(100, 76)] * 4) == []
    assert due_at(RebuildPolicy("adaptive"), steady + [(100, 74)] * 4) == [20]


def test_adaptive_measures_more_than_the_recent_verifications_before_it_judges():
    falling = [(8, 8)] + [(8, 0)] * 20
    due = due_at(RebuildPolicy("adaptive"), falling)
    assert due == [RebuildPolicy.RECENT + 1]


def test_adaptive_rebuilds_at_most_once_per_recent_verifications():
    due = due_at(RebuildPolicy("adaptive"), [(8, 8 - min(count % 11, 8)) for count in range(200)])
    assert len(due) > 3
    assert min(later - earlier for earlier, later in zip(due, due[1:], strict=False)) > RebuildPolicy.RECENT


def test_a_rebuild_that_was_forced_starts_the_measurement_anew():
    policy = RebuildPolicy(3)
    policy.is_due(8, 8)
    policy.is_due(8, 8)
    policy.rebuilt()
    assert due_at(policy, [(8, 8)] * 4) == [3]
