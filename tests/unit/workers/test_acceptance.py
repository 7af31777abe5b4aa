"""Random numbers and verdicts, level by level and case by case; whole laws are in tests/lossless."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.schema import Coupling, SamplingConfig
from tests.support.toy_models import EXACT, MarkovModel, make_setup, random_table
from workers.acceptance import (
    ACCEPT,
    CHOOSE,
    MOST_NOISE_BYTES,
    NUM_PURPOSES,
    RACE,
    REPLACE,
    GumbelCoupling,
    KeyedRandom,
    MaximalCoupling,
    NotFiniteError,
    distribution,
    make_coupling,
    residual,
    usable_draft,
)
from workers.messages import DRAFTER, Draft
from workers.retrieval_drafter import RetrievalDrafter
from workers.target_verifier import TargetVerifier

REPEATABLE = settings(derandomize=True, deadline=None)

VOCAB_SIZES = [100, 8193, 32000, 128256, 151936]
ALMOST_ONE = 1 - 2**-53
POSITION = 17


class FixedUniform(KeyedRandom):
    """Every uniform number is the same one."""

    def __init__(self, value: float):
        super().__init__(0)
        self.value = value

    def uniform(self, position: int, purpose: int) -> float:
        return self.value


def draft_of(tokens: list[int], probs: list[torch.Tensor] | None) -> Draft:
    return Draft(tokens=tokens, origins=[DRAFTER] * len(tokens), probs=probs)


def drafted_by(logits: torch.Tensor, random: KeyedRandom, sampling: SamplingConfig) -> Draft:
    """A token and its distribution for each row."""
    coupling = MaximalCoupling(sampling, random, 1)
    drawn = [coupling.draw(row, POSITION + index) for index, row in enumerate(logits)]
    return draft_of([token for token, _ in drawn], [probs for _, probs in drawn])


def target_coupling(sampling: SamplingConfig, random: KeyedRandom, *, block: bool = False) -> MaximalCoupling:
    return MaximalCoupling(sampling, random, 3, block=block)


def logits_of(probs: list[float]) -> torch.Tensor:
    return torch.tensor(probs, dtype=torch.float64).log()


BOTH_RULES = pytest.mark.parametrize("block", [False, True], ids=["token", "block"])


# Random numbers.


def test_the_same_seed_repeats_every_number_twenty_times():
    probs = torch.softmax(random_table(1, 100, 6)[0], -1)

    def numbers() -> list[float]:
        random = KeyedRandom(2**64 - 1)
        random.start_round(5)
        return [random.uniform(3, ACCEPT), random.choose(probs, 4, CHOOSE), random.race(probs, 9)]

    assert len({tuple(numbers()) for _ in range(20)}) == 1


def test_numbers_do_not_depend_on_what_was_asked_before():
    asked, fresh = KeyedRandom(1), KeyedRandom(1)
    probs = torch.full((5,), 0.2)
    for position in range(600):
        asked.uniform(position, CHOOSE)
        asked.race(probs, position)
    assert asked.uniform(700, REPLACE) == fresh.uniform(700, REPLACE)
    assert [asked.race(probs, position) for position in range(5)] == [
        fresh.race(probs, position) for position in range(5)
    ]


def test_seed_position_purpose_level_and_round_each_give_other_numbers():
    def uniform(seed: int = 0, position: int = 1, purpose: int = NUM_PURPOSES + CHOOSE, index: int = 2) -> float:
        random = KeyedRandom(seed)
        random.start_round(index)
        return random.uniform(position, purpose)

    changed = [
        uniform(),
        uniform(seed=1),
        uniform(seed=2**63),
        uniform(position=2),
        uniform(purpose=NUM_PURPOSES + ACCEPT),
        uniform(purpose=NUM_PURPOSES + REPLACE),
        uniform(purpose=2 * NUM_PURPOSES + CHOOSE),
        uniform(index=1),
    ]
    assert len(set(changed)) == len(changed)


def test_uniform_numbers_are_uniform():
    values = torch.tensor([KeyedRandom(seed).uniform(position, 5) for seed in range(20) for position in range(250)])
    assert values.min() >= 0 and values.max() < 1
    assert float((values.sort().values - torch.linspace(0, 1, len(values))).abs().max()) < 1.95 / math.sqrt(len(values))


def test_races_depend_on_seed_and_position_but_not_on_the_round():
    probs = torch.full((1000,), 1e-3)
    first, second = KeyedRandom(0), KeyedRandom(0)
    second.start_round(7)
    winners = [first.race(probs, position) for position in range(20)]
    assert winners == [second.race(probs, position) for position in range(20)]
    assert len(set(winners)) > 15
    assert winners != [KeyedRandom(1).race(probs, position) for position in range(20)]


def test_a_race_of_few_tokens_is_the_same_noise_that_a_race_of_all_has():
    """So a model that excludes tokens still meets the others in the same order."""
    probs = torch.softmax(random_table(1, 50, 7)[0], -1)
    for position in range(50):
        random = KeyedRandom(3)
        winner = random.race(probs, position)
        fewer = torch.where((torch.arange(50) % 3 == 0) | (torch.arange(50) == winner), probs, 0)
        assert random.race(fewer, position) == winner


@REPEATABLE
@given(
    weights=st.lists(st.sampled_from([0.0, 0.0, 1e-30, 1e-7, 0.1, 0.5, 1.0]), min_size=1, max_size=20).filter(any),
    value=st.one_of(st.sampled_from([0.0, 2**-53, 0.5, ALMOST_ONE]), st.floats(0, ALMOST_ONE)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_a_token_of_probability_zero_is_never_chosen(weights, value, dtype):
    probs = torch.tensor(weights, dtype=dtype)
    probs /= probs.sum()
    assert probs[FixedUniform(value).choose(probs, 0, CHOOSE)] > 0
    assert probs[KeyedRandom(int(value * 1e6)).race(probs, 0)] > 0


def test_choosing_inverts_the_cumulative_distribution():
    probs = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    expected = {0.0: 1, 0.2499: 1, 0.25: 3, 0.7499: 3, 0.75: 4, ALMOST_ONE: 4}
    assert {value: FixedUniform(value).choose(probs, 0, CHOOSE) for value in expected} == expected


def test_probability_zero_is_never_accepted_and_one_always():
    assert not FixedUniform(0.0).accept(0.0, 0, ACCEPT)
    assert FixedUniform(ALMOST_ONE).accept(1.0, 0, ACCEPT)


def test_the_noise_that_is_kept_of_a_large_vocabulary_is_bounded_and_made_again_the_same():
    random, probs = KeyedRandom(seed=5), torch.full((152_000,), 1 / 152_000)
    winners = [random.race(probs, position) for position in range(70)]
    kept = sum(noise.nbytes for noise in random._noise.values())
    assert kept <= MOST_NOISE_BYTES and len(random._noise) > 40
    assert 0 not in {position for position, _ in random._noise}
    assert [random.race(probs, position) for position in range(3)] == winners[:3]


def test_a_race_survives_noise_that_underflows(monkeypatch):
    def all_zero(self, position, purpose, index):
        return type("Generator", (), {"standard_exponential": staticmethod(np.zeros)})

    monkeypatch.setattr(KeyedRandom, "_generator", all_zero)
    assert KeyedRandom(0).race(torch.tensor([0.0, 0.3, 0.7]), 0) == 2


# Verdicts.


@BOTH_RULES
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("sampling", [EXACT, SamplingConfig(), SamplingConfig(top_k=5, top_p=0.99)])
def test_a_draft_by_the_target_itself_is_always_kept_whole(sampling, vocab_size, block):
    """Also: distributions that are equal, so without any residual."""
    logits = random_table(4, vocab_size, 8, spread=3.0).float()
    for seed in range(3):
        random = KeyedRandom(seed)
        draft = drafted_by(logits[:3], random, sampling)
        verdict, probs = target_coupling(sampling, random, block=block).verify(draft, logits, POSITION)
        assert verdict.num_accepted == 3
        assert len(probs) == 4
        assert float(probs[3][verdict.next_token]) > 0


@BOTH_RULES
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_a_draft_of_tokens_that_the_target_excludes_is_never_kept(vocab_size, block):
    logits = random_table(3, vocab_size, 9).float()
    logits[:, ::2] = -torch.inf
    excluded = random_table(2, vocab_size, 10).float()
    excluded[:, 1::2] = -torch.inf
    for seed in range(3):
        random = KeyedRandom(seed)
        draft = drafted_by(excluded, random, EXACT)
        verdict, probs = target_coupling(EXACT, random, block=block).verify(draft, logits, POSITION)
        assert (verdict.num_accepted, len(probs)) == (0, 1)
        assert verdict.next_token % 2 == 1


@BOTH_RULES
@pytest.mark.parametrize("first_wrong", [0, 1, 2])
def test_what_follows_a_rejected_token_is_dropped(first_wrong, block):
    """Certain drafts of tokens that are certain too, one of them another one."""
    one_hot = torch.eye(5, dtype=torch.float64)
    drafted = [1, 2, 3]
    wanted = [*drafted, 4]
    wanted[first_wrong] = 0
    draft = draft_of(drafted, list(one_hot[drafted]))
    verdict, _ = target_coupling(EXACT, KeyedRandom(0), block=block).verify(draft, one_hot[wanted].log(), POSITION)
    assert (verdict.num_accepted, verdict.next_token) == (first_wrong, 0)


@BOTH_RULES
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_an_empty_draft_gets_a_token_drawn_from_the_target(vocab_size, block):
    logits = random_table(1, vocab_size, 11)
    for probs_field in (None, []):
        random = KeyedRandom(4)
        verdict, probs = target_coupling(EXACT, random, block=block).verify(draft_of([], probs_field), logits, POSITION)
        drawn = random.choose(distribution(logits, EXACT)[0], POSITION, 3 * NUM_PURPOSES + REPLACE)
        assert (verdict.num_accepted, verdict.next_token) == (0, drawn)
        assert len(probs) == 1


@BOTH_RULES
@pytest.mark.parametrize(("temperature", "top_p", "top_k"), [(0.01, 0.5, 1), (0.6, 0.9, 5), (1, 0.99, 99), (2, 1, 0)])
def test_a_verdict_never_contains_a_token_that_the_target_excludes(temperature, top_p, top_k, block):
    sampling = SamplingConfig(temperature=temperature, top_p=top_p, top_k=top_k)
    logits, draft_logits = random_table(4, 100, 12, spread=3.0), random_table(3, 100, 13, spread=3.0)
    allowed = distribution(logits, sampling) > 0
    for seed in range(50):
        random = KeyedRandom(seed)
        draft = drafted_by(draft_logits, random, EXACT)
        verdict, _ = target_coupling(sampling, random, block=block).verify(draft, logits, POSITION)
        tokens = [*draft.tokens[: verdict.num_accepted], verdict.next_token]
        assert all(allowed[index, token] for index, token in enumerate(tokens))


@BOTH_RULES
def test_verdicts_repeat_twenty_times_for_the_same_seed(block):
    logits = random_table(4, 50, 14)

    def verdict() -> tuple[int, int]:
        random = KeyedRandom(6)
        random.start_round(3)
        draft = drafted_by(random_table(3, 50, 15), random, EXACT)
        result, _ = target_coupling(EXACT, random, block=block).verify(draft, logits, POSITION)
        return result.num_accepted, result.next_token

    assert len({verdict() for _ in range(20)}) == 1


@pytest.mark.parametrize(("value", "kept"), [(0.0, 1), (0.4999, 1), (0.5, 0), (ALMOST_ONE, 0)])
def test_a_token_is_kept_with_the_ratio_of_its_probabilities(value, kept):
    draft = draft_of([0], [torch.tensor([0.5, 0.5], dtype=torch.float64)])
    logits = logits_of([0.25, 0.75]).repeat(2, 1)
    verdict, _ = target_coupling(EXACT, FixedUniform(value)).verify(draft, logits, POSITION)
    assert verdict.num_accepted == kept
    assert kept or verdict.next_token == 1


def test_block_verification_never_expects_to_keep_less_than_token_verification():
    logits, draft_logits = random_table(4, 8, 16), random_table(3, 8, 17)
    kept = {False: 0, True: 0}
    for seed in range(600):
        for block in kept:
            random = KeyedRandom(seed)
            draft = drafted_by(draft_logits, random, EXACT)
            kept[block] += target_coupling(EXACT, random, block=block).verify(draft, logits, POSITION)[0].num_accepted
    assert kept[True] > kept[False]


@pytest.mark.parametrize(
    ("target", "drafted", "rest"),
    [
        ([0.5, 0.5, 0.0], [0.25, 0.75, 0.0], [1.0, 0.0, 0.0]),
        ([0.2, 0.3, 0.5], [0.6, 0.2, 0.2], [0.0, 0.25, 0.75]),
        ([0.5, 0.5, 0.0], [0.0, 0.0, 1.0], [0.5, 0.5, 0.0]),  # the draft excludes all that is possible
        ([0.3, 0.3, 0.4], [0.3, 0.3, 0.4], [0.3, 0.3, 0.4]),  # no residual: never needed, but no NaN
        ([0.2, 0.3, 0.5], [0.4, 0.6], [0.0, 0.0, 1.0]),  # a smaller vocabulary
        ([0.2, 0.8], [0.5, 0.4, 0.1], [0.0, 1.0]),  # a larger one
    ],
)
def test_the_residual_is_what_the_target_has_more_than_the_draft(target, drafted, rest):
    result = residual(torch.tensor(target, dtype=torch.float64), torch.tensor(drafted, dtype=torch.float64))
    torch.testing.assert_close(result, torch.tensor(rest, dtype=torch.float64))


@BOTH_RULES
def test_rounding_errors_in_place_of_a_residual_give_a_possible_token(block):
    """The distributions differ in their last bits, and the number says reject."""
    target = distribution(random_table(1, 50, 18).float(), EXACT)[0]
    drafted = torch.nextafter(target, torch.ones(50))
    draft = draft_of([3], [drafted])
    logits = target.log().repeat(2, 1)
    verdict, probs = target_coupling(EXACT, FixedUniform(ALMOST_ONE), block=block).verify(draft, logits, POSITION)
    assert 0 <= verdict.next_token < 50
    assert all(torch.isfinite(row).all() for row in probs)


@BOTH_RULES
@pytest.mark.parametrize("num_nan_row", [0, 1])
def test_target_logits_that_are_not_finite_are_an_error_of_their_own(num_nan_row, block):
    logits = random_table(2, 10, 19)
    logits[num_nan_row, 4] = torch.nan
    draft = drafted_by(random_table(1, 10, 20), KeyedRandom(0), EXACT)
    with pytest.raises(NotFiniteError):
        target_coupling(EXACT, KeyedRandom(0), block=block).verify(draft, logits, POSITION)


# Drafts that are broken.


def uniform_rows(count: int, vocab_size: int) -> list[torch.Tensor]:
    return list(torch.full((count, vocab_size), 1 / vocab_size, dtype=torch.float64))


@pytest.mark.parametrize("broken_token", [10, 1 << 40, -1])
@pytest.mark.parametrize("with_probs", [False, True])
def test_a_draft_ends_before_an_id_outside_the_vocabulary(broken_token, with_probs):
    draft = draft_of([1, 2, broken_token, 3], uniform_rows(4, 10) if with_probs else None)
    assert usable_draft(draft, 10).tokens == [1, 2]


@pytest.mark.parametrize(
    "broken",
    [
        torch.zeros(10),
        torch.full((10,), 0.2),
        torch.full((10,), 0.0998),
        torch.eye(10)[3],  # none of it on the drafted token
        torch.full((10,), torch.nan),
        torch.tensor([math.inf] + [0.1] * 9),
    ],
    ids=["zeros", "sum_2", "sum_0.998", "not_its_own", "nan", "inf"],
)
def test_a_draft_ends_before_a_distribution_that_is_none(broken):
    draft = draft_of([1, 2, 4], [*uniform_rows(2, 10), broken.double()])
    usable = usable_draft(draft, 10)
    assert usable.tokens == [1, 2]
    assert len(usable.probs) == len(usable.origins) == 2


def test_a_draft_without_a_fault_is_left_as_it_is():
    draft = draft_of([1, 9], [row.float() * (1 + 1e-4) for row in uniform_rows(2, 10)])
    assert usable_draft(draft, 10) is draft


@BOTH_RULES
def test_a_verdict_on_a_broken_draft_is_that_on_its_sound_part(block):
    logits = random_table(5, 10, 21)
    sound = drafted_by(random_table(2, 10, 22), KeyedRandom(1), EXACT)
    for tokens, probs in (
        ([10, 1], uniform_rows(2, 10)),
        ([-1, 1], uniform_rows(2, 10)),
        ([3, 3], [torch.zeros(10)] * 2),
    ):
        broken = draft_of([*sound.tokens, *tokens], [*sound.probs, *probs])
        for seed in range(10):
            verdict, rows = target_coupling(EXACT, KeyedRandom(seed), block=block).verify(broken, logits, POSITION)
            wanted, _ = target_coupling(EXACT, KeyedRandom(seed), block=block).verify(sound, logits[:3], POSITION)
            assert verdict == wanted
            assert len(rows) == verdict.num_accepted + 1


def roles(model: MarkovModel):
    """The two verifying levels, each a function from a draft to how many of its tokens it keeps."""
    verifier = TargetVerifier(model, target_coupling(EXACT, KeyedRandom(0)))
    verifier.prefill([0, 1, 0])
    yield lambda draft: verifier.verify(draft).num_accepted
    retriever = RetrievalDrafter(model, MaximalCoupling(EXACT, KeyedRandom(0), 2))
    retriever.prefill([0, 1, 0])
    yield lambda draft: retriever.extend([], draft).num_accepted


@pytest.mark.parametrize("broken_token", [3, -1])
@pytest.mark.parametrize("role", [0, 1], ids=["target", "retrieval"])
def test_a_level_never_lets_its_model_read_an_id_outside_the_vocabulary(role, broken_token):
    table = random_table(3, 3, 23)
    judge = list(roles(MarkovModel(table)))[role]
    assert judge(draft_of([broken_token, 0], uniform_rows(2, 3))) == 0


def test_a_draft_ends_before_an_id_that_its_own_distribution_lacks():
    assert usable_draft(draft_of([1, 9], uniform_rows(2, 8)), 10).tokens == [1]


# Races.

GUMBEL = SamplingConfig(temperature=1, top_p=1, coupling=Coupling.gumbel)


@pytest.mark.parametrize("sampling", [GUMBEL, SamplingConfig(temperature=0), SamplingConfig(temperature=1e-6)])
def test_a_race_keeps_a_draft_as_far_as_it_is_the_targets_own(sampling):
    logits = random_table(4, 30, 24)
    coupling = GumbelCoupling(sampling, KeyedRandom(0))
    own = [coupling.draw(row, POSITION + index)[0] for index, row in enumerate(logits)]
    for num_right in range(4):
        drafted = own[:num_right] + [(token + 1) % 30 for token in own[num_right:3]]
        verdict, probs = coupling.verify(draft_of(drafted, None), logits, POSITION)
        assert (verdict.num_accepted, verdict.next_token) == (num_right, own[num_right])
        assert probs is None


@pytest.mark.parametrize("token", [-1, 30, 1 << 40])
def test_a_race_never_keeps_an_id_outside_the_vocabulary(token):
    verdict, _ = GumbelCoupling(GUMBEL, KeyedRandom(0)).verify(draft_of([token], None), random_table(2, 30, 25), 0)
    assert verdict.num_accepted == 0


def test_equal_races_agree_as_often_as_the_bound_promises():
    """At least (1 - d) / (1 + d) for distributions at total variation d."""
    logits, other = random_table(1, 20, 26), random_table(1, 20, 27, spread=0.3) + random_table(1, 20, 26)
    distance = float((distribution(logits, EXACT) - distribution(other, EXACT)).abs().sum()) / 2
    num_equal = 0
    for seed in range(1000):
        coupling = GumbelCoupling(GUMBEL, KeyedRandom(seed))
        num_equal += coupling.draw(logits[0], 0)[0] == coupling.draw(other[0], 0)[0]
    assert num_equal / 1000 > (1 - distance) / (1 + distance) - 0.03


def test_couplings_follow_the_configuration():
    random = KeyedRandom(0)
    assert isinstance(make_coupling(SamplingConfig(temperature=0), random, 1, is_last=False), GumbelCoupling)
    assert isinstance(make_coupling(GUMBEL, random, 1, is_last=False), GumbelCoupling)
    assert isinstance(make_coupling(EXACT, random, 2, is_last=False), MaximalCoupling)


def test_only_the_last_level_judges_blocks_as_a_whole():
    sampling = SamplingConfig(temperature=1, top_p=1, block_verification=True)
    logits, draft_logits = random_table(4, 8, 16), random_table(3, 8, 17)
    verdicts: dict[str, list] = {name: [] for name in ("inner", "last", "token", "block")}
    for seed in range(60):
        random = KeyedRandom(seed)
        draft = drafted_by(draft_logits, random, sampling)
        for name, coupling in {
            "inner": make_coupling(sampling, random, 3, is_last=False),
            "last": make_coupling(sampling, random, 3, is_last=True),
            "token": target_coupling(sampling, random),
            "block": target_coupling(sampling, random, block=True),
        }.items():
            verdicts[name].append(coupling.verify(draft, logits, POSITION)[0])
    assert verdicts["inner"] == verdicts["token"] != verdicts["block"] == verdicts["last"]


def test_races_are_keyed_apart_from_all_other_numbers():
    assert RACE not in {level * NUM_PURPOSES + purpose for level in (1, 2, 3) for purpose in (CHOOSE, ACCEPT, REPLACE)}


def test_an_unfinite_target_ends_the_run_with_its_own_error():
    setup = make_setup(3)
    setup.target[:] = torch.nan
    with pytest.raises(NotFiniteError):
        setup.build(KeyedRandom(0)).start()
