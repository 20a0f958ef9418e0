"""A steady stream counts as one horizon's work; what is unanswered is counted by deadline and by when it was sent."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.core.config import PolicySection
from edge_agent.node.bookings import Ahead, Bookings
from edge_agent.placement.cost import CostParts, option_cost

HORIZON_US = 10_000_000
LANE = ("b", "")


def cost(work_us: int) -> CostParts:
    return option_cost(
        PolicySection(), busy_us=work_us, energy_uj=0, queue_us=0, payload_bytes=0, remote=False, budget_us=10**9,
        quality_permille=1000,
    )  # fmt: skip


@given(st.integers(1_000, 200_000), st.integers(50_000, 400_000))
def test_a_steady_stream_counts_as_the_work_of_one_horizon(work_us: int, every_us: int) -> None:
    bookings = Bookings(HORIZON_US)
    now_us = 0
    for number in range(8 * HORIZON_US // every_us):
        now_us = number * every_us
        bookings.give(f"{number}", LANE, cost(work_us), now_us, now_us)
        bookings.take_back(f"{number}", LANE)
    expected_us = work_us * HORIZON_US // every_us
    assert abs(bookings.recent_us("b", now_us) - expected_us) <= expected_us // 20 + 2 * work_us


def test_what_was_sent_long_ago_is_forgotten_and_boards_are_apart() -> None:
    bookings = Bookings(HORIZON_US)
    bookings.give("r", LANE, cost(5_000_000), 1, 0)
    assert bookings.recent_us("b", 0) == 5_000_000 and bookings.recent_us("c", 0) == 0
    assert 1_700_000 < bookings.recent_us("b", HORIZON_US) < 2_000_000, "about 1/e of it"
    assert bookings.recent_us("b", 100 * HORIZON_US) == 0


def test_work_ahead_is_what_is_due_before_and_fresh_what_was_sent_since_the_board_spoke() -> None:
    bookings = Bookings(HORIZON_US)
    bookings.give("early", LANE, cost(10), 1_000, 100)
    bookings.give("late", LANE, cost(200), 9_000, 100)
    bookings.give("fresh", LANE, cost(3_000), 1_000, 500)
    bookings.give("elsewhere", ("b", "talker"), cost(40_000), 1_000, 500)
    assert bookings.ahead(LANE, 1_000, 500) == Ahead(jobs=3, fresh_jobs=1, unanswered_us=3_010, fresh_us=3_000)
    assert bookings.ahead(LANE, 9_000, 501) == Ahead(jobs=3, fresh_jobs=0, unanswered_us=3_210, fresh_us=0)
    bookings.take_back("fresh", LANE)
    assert bookings.ahead(LANE, 1_000, 0) == Ahead(2, 2, 10, 10)
    assert bookings.ahead(("c", ""), 1_000, 0) == Ahead(0, 0, 0, 0)


def test_what_was_never_given_cannot_be_taken_back() -> None:
    with pytest.raises(KeyError):
        Bookings(HORIZON_US).take_back("r", LANE)
