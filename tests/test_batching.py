"""One step's rows: everybody who decodes gets one, prompts take turns, nothing crosses a block, and time stays in its bound."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.language.batching import SLOWDOWN, TILE_TOKENS, CostCurve, Need, Share, plan
from edge_agent.language.speculation import MAX_GUESSES

FLAT_TO_FOUR = CostCurve(((1, 4100), (4, 5000), (8, 6800), (32, 14_000), (64, 23_000)))
FIRST_TILE = TILE_TOKENS + 4
STEEP = CostCurve(((1, 1000), (2, 2000), (64, 64_000)))


@st.composite
def curves(draw: st.DrawFn) -> CostCurve:
    rows = sorted(draw(st.sets(st.integers(1, 80), min_size=1, max_size=6)))
    costs = sorted(draw(st.lists(st.integers(1, 10**6), min_size=len(rows), max_size=len(rows))))
    return CostCurve(tuple(zip(rows, costs, strict=True)))


@st.composite
def turns(draw: st.DrawFn) -> list[Need]:
    slots = draw(st.lists(st.integers(0, 63), unique=True, min_size=1, max_size=12))
    return [
        Need(
            slot, draw(st.integers(1, 68)), prompt := draw(st.just(0) | st.integers(1, 500)),
            0 if prompt else draw(st.integers(0, 9)), draw(st.integers(0, 1000)),
        )
        for slot in slots
    ]  # fmt: skip


@given(turns(), curves(), st.integers(-1, 63), st.integers(FIRST_TILE, 68))
def test_laws_of_a_step(needs: list[Need], curve: CostCurve, last: int, most_chunk: int) -> None:
    shares = plan(needs, curve, last, most_chunk)
    by_slot = {each.slot: each for each in needs}
    decoding = [each for each in shares if not each.prompt]
    pieces = [each for each in shares if each.prompt]
    assert {each.slot for each in decoding} == {each.slot for each in needs if not each.prompt}, "who decodes gets a row"
    assert len(pieces) == any(each.prompt for each in needs), "one prompt gets on in each step"
    for share in shares:
        need = by_slot[share.slot]
        assert 1 <= share.rows <= need.room, "no piece crosses the end of a block"
        assert share.rows <= (min(need.prompt, most_chunk) if share.prompt else 1 + min(need.guesses, MAX_GUESSES))
    rows = sum(each.rows for each in decoding)
    for piece in pieces:
        need = by_slot[piece.slot]
        whole = min(need.prompt, need.room)
        assert piece.rows == need.prompt or (need.room - piece.rows) % TILE_TOKENS == 0, "cut where any company may cut"
        if not decoding:
            assert piece.rows == whole or piece.rows > most_chunk - TILE_TOKENS >= 0, "alone, a prompt gets all that fits"
        elif piece.rows > (FIRST_TILE if need.room > 64 else TILE_TOKENS):
            assert curve.us(rows + piece.rows) <= SLOWDOWN * curve.us(rows), "the step's time stays in its bound"


@given(turns(), curves())
def test_guesses_never_promise_fewer_tokens_a_microsecond_than_none(needs: list[Need], curve: CostCurve) -> None:
    decoding = [Need(each.slot, each.room, 0, each.guesses, each.chance) for each in needs]
    rows = {each.slot: each.rows for each in plan(decoding, curve)}
    expected = 0.0
    for each in decoding:
        expected += sum((each.chance / 1000) ** n for n in range(rows[each.slot]))
    count = sum(rows.values())
    if count > len(decoding):
        assert expected / curve.us(count) > len(decoding) / curve.us(len(decoding))


@given(st.lists(st.integers(1, 400), min_size=1, max_size=8), st.integers(0, 3), curves())
def test_no_prompt_starves_and_all_come_to_their_end(prompts: list[int], decoding: int, curve: CostCurve) -> None:
    left = dict(enumerate(prompts))
    last, waited = -1, dict.fromkeys(left, 0)
    for _ in range(sum(-(-each // TILE_TOKENS) + 1 for each in prompts)):
        needs = [Need(slot, (ids - prompts[slot]) % 64 or 64, ids) for slot, ids in left.items() if ids]
        needs += [Need(32 + each, 64) for each in range(decoding)]
        for share in plan(needs, curve, last):
            if share.prompt:
                left[share.slot] -= share.rows
                last = share.slot
                waited = {slot: waited[slot] + 1 for slot in waited} | {share.slot: 0}
        assert all(waited[slot] < len(prompts) for slot, ids in left.items() if ids), "prompts take turns"
    assert not any(left.values())


def test_a_long_prompt_beside_a_speaker_is_cut_small_and_alone_it_is_not() -> None:
    prompt = Need(1, 64, 3000)
    assert plan([prompt], FLAT_TO_FOUR) == (Share(1, 64, True),)
    assert plan([Need(1, 68, 3000)], FLAT_TO_FOUR, most_chunk=68) == (Share(1, 68, True),)
    (speaker, piece) = plan([Need(0, 64), prompt], FLAT_TO_FOUR)
    assert speaker == Share(0, 1, False)
    assert piece.rows == 2 * TILE_TOKENS
    assert plan([Need(0, 64), Need(1, 68, 3000)], FLAT_TO_FOUR)[1].rows == 4 + 2 * TILE_TOKENS
    assert plan([Need(0, 64), Need(1, 68, 3000)], STEEP)[1].rows == FIRST_TILE
    assert plan([Need(0, 64), Need(1, 5, 3000)], FLAT_TO_FOUR)[1].rows == 5
    assert plan([Need(0, 64), Need(1, 64, 9)], FLAT_TO_FOUR)[1].rows == 9


@pytest.mark.parametrize(("chance", "guesses"), [(0, 0), (100, 0), (500, 3), (1000, 7)])
def test_one_speaker_guesses_as_far_as_it_pays(chance: int, guesses: int) -> None:
    assert plan([Need(0, 64, 0, 7, chance)], FLAT_TO_FOUR) == (Share(0, 1 + guesses, False),)


def test_where_rows_cost_what_they_weigh_only_near_certainty_is_guessed() -> None:
    assert plan([Need(0, 64, 0, 7, 900)], STEEP) == (Share(0, 1, False),)


def test_guesses_go_to_whom_they_are_likeliest_for() -> None:
    rows = {each.slot: each.rows for each in plan([Need(0, 64, 0, 3, 900), Need(1, 64, 0, 3, 200)], FLAT_TO_FOUR)}
    assert rows[0] > 1 == rows[1]


def test_guesses_stop_at_the_end_of_a_block() -> None:
    assert plan([Need(0, 2, 0, 7, 1000)], FLAT_TO_FOUR) == (Share(0, 2, False),)


def test_a_cost_curve_is_straight_between_its_points_and_bounds_what_noise_made_too_dear() -> None:
    assert [FLAT_TO_FOUR.us(rows) for rows in (0, 1, 2, 4, 6, 64, 128)] == [0, 4100, 4400, 5000, 5900, 23_000, 41_000]
    assert CostCurve.measured([(1, 9), (1, 5), (2, 4), (4, 8)]).points == ((1, 4), (2, 4), (4, 8))
    assert CostCurve(((4, 1000),)).us(2) == 1000
    assert CostCurve(((4, 1000),)).us(8) == 2000
    for points in ((), ((2, 5), (1, 6)), ((1, 6), (2, 5)), ((0, 5),), ((1, 0),)):
        with pytest.raises((ValueError, Exception), match=r"ascends|curve"):
            CostCurve(points)


@given(curves(), st.integers(1, 10**6), st.integers(0, 100))
def test_the_most_rows_within_a_limit_are_the_most(curve: CostCurve, limit_us: int, most: int) -> None:
    rows = curve.most_rows(limit_us, most)
    assert curve.us(rows) <= limit_us or rows == 0
    assert rows == most or curve.us(rows + 1) > limit_us
