"""What is refused of a pair of models before any weight is read."""

from __future__ import annotations

import pytest

from conf.schema import ConfigError
from launch.assembly.prepare import prepare
from tests.support.tiny_runs import tiny_run


@pytest.mark.parametrize(("num_positions", "gamma2", "least"), [(48, 6, 69), (68, 6, 69), (128, 64, 141)])
def test_a_drafter_that_knows_too_few_positions_for_any_window_is_refused_by_their_number(
    checkpoints, num_positions, gamma2, least
):
    drafter = checkpoints("llama", max_position_embeddings=num_positions)
    with pytest.raises(ConfigError) as refused:
        prepare(tiny_run(checkpoints("llama"), drafter, gamma2=gamma2, window=1))
    message = (
        f"model.drafter is {str(drafter)!r}, which knows {num_positions} positions; it must know at least {least}: "
    )
    assert str(refused.value).startswith(message)


def test_a_drafter_that_knows_a_position_more_gets_a_window_of_one(checkpoints):
    drafter = checkpoints("llama", max_position_embeddings=69)
    prepare(tiny_run(checkpoints("llama"), drafter, window=1))
    with pytest.raises(ConfigError, match="cache.streaming.window is 2; it must be at most 1: the drafter knows 69"):
        prepare(tiny_run(checkpoints("llama"), drafter, window=2))
