"""What a board tells of its costs and memory: seldom anew, never better than it is, and together with the others."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.core.kv import KvState
from edge_agent.core.values import MAX_SHAPES, ModelOffer
from edge_agent.node.told import HEAT_BAND_MDEGC, HEAT_STEP_MDEGC, WAVE_PERIOD_US, WAVE_US, Told, Waves
from edge_agent.placement.cost import CostBook
from edge_agent.placement.facts import COOL_STEP_MDEGC

PRIOR = ModelOffer("faces", "detect_faces", bytes(32), 500, 1_000, 2_000)
MIB = 2**20
STATE = KvState("talker", bytes(32), 100, 200, 800 * MIB, 2048, prefill_tok_s=1_000)


def learned(*busy_us: int, shape: int = 5) -> tuple[CostBook, Told]:
    book = CostBook()
    book.host(PRIOR)
    for each in busy_us:
        book.learn("faces", shape, each, 2 * each)
    return book, Told(book)


def shapes(told: Told, *, may_change: bool = True) -> dict[int, int]:
    (offer,) = told.offers(["faces"], may_change)
    return {each.shape: each.busy_us for each in offer.shapes}


def test_what_was_told_of_a_cost_stays_until_it_is_off_by_more_than_a_fifth() -> None:
    book, told = learned(*[1_000] * 60)
    assert shapes(told) == {5: 1_000}
    for _ in range(60):
        book.learn("faces", 5, 1_150, 2_300)
    assert book.cost("faces", 5).busy_us > 1_130 and shapes(told) == {5: 1_000}
    for _ in range(60):
        book.learn("faces", 5, 1_400, 2_800)
    assert 1_300 < shapes(told)[5] <= 1_400


def test_measurements_that_scatter_widen_what_counts_as_chance() -> None:
    book, told = learned(*([600] * 4 + [1_400] * 4) * 8)
    first = shapes(told)
    known = set()
    for number in range(200):
        book.learn("faces", 5, 600 if number % 8 < 4 else 1_400, 2_000)
        known.add(book.cost("faces", 5).busy_us)
        assert shapes(told) == first
    assert 10 * max(known) > 12 * min(known)


def test_the_first_measurement_of_a_shape_is_told_and_a_prior_as_it_is() -> None:
    book, told = learned()
    assert told.offers(["faces"]) == (PRIOR,)
    book.host(replace(PRIOR, busy_us=1_100))
    assert told.offers(["faces"], may_change=False) == (replace(PRIOR, busy_us=1_100),)
    book.learn("faces", 7, 1_150, 2_000)
    assert list(shapes(told)) == [7]


def test_another_model_under_the_same_name_begins_anew() -> None:
    book, told = learned(*[1_000] * 9)
    assert shapes(told)
    book.host(replace(PRIOR, digest=bytes([1]) * 32))
    (offer,) = told.offers(["faces"], may_change=False)
    assert (offer.digest, offer.shapes, offer.measured) == (bytes([1]) * 32, (), 0)


def test_a_shape_that_was_told_gives_way_only_to_one_that_was_measured_twice_as_often() -> None:
    book, told = learned()
    for shape in range(MAX_SHAPES):
        for _ in range(8):
            book.learn("faces", shape, 1_000, 2_000)
    known = set(shapes(told))
    for _ in range(15):
        book.learn("faces", 40, 1_000, 2_000)
    assert set(shapes(told)) == known
    book.learn("faces", 40, 1_000, 2_000)
    assert 40 in shapes(told) and len(shapes(told)) == MAX_SHAPES


def test_between_waves_only_what_is_off_by_twice_is_told() -> None:
    book, told = learned(*[1_000] * 20)
    assert shapes(told) == {5: 1_000}
    for _ in range(40):
        book.learn("faces", 5, 1_800, 3_600)
    assert shapes(told, may_change=False) == {5: 1_000}
    for _ in range(40):
        book.learn("faces", 5, 2_600, 5_200)
    assert shapes(told, may_change=False)[5] > 2_000


@given(st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 2 * WAVE_PERIOD_US), st.booleans()), max_size=40))
def test_never_more_memory_is_told_than_there_is_and_some_if_there_is_some(history: list[tuple[int, int, bool]]) -> None:
    told, now_us = Told(CostBook()), 0
    for free_bytes, interval_us, may_change in history:
        now_us += interval_us
        (state,) = told.states([replace(STATE, free_bytes=free_bytes)], now_us, may_change)
        assert state.free_bytes <= free_bytes and bool(state.free_bytes) == bool(free_bytes)


def test_memory_that_comes_and_goes_with_a_talk_is_told_by_its_least_and_by_more_when_there_is_more_for_good() -> None:
    told = Told(CostBook())
    free_mib = [(800, 740, 680)[number % 3] for number in range(60)] + [800] * 40
    tellings = []
    for second, each in enumerate(free_mib):
        (state,) = told.states([replace(STATE, free_bytes=each * MIB)], second * 1_000_000)
        tellings.append(state.free_bytes // MIB)
    assert tellings[:3] == [800, 700, 600] and set(tellings[2:60]) == {600}
    assert tellings[-1] == 800


def test_queues_and_sessions_are_told_as_they_are_and_a_speed_when_it_is_known() -> None:
    told = Told(CostBook())
    told.states([replace(STATE, prefill_tok_s=0)], 0)
    now = replace(STATE, queue_us=77, prefill_tok_s=900)
    assert told.states([now], 1, may_change=False) == (now,)
    faster = replace(now, prefill_tok_s=1_000)
    assert told.states([faster], 2) == (now,)
    assert told.states([replace(now, prefill_tok_s=1_200)], 3, may_change=False) == (now,)
    assert told.states([replace(now, prefill_tok_s=1_200)], 4) == (replace(now, prefill_tok_s=1_200),)


TRIP_MDEGC = 80_000
MDEGC = st.integers(-60_000, 120_000)


@given(st.lists(st.tuples(MDEGC, st.none() | st.tuples(MDEGC, MDEGC, MDEGC)), max_size=40), st.none() | st.just(TRIP_MDEGC))
def test_a_told_temperature_is_never_under_the_measured_one_and_over_it_by_less_than_its_band(
    history: list[tuple[int, tuple[int, int, int] | None]], trip_mdegc: int | None
) -> None:
    told = Told(CostBook())
    for now_mdegc, forecast in history:
        heat_mdegc, told_forecast = told.heat(now_mdegc, forecast, trip_mdegc)
        assert heat_mdegc is not None and (told_forecast is None) == (forecast is None)
        for said, true in zip((heat_mdegc, *(told_forecast or ())), (now_mdegc, *(forecast or ())), strict=True):
            is_near = trip_mdegc is not None and trip_mdegc - true < COOL_STEP_MDEGC
            assert said == true if is_near else 0 <= said - true < HEAT_BAND_MDEGC


@given(st.integers(-20_000, 70_000), st.lists(st.integers(0, 2 * HEAT_STEP_MDEGC), min_size=30, max_size=90))
def test_a_temperature_that_trembles_within_two_steps_soon_stays_as_it_was_told(least_mdegc: int, trembling: list[int]) -> None:
    told = Told(CostBook())
    said = [told.heat(least_mdegc + each, None, TRIP_MDEGC)[0] for each in trembling]
    assert sum(one != other for one, other in pairwise(said)) <= 2


def test_a_board_is_seen_within_its_guard_band_when_it_is_and_not_before() -> None:
    told, guard_mdegc = Told(CostBook()), 2_000
    for now_mdegc in [*range(60_000, 79_900, 130), *range(79_900, 60_000, -130)]:
        heat_mdegc, _ = told.heat(now_mdegc, None, TRIP_MDEGC)
        assert heat_mdegc is not None
        assert (TRIP_MDEGC - heat_mdegc < guard_mdegc) == (TRIP_MDEGC - now_mdegc < guard_mdegc)


def test_a_board_without_a_sensor_says_so_and_a_forecast_that_is_gone_is_not_told() -> None:
    told = Told(CostBook())
    assert told.heat(40_100, (40_200, 40_600, 41_000), None) == (40_500, (40_500, 41_000, 41_000))
    assert told.heat(40_100, None, None) == (40_500, None)
    assert told.heat(None, None, TRIP_MDEGC) == (None, None)
    assert told.heat(39_600, None, TRIP_MDEGC) == (40_000, None), "what was told before is forgotten"


def test_a_wave_begins_with_the_first_change_and_the_next_a_period_later() -> None:
    waves = Waves()
    assert waves.are_open(0)
    waves.moved(5)
    assert waves.are_open(4 + WAVE_US) and not waves.are_open(5 + WAVE_US)
    waves.moved(5 + WAVE_US)
    assert not waves.are_open(4 + WAVE_PERIOD_US), "what was urgent does not put the next wave off"
    assert waves.are_open(5 + WAVE_PERIOD_US)
    waves.moved(6 + WAVE_PERIOD_US)
    assert not waves.are_open(6 + WAVE_PERIOD_US + WAVE_US)


@pytest.mark.parametrize("seconds", range(1, 60, 7))
def test_who_changes_all_the_time_keeps_nobody_from_speaking(seconds: int) -> None:
    waves, opened = Waves(), 0
    for tick in range(60):
        now_us = seconds + tick * 1_000_000
        opened += waves.are_open(now_us)
        waves.moved(now_us)
    assert opened >= 12
