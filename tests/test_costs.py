"""What steps cost is learned while they run: quick ones at once, slow ones when they last, and one outlier never."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edge_agent.language.batching import MAX_CURVE_POINTS, MAX_STEP_US, CostCurve
from edge_agent.language.costs import EPOCH_STEPS, LEAST_STEPS, Costs

QUIET = CostCurve(((1, 4000), (4, 5000), (8, 7000), (64, 24_000)))
NOISY = CostCurve(((1, 4100), (4, 19_000), (8, 20_000), (64, 60_000)))


def after(curve: CostCurve, *epochs: list[tuple[int, int]]) -> CostCurve:
    costs = Costs(curve)
    for steps in epochs:
        for number in range(EPOCH_STEPS):
            costs.took(*steps[number % len(steps)])
    return costs.curve


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 2 * MAX_STEP_US)), max_size=400))
def test_whatever_steps_take_the_curve_stays_one(samples: list[tuple[int, int]]) -> None:
    costs = Costs(QUIET)
    for rows, us in samples:
        costs.took(rows, us)
        assert len(costs._seen) <= EPOCH_STEPS
    points = costs.curve.points
    assert len(points) <= MAX_CURVE_POINTS and points[0][0] == 1 and points[-1][0] == 64
    assert CostCurve(points) == costs.curve, "it ascends"


def test_a_curve_that_is_full_takes_no_more_points() -> None:
    points = CostCurve(tuple((each, 1000 + each) for each in range(2, 120, 2)))
    learned = after(points, [(each, 900) for each in range(3, 119, 2)])
    assert len(learned.points) == MAX_CURVE_POINTS


def test_a_noisy_start_is_forgotten_after_one_epoch() -> None:
    learned = after(NOISY, [(1, 4000), (4, 5000)])
    assert (learned.us(1), learned.us(4)) == (4000, 5000)
    assert learned.us(8) == 20_000 * 5000 // 19_000, "what was not tried was as noisy as what was"


def test_a_quick_step_of_many_rows_bounds_those_of_fewer() -> None:
    assert after(NOISY, [(1, 4100), (4, 19_000), (8, 7000)]).points[:3] == ((1, 4100), (4, 7000), (8, 7000))


def test_a_machine_that_became_slow_is_believed_bit_by_bit_and_a_quick_one_at_once() -> None:
    slow = [[(1, 8000)]] * 20
    costs = [after(QUIET, *slow[:count]).us(1) for count in range(1, 21)]
    assert costs[0] == 5000 and costs == sorted(costs) and 7900 < costs[-1] <= 8000
    assert after(QUIET, *slow).us(4) > 9000, "four rows are slower, too, though nobody tried them"
    assert after(QUIET, *slow, [(1, 4000)]).us(1) == 4000


def test_outliers_and_what_is_rare_change_nothing() -> None:
    outliers = [(1, 4000), *[(1, 10**9)] * (EPOCH_STEPS - 1)]
    assert after(QUIET, outliers) == QUIET
    rare = [(8, 10**6)] * (LEAST_STEPS - 1) + [(1, 4000)] * (EPOCH_STEPS - LEAST_STEPS + 1)
    assert after(QUIET, rare) == QUIET


def test_a_number_of_rows_that_was_not_measured_is_learned_too() -> None:
    assert after(QUIET, [(1, 4000), (2, 4100), (4, 5000)]).points[:3] == ((1, 4000), (2, 4100), (4, 5000))
    assert after(QUIET, [(100, 1)]) == QUIET, "but not past the end"
