"""What a board learns of its models: quickly from steady measurements, little from one wild one, something for every shape."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.core.chat import CHAT
from edge_agent.core.values import MAX_COST, MAX_SHAPE, MAX_SHAPES, ModelOffer, ShapeCost
from edge_agent.core.wanted import TALK_SHAPE, answer_tokens_of
from edge_agent.placement.cost import TYPICAL_SHAPE, CostBook, expected_cost
from tests.virtual_board import offer

PRIOR = offer("m", 10_000)
SHAPE = 12
ENOUGH = 24
"""Measurements after which a cost that stays the same is known, whatever was believed before."""


def book(prior: ModelOffer = PRIOR, *measured_us: int, shape: int = SHAPE) -> CostBook:
    costs = CostBook()
    costs.host(prior)
    for busy_us in measured_us:
        costs.learn(prior.model, shape, busy_us, busy_us)
    return costs


def test_before_anything_was_measured_the_offer_is_the_prior() -> None:
    costs = book()
    assert costs.offer("m") == PRIOR and costs.cost("m", SHAPE) == ShapeCost(SHAPE, 10_000, 10_000)
    assert costs.spread_us("m", SHAPE) == 10_000, "nothing is sure"


@given(st.integers(1, 10**9), st.integers(0, 10**9), st.integers(1, 10**9), st.integers(0, 10**9))
def test_a_constant_is_known_to_a_hundredth_after_enough_measurements_whatever_the_prior_was(
    prior_us: int, prior_uj: int, busy_us: int, energy_uj: int
) -> None:
    costs = CostBook()
    costs.host(replace(PRIOR, busy_us=prior_us, energy_uj=prior_uj))
    for _ in range(ENOUGH):
        costs.learn("m", SHAPE, busy_us, energy_uj)
    known = costs.cost("m", SHAPE)
    assert abs(known.busy_us - busy_us) <= busy_us // 100 + 1
    assert abs(known.energy_uj - energy_uj) <= energy_uj // 100 + 1
    for _ in range(200):
        costs.learn("m", SHAPE, busy_us, energy_uj)
    assert costs.spread_us("m", SHAPE) <= busy_us // 1000 + 1


@pytest.mark.parametrize("stalls", [1, 2])
def test_a_stall_of_a_hundred_times_moves_an_estimate_by_an_eighth_and_is_forgotten(stalls: int) -> None:
    costs = book(PRIOR, *[10_000] * 50)
    for _ in range(stalls):
        costs.learn("m", SHAPE, 1_000_000, 1_000_000)
    after = costs.cost("m", SHAPE)
    limit = 10_000 * 9**stalls // 8**stalls
    assert 10_000 < after.busy_us <= limit and 10_000 < after.energy_uj <= limit
    assert costs.offer("m").busy_us <= limit, "nor the model's figure for every other shape"
    for _ in range(20):
        costs.learn("m", SHAPE, 10_000, 10_000)
    assert abs(costs.cost("m", SHAPE).busy_us - 10_000) <= 300


def test_stalls_now_and_then_never_add_up() -> None:
    costs = book(PRIOR, *[1_000_000 if number % 10 == 9 else 10_000 for number in range(500)])
    assert 10_000 <= costs.cost("m", SHAPE).busy_us <= 12_500


def test_three_wild_ones_in_a_row_are_a_new_state_of_things_at_the_mildest_of_them_and_confidence_begins_anew() -> None:
    costs = book(PRIOR, *[10_000] * 50, 90_000, 5_000_000, 100_000)
    known = costs.cost("m", SHAPE)
    assert known.busy_us == 90_000 and known.measured == 3
    assert costs.spread_us("m", SHAPE) >= 70_000, "and it is not sure"
    costs = book(PRIOR, *[10_000] * 50, 100, 1, 50)
    assert costs.cost("m", SHAPE).busy_us == 100


def test_wild_ones_on_both_sides_by_turns_are_not_believed() -> None:
    for wild_us in ([100_000, 1] * 20, [100_000, 100_000, 1] * 10):
        known = book(PRIOR, *[10_000] * 50, *wild_us).cost("m", SHAPE)
        assert 5_000 <= known.busy_us <= 40_000 and known.measured == 50 + len(wild_us)


@given(st.lists(st.tuples(st.integers(0, 127), st.integers(-5, 10**18), st.integers(-5, 10**18)), max_size=60))
def test_whatever_is_measured_the_offer_stays_one_and_in_whole_numbers(samples: list[tuple[int, int, int]]) -> None:
    costs = book(offer("m", 10_000, task=CHAT))
    for shape, busy_us, energy_uj in samples:
        costs.learn("m", shape, busy_us, energy_uj)
        told = costs.offer("m")
        assert ModelOffer(**{name: getattr(told, name) for name in ModelOffer.__slots__}) == told
        assert all(type(each.busy_us) is type(each.energy_uj) is int for each in told.shapes)
        assert 1 <= costs.cost("m", shape).busy_us <= MAX_COST and costs.spread_us("m", shape) >= 0


def test_a_shape_that_was_never_seen_profits_from_the_others() -> None:
    costs = book(PRIOR, *[30_000] * 20)
    unseen = costs.cost("m", SHAPE + 1)
    assert 29_000 <= unseen.busy_us <= 30_000 and 29_000 <= unseen.energy_uj <= 30_000 and unseen.measured == 0
    assert expected_cost(costs.offer("m"), SHAPE + 1) == replace(unseen, shape=SHAPE + 1)


def test_each_shape_is_corrected_by_itself() -> None:
    costs = book(PRIOR)
    for _ in range(50):
        costs.learn("m", 10, 10_000, 1_000)
        costs.learn("m", 20, 25_000, 9_000)
    small, large = costs.cost("m", 10), costs.cost("m", 20)
    assert (small.measured, large.measured) == (50, 50)
    assert abs(small.busy_us - 10_000) <= 100 and abs(large.busy_us - 25_000) <= 250
    assert abs(small.energy_uj - 1_000) <= 10 and abs(large.energy_uj - 9_000) <= 90


def test_talk_of_a_length_that_was_never_seen_is_in_proportion_to_its_answer() -> None:
    prior = offer("parrot", answer_tokens_of(TYPICAL_SHAPE) * 1_000, task=CHAT)
    costs = book(prior)
    for shape in range(TALK_SHAPE + 1, TALK_SHAPE + 21):
        assert costs.cost("parrot", shape).busy_us == answer_tokens_of(shape) * 1_000
        assert costs.cost("parrot", shape) == expected_cost(prior, shape), "boards that only hear the offer reckon the same"
    slow = book(prior, *[4 * answer_tokens_of(70) * 1_000] * 20, shape=70)
    assert abs(slow.cost("parrot", 75).busy_us - 4 * answer_tokens_of(75) * 1_000) <= answer_tokens_of(75) * 40
    assert expected_cost(slow.offer("parrot"), 70) == slow.offer("parrot").cost_of(70)
    assert costs.cost("parrot", MAX_SHAPE).busy_us <= MAX_COST


def test_a_board_tells_of_the_shapes_that_were_measured_most() -> None:
    costs = book(PRIOR)
    for shape in range(20):
        for _ in range(40 - shape if shape % 2 else 1):
            costs.learn("m", shape, 10_000, 10_000)
    told = costs.offer("m")
    assert [each.shape for each in told.shapes] == [1, 3, 5, 7, 9, 11, 13, 15] and len(told.shapes) == MAX_SHAPES
    assert told.measured == sum(40 - shape if shape % 2 else 1 for shape in range(20))


def test_what_was_learned_goes_with_the_model_and_stays_while_the_same_prior_is_hosted() -> None:
    costs = book(PRIOR, *[30_000] * 20)
    learned = costs.offer("m")
    costs.host(PRIOR)
    assert costs.offer("m") == learned
    costs.host(replace(PRIOR, digest=bytes(32)))
    assert costs.offer("m").measured == 0, "another model of that name"
    costs.withdraw("m")
    costs.learn("m", SHAPE, 1, 1)
    assert not costs.offers
    with pytest.raises(KeyError):
        costs.cost("m", SHAPE)


@given(st.lists(st.integers(8_000, 12_000), min_size=30, max_size=60))
def test_the_spread_is_that_of_the_measurements(samples: list[int]) -> None:
    costs = book(PRIOR, *samples)
    assert 8_000 <= costs.cost("m", SHAPE).busy_us <= 12_000 and costs.spread_us("m", SHAPE) <= 4_000
