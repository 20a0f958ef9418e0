"""The order of what waits: nothing lost, nothing twice, earliest deadline first, and nobody shut out of a full queue."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import permutations
from time import perf_counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from edge_agent.core.config import PolicySection, QueueSection
from edge_agent.core.values import ShapeCost
from edge_agent.placement.admission import (
    CONFIDENT,
    MAX_DISPLACED,
    TRIED_EVERY,
    Line,
    TooLate,
    Waiter,
    Waiting,
    least_us,
    why_hopeless,
)
from edge_agent.placement.cost import option_cost
from edge_agent.placement.options import Decision, Option
from tests.virtual_board import offer as talker

LIMITS = QueueSection(max_requests=6, max_bytes=2**20)


def waiter(number: int, *, origin: str = "a", deadline_us: int = 10**6, busy_us: int = 10, size_bytes: int = 1) -> Waiter:
    return Waiter(f"{origin}/{number}", "", origin, deadline_us, size_bytes, busy_us, busy_us)


def in_time(order: tuple[tuple[int, int], ...]) -> int:
    """How many of these (busy, deadline) are done in time, one after the other."""
    now_us = done = 0
    for busy_us, deadline_us in order:
        now_us += busy_us
        done += now_us <= deadline_us
    return done


tasks = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 60)), max_size=6)


@given(tasks)
def test_whatever_any_order_does_in_time_the_earliest_deadline_first_does(given_tasks: list[tuple[int, int]]) -> None:
    waiting = Waiting(LIMITS)
    for number, (busy_us, deadline_us) in enumerate(given_tasks):
        waiting.add(waiter(number, deadline_us=deadline_us, busy_us=busy_us))
    ours = tuple(given_tasks[int(key.split("/")[1])] for key in waiting.in_order(""))
    feasible = any(in_time(order) == len(given_tasks) for order in permutations(given_tasks))
    assert (in_time(ours) == len(given_tasks)) == feasible


@given(tasks, st.sampled_from(("edf", "fifo")))
def test_the_order_is_that_of_deadlines_or_of_arrival_and_of_arrival_among_equals(
    given_tasks: list[tuple[int, int]], order: str
) -> None:
    waiting = Waiting(QueueSection(order=order))
    for number, (_, deadline_us) in enumerate(given_tasks):
        waiting.add(waiter(number, deadline_us=deadline_us))
    numbers = [int(key.split("/")[1]) for key in waiting.in_order("")]
    assert numbers == sorted(numbers, key=lambda each: (given_tasks[each][1], each) if order == "edf" else each)


class LineMachine(RuleBasedStateMachine):
    """A line against a sorted list, long enough to be cut into pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.model, self.random = Line(), dict[tuple[int, int], int](), random.Random(1)

    @rule(count=st.integers(1, 400), spread=st.integers(1, 50))
    def add(self, count: int, spread: int) -> None:
        for _ in range(count):
            rank = (self.random.randrange(spread), len(self.model) + self.random.randrange(10**9))
            if rank not in self.model:
                self.model[rank] = self.random.randrange(100)
                self.line.add(rank, str(rank), self.model[rank])

    @rule(share=st.integers(1, 10))
    def remove(self, share: int) -> None:
        for rank in list(self.model):
            if self.random.randrange(10) < share:
                del self.model[rank]
                self.line.remove(rank)

    @rule()
    def ask_for_what_is_not_there(self) -> None:
        with pytest.raises(KeyError):
            self.line.remove((-1, -1))

    @invariant()
    def all_is_there_in_order_with_its_weight(self) -> None:
        ranks = sorted(self.model)
        assert list(self.line) == list(map(str, ranks)) == list(reversed(list(reversed(self.line))))
        assert len(self.line) == len(ranks) and self.line.total == sum(self.model.values())
        for place in range(0, len(ranks), 1 + len(ranks) // 5):
            assert self.line.before(ranks[place]) == sum(self.model[rank] for rank in ranks[:place])
        assert self.line.before((10**9, 0)) == self.line.total and self.line.before((-1, 0)) == 0


@pytest.mark.parametrize("examples", [12, pytest.param(40, marks=pytest.mark.long)])
def test_a_line_is_a_sorted_list_whatever_is_added_and_removed(examples: int) -> None:
    run_state_machine_as_test(LineMachine, settings=settings(max_examples=examples, deadline=None))


arrivals = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(1, 50), st.integers(0, 30), st.sampled_from((1, 300_000)), st.booleans()),
    max_size=60,
)


@given(arrivals)
def test_nothing_is_lost_or_there_twice_and_the_queue_stays_bounded(events: list[tuple[str, int, int, int, bool]]) -> None:
    waiting, model = Waiting(LIMITS), dict[str, Waiter]()
    for number, (origin, deadline_us, busy_us, size_bytes, takes_one) in enumerate(events):
        new = waiter(number, origin=origin, deadline_us=deadline_us, busy_us=busy_us, size_bytes=size_bytes)
        if not waiting.full(new.size_bytes, origin):
            for key in waiting.giving_way(new.size_bytes, origin):
                assert waiting.remove(key) == model.pop(key)
            assert not waiting.full(new.size_bytes)
            waiting.add(new)
            model[new.key] = new
        if takes_one and (first := next(waiting.in_order(""), None)):
            assert waiting.remove(first) == model.pop(first) and waiting.remove(first) is None
        assert set(waiting.in_order("")) == set(model) and len(waiting) == len(model) <= LIMITS.max_requests
        assert waiting.size_bytes == sum(each.size_bytes for each in model.values()) <= LIMITS.max_bytes
        for name in "abc":
            assert waiting.work_us(name) == sum(max(1, each.busy_us) for each in model.values() if each.origin == name)


@given(arrivals)
def test_who_has_less_waiting_is_never_shut_out_and_nobody_is_driven_under_who_asks(
    events: list[tuple[str, int, int, int, bool]],
) -> None:
    waiting = Waiting(QueueSection(max_requests=6))
    for number, (origin, deadline_us, busy_us, _, _) in enumerate(events):
        mine_us = waiting.work_us(origin)
        going = waiting.giving_way(1, origin)
        assert len(going) <= MAX_DISPLACED
        losers = {key.split("/")[0] for key in going}
        assert origin not in losers
        if waiting.full(1, origin):
            assert not going
            others = [name for name in "abc" if name != origin]
            last = {name: [key for key in waiting.in_order("") if key.startswith(name)][-1:] for name in others}
            for name in others:
                for key in last[name]:
                    if name == max(others, key=lambda each: (waiting.work_us(each), each)):
                        kept_us = waiting.work_us(name) - max(1, waiting._ranked[key][0].busy_us)
                        assert kept_us <= mine_us
            continue
        for key in going:
            waiting.remove(key)
        assert all(waiting.work_us(name) > mine_us for name in losers)
        waiting.add(waiter(number, origin=origin, deadline_us=deadline_us, busy_us=busy_us))


def test_a_flood_of_one_board_does_not_shut_the_others_out() -> None:
    """However it comes: the others' jobs get places up to an equal share, and those once taken are not lost to the flood."""
    waiting = Waiting(QueueSection(max_requests=30))
    for number in range(30):
        waiting.add(waiter(number, origin="flood", deadline_us=1))
    for number in range(100):
        origin = "flood" if number % 2 else "bcd"[number // 2 % 3]
        if not waiting.full(1, origin):
            for key in waiting.giving_way(1, origin):
                waiting.remove(key)
            waiting.add(waiter(100 + number, origin=origin, deadline_us=10**9))
    shares = [waiting.work_us(origin) // 10 for origin in ("flood", "b", "c", "d")]
    assert sum(shares) == 30 and max(shares) - min(shares) <= 2


def test_the_last_in_the_order_gives_way_and_as_many_as_the_bytes_need() -> None:
    waiting = Waiting(QueueSection(max_requests=6, max_bytes=1_000))
    for number, deadline_us in enumerate((30, 10, 40, 20)):
        waiting.add(waiter(number, origin="b", deadline_us=deadline_us, size_bytes=240))
    assert waiting.giving_way(240, "c") == ["b/2"] and waiting.giving_way(500, "c") == ["b/2", "b/0"]
    assert waiting.giving_way(900, "c") == [] and waiting.giving_way(1_001, "c") == []
    assert "960 of 1000 bytes wait, 900 more asked" in waiting.full(900, "c")


def test_what_takes_how_long_at_least_is_said_only_of_what_was_measured_often() -> None:
    assert least_us(100, 30, CONFIDENT - 1) == 0 and least_us(100, 30, CONFIDENT) == 70
    assert least_us(100, 300, 10**6) == 0
    assert not why_hopeless(0, 10**9, 0) and not why_hopeless(70, 30, 100)
    assert "after 31 µs of other work it takes 70 µs at least and 100 µs are left" in why_hopeless(70, 31, 100)
    assert "in time: it takes 70 µs" in why_hopeless(70, 0, 60)


def decision(*latencies_us: int, measured: int = CONFIDENT) -> Decision:
    """Options that take so long, on as many boards."""
    options = []
    for number, latency_us in enumerate(latencies_us):
        offer = replace(talker("small", 1_000), shapes=(ShapeCost(5, 1_000, 0, measured),))
        cost = option_cost(
            PolicySection(), busy_us=latency_us, energy_uj=0, queue_us=0, payload_bytes=0, remote=False, budget_us=1,
            quality_permille=0,
        )  # fmt: skip
        options.append(Option(f"b{number}", offer, cost))
    return Decision("ab" * 16, tuple(options), ())


def test_what_every_board_would_surely_be_too_late_for_is_not_placed_and_says_by_how_much() -> None:
    why = TooLate().why(decision(2_000, 1_500), 1_000)
    assert "1000 µs are left" in why and "small on b1, would take 1500 µs" in why and "longer deadline" in why


@pytest.mark.parametrize(
    ("options", "budget_us"),
    [
        (decision(2_000, 1_250), 1_000),
        (decision(2_000, 900), 1_000),
        (decision(2_000, measured=CONFIDENT - 1), 1_000),
        (decision(), 1_000),
    ],
    ids=["late by a quarter at most", "one is in time", "too little was measured", "no option at all"],
)
def test_what_may_be_done_in_time_is_placed(options: Decision, budget_us: int) -> None:
    assert not TooLate().why(options, budget_us)


def test_of_what_comes_too_late_one_in_so_many_is_placed_so_that_a_wrong_estimate_is_found_out() -> None:
    late = TooLate()
    placed = [not late.why(decision(2_000), 1_000) for _ in range(2 * TRIED_EVERY)]
    assert placed.count(True) == 2 and placed[TRIED_EVERY - 1]


def test_the_same_key_twice_is_the_callers_bug() -> None:
    waiting = Waiting(LIMITS)
    waiting.add(waiter(1))
    with pytest.raises(RuntimeError, match="a/1 waits already"):
        waiting.add(waiter(1))


def test_an_operation_costs_little_more_among_many_that_wait() -> None:
    """Counted, not timed: the comparisons and sums that a thousand, and sixteen thousand, waiting ones need."""
    steps = {count: touched(count) for count in (1_000, 16_000)}
    assert steps[1_000] <= 100 and steps[16_000] <= 400


def touched(count: int) -> int:
    """How many entries and chunks are summed up for one question."""
    line, chance = Line(), random.Random(2)
    for number in range(count):
        line.add((chance.randrange(10**6), number), str(number), 1)
    return len(line._chunks) + max(map(len, line._chunks)) // 2


def main() -> None:
    """What an operation takes: ``python -m tests.test_admission``."""
    for count in (1_000, 10_000, 100_000):
        waiting, chance = Waiting(QueueSection(max_requests=10**6)), random.Random(3)
        started = perf_counter()
        for number in range(count):
            waiting.add(waiter(number, deadline_us=chance.randrange(10**9)))
        added, keys = perf_counter(), [f"a/{number}" for number in range(count)]
        for key in keys[:1_000]:
            waiting.before_us(key)
        asked = perf_counter()
        for key in keys:
            waiting.remove(key)
        taken = perf_counter()
        each_us = [1e6 * (added - started) / count, 1e6 * (asked - added) / 1_000, 1e6 * (taken - asked) / count]
        print(f"{count:7} waiting: add {each_us[0]:.1f} µs, work before {each_us[1]:.1f} µs, remove {each_us[2]:.1f} µs")


if __name__ == "__main__":
    main()
