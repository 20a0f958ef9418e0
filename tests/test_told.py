"""What a board tells of its costs and memory: seldom anew, never better than it is, and together with the others."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.core.kv import KvState
from edge_agent.core.values import MAX_SHAPES, ModelOffer
from edge_agent.node.told import WAVE_PERIOD_US, WAVE_US, Told, Waves
from edge_agent.placement.cost import CostBook

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
