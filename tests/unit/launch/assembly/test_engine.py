"""launch/assembly/engine.py: what roles that work at the same time must have of their own."""

from __future__ import annotations

from dataclasses import replace

import pytest

from conf.schema import Mode, Overlap
from tests.support.tiny_models import random_prompt
from tests.support.tiny_runs import engine_for, tiny_run
from workers.messages import Draft
from workers.process.background import InBackground

PROMPT, NUM_TOKENS = random_prompt(60), 8


def engine_with(checkpoints, overlap: Overlap, mode: Mode):
    target = checkpoints("llama")
    config = tiny_run(target, target, mode)
    return engine_for(replace(config, decoding=replace(config.decoding, overlap=overlap)), PROMPT, NUM_TOKENS)


@pytest.mark.parametrize("overlap", list(Overlap))
def test_roles_that_draw_at_the_same_time_have_random_sources_of_their_own(checkpoints, overlap):
    with engine_with(checkpoints, overlap, Mode.triforce) as engine:
        hierarchy = engine.hierarchy
        roles = (hierarchy.drafter, hierarchy.retriever, hierarchy.verifier)
        sources = {id(role._coupling._random) for role in roles}
        assert len(sources) == (1 if overlap is Overlap.off else 3)
        assert isinstance(hierarchy.verifier, InBackground) == (overlap is not Overlap.off)


@pytest.mark.parametrize("overlap", list(Overlap))
@pytest.mark.parametrize("mode", [Mode.streaming, Mode.retrieval, Mode.triforce])
def test_who_drafts_for_the_target_names_runners_up_where_they_are_wanted(checkpoints, mode, overlap):
    with engine_with(checkpoints, overlap, mode) as engine:
        hierarchy = engine.hierarchy
        hierarchy.start()
        of_drafter = Draft() if hierarchy.drafter is None else hierarchy.drafter.propose([], 2)
        draft = of_drafter if hierarchy.retriever is None else hierarchy.retriever.extend([], of_drafter).draft
        assert bool(draft.runners_up) == (overlap is Overlap.outcomes)
        assert draft is of_drafter or not of_drafter.runners_up
