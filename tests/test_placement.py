"""Placement is a pure function in integers: the same view gives the same decision, and every exclusion has its reason."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields, replace
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.core.config import PolicySection
from edge_agent.core.values import InferenceRequest, Limits, ModelOffer, Tensor
from edge_agent.placement.cost import CostParts, option_cost
from edge_agent.placement.options import BoardView, Decision, Rules, choose
from tests.virtual_board import TASK, offer

POLICY = PolicySection()
RULES = Rules(POLICY, frozenset(sha256(name.encode()).digest() for name in ("m", "m1", "m2", "m3", "large", "small", "tiny")))
REQUEST = InferenceRequest("ab" * 16, TASK, {"image": Tensor("uint8", (1000,), bytes(1000))})
SECOND_US = 1_000_000

offers = st.builds(
    offer,
    st.sampled_from(("m1", "m2", "m3")),
    st.sampled_from((1_000, 2_000, 50_000)),
    st.sampled_from((500, 900)),
    st.sampled_from((TASK, "classify")),
)
views = st.builds(
    BoardView,
    st.sampled_from("abcdef"),
    st.lists(offers, max_size=3, unique_by=lambda each: each.model).map(tuple),
    st.sampled_from((0, 1_000, 10**7)),
    st.booleans(),
    st.none() | st.integers(-5_000, 5_000),
    st.sampled_from(("", "", "it is offline")),
)
fleets = st.lists(views, max_size=6, unique_by=lambda view: view.board)
requests = st.builds(
    InferenceRequest,
    st.just("ab" * 16),
    st.just(TASK),
    st.just(REQUEST.inputs),
    st.sampled_from((None, None, "m1")),
    st.builds(Limits, st.just(SECOND_US), st.sampled_from((None, 10_000)), st.sampled_from((0, 800, 950))),
)


def decided(request: InferenceRequest, *boards: BoardView, budget_us: int = SECOND_US) -> Decision:
    return choose(request, boards, RULES, budget_us)


def only_reason(request: InferenceRequest, view: BoardView) -> str:
    decision = decided(request, view)
    assert decision.chosen is None
    return decision.excluded[0].reason


@given(requests, fleets, st.data())
def test_the_order_in_which_boards_and_offers_are_known_does_not_matter(
    request: InferenceRequest, fleet: list[BoardView], data: st.DataObject
) -> None:
    shuffled = [
        replace(view, offers=tuple(data.draw(st.permutations(view.offers)))) for view in data.draw(st.permutations(fleet))
    ]
    assert decided(request, *fleet) == decided(request, *shuffled)


@given(requests, fleets)
def test_every_option_is_ranked_or_excluded_with_a_reason(request: InferenceRequest, fleet: list[BoardView]) -> None:
    decision = decided(request, *fleet)
    assert all(exclusion.reason for exclusion in decision.excluded)
    options = {(view.board, each.model) for view in fleet for each in view.offers if each.serves(request)}
    out = {(exclusion.board, exclusion.model) for exclusion in decision.excluded}
    ranked = {(option.board, option.offer.model) for option in decision.ranked}
    assert ranked == {(board, model) for board, model in options if (board, model) not in out and (board, "") not in out}
    assert {view.board for view in fleet} == {board for board, _ in ranked | out}


@given(requests, fleets)
def test_the_chosen_option_costs_least_and_every_figure_is_a_whole_number(
    request: InferenceRequest, fleet: list[BoardView]
) -> None:
    decision = decided(request, *fleet)
    assert list(decision.ranked) == sorted(decision.ranked, key=lambda o: (o.cost.total_us, o.offer.model, o.board))
    assert decision.chosen == (decision.ranked[0] if decision.ranked else None)
    for option in decision.ranked:
        assert all(type(getattr(option.cost, part.name)) is int for part in fields(CostParts))


@given(requests, fleets)
def test_no_filter_is_ever_priced(request: InferenceRequest, fleet: list[BoardView]) -> None:
    by_board = {view.board: view for view in fleet}
    for option in decided(request, *fleet).ranked:
        view, limits = by_board[option.board], request.limits
        assert not view.barred and option.offer.serves(request)
        assert view.headroom_mdegc is None or view.headroom_mdegc >= POLICY.guard_band_mdegc
        assert option.offer.quality_permille >= limits.quality_permille
        assert limits.energy_uj is None or option.offer.energy_uj <= limits.energy_uj


def test_ties_go_to_the_smaller_model_and_then_the_smaller_board() -> None:
    twins = (offer("m2", 1_000), offer("m1", 1_000))
    decision = decided(REQUEST, BoardView("b", twins), BoardView("a", twins))
    assert [(o.offer.model, o.board) for o in decision.ranked] == [("m1", "a"), ("m1", "b"), ("m2", "a"), ("m2", "b")]


def test_a_decision_does_not_depend_on_the_hash_seed() -> None:
    program = (
        "from tests.test_placement import *; twins = (offer('m2', 9), offer('m1', 9));"
        "boards = [BoardView(name, twins) for name in {'d', 'a', 'c', 'b'}];"
        "d = choose(REQUEST, boards, RULES, 1000); print([(o.board, o.offer.model, o.cost) for o in d.ranked])"
    )
    path = os.pathsep.join(sys.path)
    decisions = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(decisions) == 1 and "'a', 'm1'" in decisions.pop()


@pytest.mark.parametrize(
    ("request_", "view", "reason"),
    [
        (REQUEST, BoardView("b", (offer("m", 1),), barred="it is offline"), "it is offline"),
        (REQUEST, BoardView("b", (offer("m", 1),), headroom_mdegc=1_999), "too hot: 1999 m°C under its trip point"),
        (REQUEST, BoardView("b", ()), "does not host a model for detect_faces; it hosts nothing"),
        (REQUEST, BoardView("b", (offer("m", 1, task="sort"),)), r"it hosts m \(sort\)"),
        (replace(REQUEST, model="n"), BoardView("b", (offer("m", 1),)), "does not host n"),
        (
            replace(REQUEST, limits=Limits(quality_permille=801)),
            BoardView("b", (offer("m", 1, 800),)),
            "quality 800 ‰ is under the request's floor of 801 ‰",
        ),
        (
            replace(REQUEST, limits=Limits(energy_uj=99)),
            BoardView("b", (offer("m", 100),)),
            "100 µJ an inference is over the request's 99 µJ",
        ),
    ],
)
def test_an_exclusion_says_why(request_: InferenceRequest, view: BoardView, reason: str) -> None:
    import re

    assert re.search(reason, only_reason(request_, view))


@pytest.mark.parametrize(
    ("request_", "view"),
    [
        (REQUEST, BoardView("b", (offer("m", 1),), headroom_mdegc=2_000)),
        (replace(REQUEST, limits=Limits(quality_permille=800)), BoardView("b", (offer("m", 1, 800),))),
        (replace(REQUEST, limits=Limits(energy_uj=100)), BoardView("b", (offer("m", 100),))),
        (replace(REQUEST, model="m"), BoardView("b", (offer("m", 1),))),
    ],
)
def test_a_limit_that_is_just_met_excludes_nothing(request_: InferenceRequest, view: BoardView) -> None:
    assert decided(request_, view).chosen is not None


def test_why_a_request_was_shed_names_every_board() -> None:
    decision = decided(
        replace(REQUEST, limits=Limits(quality_permille=900)), BoardView("a", ()), BoardView("b", (offer("m", 1, 800),))
    )
    assert "a: does not host" in decision.why_shed() and "b/m: quality 800" in decision.why_shed()
    assert decided(REQUEST).why_shed() == "no board is known"


def cost(**changes: object) -> CostParts:
    settings: dict[str, object] = {
        "busy_us": 1_000, "energy_uj": 0, "queue_us": 0, "payload_bytes": 0, "remote": False, "budget_us": SECOND_US,
        "quality_permille": 1000,
    }  # fmt: skip
    return option_cost(POLICY, **{**settings, **changes})  # type: ignore[arg-type]


def test_the_parts_of_a_cost_are_those_of_the_model() -> None:
    parts = cost(
        busy_us=5_000, energy_uj=3_000, queue_us=7_000, payload_bytes=50_000, remote=True, budget_us=10_000, quality_permille=990
    )
    assert parts == CostParts(
        busy_us=5_000,
        wait_us=7_000,
        transfer_us=2_000 + 5_000,
        energy_us=2_100,
        lateness_us=(5_000 + 7_000 + 7_000 - 10_000) * 10,
        quality_us=200,
        work_us=5_000,
    )
    assert parts.latency_us == 19_000 and parts.total_us == 19_000 + 2_100 + 90_000 + 200


def test_work_on_the_ingress_board_travels_nowhere() -> None:
    assert cost(payload_bytes=10**6).transfer_us == 0
    assert cost(payload_bytes=10**6, remote=True).transfer_us == 2_000 + 100_000


figures = st.integers(0, 10**12)


@given(figures, figures, figures, figures, st.booleans(), st.integers(1, 10**9), st.integers(0, 1000))
def test_more_work_more_energy_or_less_quality_never_costs_less(
    busy_us: int, energy_uj: int, queue_us: int, payload_bytes: int, remote: bool, budget_us: int, quality_permille: int
) -> None:
    settings = {
        "busy_us": busy_us, "energy_uj": energy_uj, "queue_us": queue_us, "payload_bytes": payload_bytes, "remote": remote,
        "budget_us": budget_us, "quality_permille": quality_permille,
    }  # fmt: skip
    total_us = cost(**settings).total_us
    for name in ("busy_us", "energy_uj", "queue_us", "payload_bytes"):
        assert cost(**{**settings, name: int(settings[name]) + 1000}).total_us >= total_us
    assert cost(**{**settings, "quality_permille": max(0, quality_permille - 1)}).total_us >= total_us


def test_the_offer_of_the_tests_is_sound() -> None:
    assert isinstance(offer("m", 1), ModelOffer)
