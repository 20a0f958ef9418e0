"""How often requests come in: counted by class, forgotten by and by, bounded, the same for the same history."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.core.values import MAX_DEADLINE_US
from edge_agent.core.wanted import MAX_DEMANDS, Wanted
from edge_agent.node.arrivals import MAX_CLASSES, Arrivals

SECOND_US = 1_000_000
FACES = Wanted("detect_faces", "", 5, 16, 1 << 20)


def wanted(number: int) -> Wanted:
    return Wanted(f"task_{number}", "", 0, 0, 1 << 20)


def told(arrivals: Arrivals, now_us: int) -> dict[Wanted, int]:
    return {each.wanted: each.rate_mhz for each in arrivals.demand(now_us)}


@pytest.mark.parametrize("rate_hz", [1, 5, 50])
def test_a_steady_stream_is_told_by_its_rate_within_a_third(rate_hz: int) -> None:
    arrivals = Arrivals()
    for number in range(60 * rate_hz):
        arrivals.count(FACES, number * SECOND_US // rate_hz)
    assert 667 * rate_hz <= told(arrivals, 60 * SECOND_US)[FACES] <= 1500 * rate_hz


def test_a_stream_of_chance_changes_what_is_told_seldom() -> None:
    arrivals, random, now_us = Arrivals(), Random(3), 0
    tellings: list[int] = []
    while now_us < 300 * SECOND_US:
        now_us += int(random.expovariate(4) * SECOND_US)
        arrivals.count(FACES, now_us)
        if now_us // SECOND_US > len(tellings):
            tellings.append(told(arrivals, now_us)[FACES])
    changes = sum(one != other for one, other in zip(tellings[60:], tellings[61:], strict=False))
    assert changes <= 12, "of 240 seconds"
    assert all(1500 <= rate_mhz <= 8000 for rate_mhz in tellings[60:])


def test_what_came_once_is_forgotten_within_two_minutes() -> None:
    arrivals = Arrivals()
    arrivals.count(FACES, 0)
    assert told(arrivals, 0) == {FACES: 100}
    assert 0 < told(arrivals, 90 * SECOND_US)[FACES] < 50
    assert told(arrivals, 120 * SECOND_US) == {} and len(arrivals) == 0


@pytest.mark.parametrize("may_change", [True, False])
def test_a_stream_that_swells_or_ends_is_told_within_the_short_time_whether_or_not_small_changes_may_be(may_change: bool) -> None:
    arrivals = Arrivals()
    for number in range(120):
        arrivals.count(FACES, number * SECOND_US)
        arrivals.demand(number * SECOND_US)
    for number in range(50):
        arrivals.count(FACES, 120 * SECOND_US + number * SECOND_US // 5)
    (swollen,) = arrivals.demand(130 * SECOND_US, may_change)
    assert 2_500 <= swollen.rate_mhz <= 5_500
    (ended,) = arrivals.demand(150 * SECOND_US, may_change)
    assert ended.rate_mhz <= 1_500


def test_small_changes_wait_until_they_may_be_told() -> None:
    arrivals = Arrivals()
    arrivals.count(FACES, 0)
    first = arrivals.demand(0)
    arrivals.count(wanted(1), SECOND_US)
    assert arrivals.demand(SECOND_US, may_change=False) == first
    assert {each.wanted for each in arrivals.demand(2 * SECOND_US)} == {FACES, wanted(1)}


def test_a_class_that_was_told_gives_way_only_to_one_that_comes_twice_as_often() -> None:
    arrivals = Arrivals()
    for number in range(10, 10 + MAX_DEMANDS):
        for _ in range(4):
            arrivals.count(wanted(number), 0)
    known = set(told(arrivals, 0))
    for _ in range(7):
        arrivals.count(wanted(99), 0)
    assert set(told(arrivals, 0)) == known
    for _ in range(2):
        arrivals.count(wanted(99), 0)
    assert wanted(99) in told(arrivals, 0)


def test_requests_that_differ_within_a_class_are_one_demand() -> None:
    arrivals = Arrivals()
    for size_bytes in (9, 12, 16):
        arrivals.count(Wanted("detect_faces", "", 5, size_bytes, (1 << 20) + size_bytes), 0)
    assert told(arrivals, 0) == {FACES: 300}


def test_the_least_frequent_classes_give_way_and_those_that_come_most_are_told_ascending() -> None:
    arrivals = Arrivals()
    for number in range(997, 1000):
        for _ in range(10):
            arrivals.count(wanted(number), 0)
    for number in range(10, 10 + 3 * MAX_CLASSES):
        arrivals.count(wanted(number), SECOND_US)
    assert len(arrivals) == MAX_CLASSES
    demand = arrivals.demand(SECOND_US)
    assert len(demand) == MAX_DEMANDS and list(demand) == sorted(demand)
    assert {wanted(number) for number in range(997, 1000)} <= {each.wanted for each in demand}


def test_a_flood_saturates_and_stays_within_the_bounds_of_a_demand() -> None:
    arrivals = Arrivals(time_constant_us=10_000)
    for _ in range(20_000):
        arrivals.count(FACES, 0)
    assert told(arrivals, 0)[FACES] <= 10**9


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5 * SECOND_US)), max_size=30), st.integers(0, 60 * SECOND_US))
def test_what_is_told_depends_on_what_was_counted_and_when_alone(history: list[tuple[int, int]], later_us: int) -> None:
    now_us, one, other = 0, Arrivals(), Arrivals()
    for number, interval_us in history:
        now_us += interval_us
        for each in (one, other):
            each.count(wanted(number), now_us)
    first = one.demand(now_us + later_us)
    assert first == other.demand(now_us + later_us)


@pytest.mark.parametrize("deadline_us", [1, 3, MAX_DEADLINE_US])
def test_whatever_a_request_may_want_can_be_counted(deadline_us: int) -> None:
    arrivals = Arrivals()
    arrivals.count(Wanted("detect_faces", "m", 0, 2**40, deadline_us, 999, 10**12), 0)
    assert len(arrivals.demand(0)) == 1
