"""The exact optimum of a window: against every possibility where they can be counted, and above every chooser."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import permutations, product

import pytest

from edge_agent.core.config import PolicySection
from edge_agent.core.values import DataClass, InferenceRequest, Limits, ModelOffer, Tensor
from edge_agent.placement.options import BoardView, Option, Rules, choose
from edge_agent.sim.optimum import Arrival, Outcome, Window, feasible, optimum, replay
from tests.needs import needs_module

RELEASES = frozenset({b"f" * 32, b"s" * 32})


def offer(name: str, busy_us: int, energy_uj: int, quality: int = 800) -> ModelOffer:
    return ModelOffer(name, "detect_faces", name[0].encode() * 32, quality, busy_us, energy_uj)


def request(number: int, deadline_us: int, **others: object) -> InferenceRequest:
    inputs = {"image": Tensor("uint8", (1000,), bytes(1000))}
    return InferenceRequest(f"{number:032x}", "detect_faces", inputs, limits=Limits(deadline_us), **others)  # type: ignore[arg-type]


def drawn_window(seed: int, requests: int = 4) -> Window:
    draw = random.Random(seed)
    boards = tuple(
        BoardView(name, (offer("fast", draw.randrange(10, 60) * 1000, 900), offer("slow", draw.randrange(30, 90) * 1000, 300)))
        for name in ("a", "b")
    )
    arrivals = [
        Arrival(draw.randrange(0, 60) * 1000, draw.choice("ab"), request(number, draw.randrange(40, 140) * 1000))
        for number in range(requests)
    ]
    return Window(tuple(sorted(arrivals, key=lambda a: a.at_us)), boards, Rules(PolicySection(), RELEASES))


def by_exhaustion(window: Window) -> tuple[int, int]:
    """The best (requests, -energy) over every assignment and every order on each board."""
    best = (0, 0)
    choices = [[None, *feasible(window, arrival)] for arrival in window.arrivals]
    for taken in product(*choices):
        jobs = [(arrival, option) for arrival, option in zip(window.arrivals, taken, strict=True) if option is not None]
        score = (len(jobs), -sum(option.offer.energy_uj for _, option in jobs))
        if score > best and all(_some_order_fits([j for j in jobs if j[1].board == view.board]) for view in window.boards):
            best = score
    return best


def _some_order_fits(jobs: list[tuple[Arrival, Option]]) -> bool:
    return any(_fits(order) for order in permutations(jobs))


def _fits(order: tuple[tuple[Arrival, Option], ...]) -> bool:
    now_us = 0
    for arrival, option in order:
        now_us = max(now_us, arrival.at_us + option.cost.transfer_us) + option.cost.busy_us
        if now_us > arrival.due_us:
            return False
    return True


@pytest.mark.parametrize("seed", range(12))
def test_the_optimum_of_a_tiny_window_is_that_of_every_possibility(seed: int) -> None:
    needs_module("ortools", "bench")
    window = drawn_window(seed)
    best = optimum(window)
    assert best.proven and (best.within, -best.energy_uj) == by_exhaustion(window)


@pytest.mark.parametrize("admission", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_no_chooser_serves_more_of_a_window_than_its_optimum(seed: int, admission: bool) -> None:
    needs_module("ortools", "bench")
    window = drawn_window(seed, requests=8)
    ours, best = replay(window, choose, admission=admission), optimum(window)
    assert 0 < ours.within <= best.within and 0 <= ours.gap(best) < 1


def test_what_the_optimum_serves_overlaps_on_no_board() -> None:
    needs_module("ortools", "bench")
    window = drawn_window(3, requests=9)
    busy = {(view.board, each.model): each.busy_us for view in window.boards for each in view.offers}
    best = optimum(window)
    for view in window.boards:
        runs = sorted((start, start + busy[board, model]) for _, board, model, start in best.served if board == view.board)
        assert all(end <= begin for (_, end), (begin, _) in zip(runs, runs[1:], strict=False))


def test_a_limit_of_no_time_proves_nothing() -> None:
    needs_module("ortools", "bench")
    assert not optimum(drawn_window(5, requests=14), limit_s=0.0).proven


def test_admission_saves_what_a_hopeless_job_would_have_taken() -> None:
    """One board of 100 ms: of four requests at once, due in 150, 350, 90 and 210 ms, FIFO without shedding serves two."""
    board = BoardView("a", (offer("slow", 100_000, 10),))
    arrivals = tuple(Arrival(0, "a", request(n, due * 1000)) for n, due in enumerate((150, 350, 90, 210)))
    window = Window(arrivals, (board,), Rules(PolicySection(), RELEASES))
    with_it, without = replay(window, choose), replay(window, choose, admission=False)
    assert [each[0][-1] for each in with_it.served] == ["0", "3", "1"]
    assert (with_it.within, without.within) == (3, 2)


def test_a_replayed_request_starts_after_its_transfer() -> None:
    far = BoardView("b", (offer("fast", 10_000, 10),))
    window = Window((Arrival(5_000, "a", request(1, 100_000)),), (BoardView("a", ()), far), Rules(PolicySection(), RELEASES))
    assert replay(window, choose).served == ((f"{1:032x}", "b", "fast", 5_000 + 2_000 + 100),)


def test_infeasible_options_are_in_no_window() -> None:
    window = drawn_window(1)
    private = replace(window.arrivals[0], request=request(1, 200_000, data=DataClass.LOCAL))
    assert {option.board for option in feasible(window, private)} == {private.ingress}
    unsigned = replace(window, rules=Rules())
    assert not feasible(unsigned, window.arrivals[0]) and replay(unsigned, choose) == Outcome(0, 0)
