"""The placement game against its definition, computed the slow way: one player at a time, by hand."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.placement.game import Crowd, Equilibrium, settle

FACTOR = st.integers(0, 20)


@dataclass
class Player:
    """A player with the option that it took."""

    boards: tuple[int, ...]
    private: tuple[int, ...]
    work: tuple[int, ...]
    option: int


@st.composite
def crowds(draw: st.DrawFn, most: int = 6, boards: int = 4) -> list[Crowd]:
    made = []
    for _ in range(draw(st.integers(1, most))):
        options = draw(
            st.lists(st.tuples(st.integers(0, boards - 1), st.integers(0, 500), st.integers(1, 30)), min_size=1, max_size=6)
        )
        at, private, work = zip(*options, strict=True)
        made.append(Crowd(draw(st.integers(1, 5)), at, private, work))
    return made


def players_of(given_crowds: list[Crowd], settled: Equilibrium) -> list[Player]:
    return [
        Player(crowd.boards, crowd.private, crowd.work, option)
        for crowd, taken in zip(given_crowds, settled.assignment, strict=True)
        for option, count in enumerate(taken)
        for _ in range(count)
    ]


def loads_of(players: list[Player], boards: int = 4) -> list[int]:
    return [sum(p.work[p.option] for p in players if p.boards[p.option] == board) for board in range(boards)]


def paid(player: Player, players: list[Player], factor: int) -> int:
    return player.private[player.option] + factor * player.work[player.option] * loads_of(players)[player.boards[player.option]]


def social_cost(players: list[Player], factor: int) -> int:
    return sum(paid(player, players, factor) for player in players)


def doubled_potential(players: list[Player], factor: int) -> int:
    private = sum(p.private[p.option] for p in players)
    return 2 * private + factor * (sum(load**2 for load in loads_of(players)) + sum(p.work[p.option] ** 2 for p in players))


@given(crowds(), FACTOR, st.randoms(use_true_random=False))
def test_what_a_player_gains_by_a_move_the_potential_loses_exactly(made: list[Crowd], factor: int, rng: Random) -> None:
    players = [Player(c.boards, c.private, c.work, rng.randrange(len(c.boards))) for c in made]
    mover = rng.choice(players)
    before, level = paid(mover, players, factor), doubled_potential(players, factor)
    mover.option = rng.randrange(len(mover.boards))
    assert 2 * (paid(mover, players, factor) - before) == doubled_potential(players, factor) - level


@given(crowds(), FACTOR, st.integers(1, 200))
def test_at_the_equilibrium_nobody_gains_as_much_as_the_threshold(made: list[Crowd], factor: int, gain: int) -> None:
    players = players_of(made, settle(made, 4, factor, gain, together=False))
    for player in players:
        here, taken = paid(player, players, factor), player.option
        for option in range(len(player.boards)):
            player.option = option
            assert here - paid(player, players, factor) < gain
        player.option = taken


@given(crowds(), FACTOR, st.integers(1, 200))
def test_where_it_rests_no_single_move_saves_all_together_as_much_as_the_threshold(
    made: list[Crowd], factor: int, gain: int
) -> None:
    settled = settle(made, 4, factor, gain)
    players = players_of(made, settled)
    here = social_cost(players, factor)
    assert here == settled.social.end <= settle(made, 4, factor, gain, together=False).social.end
    for player in players:
        taken = player.option
        for option in range(len(player.boards)):
            player.option = option
            assert here - social_cost(players, factor) < gain
        player.option = taken


@given(crowds(), FACTOR, st.integers(1, 200))
def test_the_figures_that_are_told_are_those_of_the_definition(made: list[Crowd], factor: int, gain: int) -> None:
    settled = settle(made, 4, factor, gain, together=False)
    players = players_of(made, settled)
    assert [sum(taken) for taken in settled.assignment] == [crowd.count for crowd in made]
    assert list(settled.loads) == loads_of(players)
    assert settled.selfish.end == doubled_potential(players, factor)
    assert settled.social.start == settled.social.end == social_cost(players, factor)


@given(crowds(), FACTOR, st.integers(1, 200))
def test_every_move_lowers_its_level_by_the_threshold_so_moves_stay_within_the_bound(
    made: list[Crowd], factor: int, gain: int
) -> None:
    settled = settle(made, 4, factor, gain)
    assert settled.selfish.start - settled.selfish.end >= 2 * gain * settled.selfish.moves
    assert settled.social.start - settled.social.end >= gain * settled.social.moves
    assert settled.selfish.moves <= settled.selfish.bound and settled.social.moves <= settled.social.bound
    assert (settled.moves, settled.bound) == (
        settled.selfish.moves + settled.social.moves,
        settled.selfish.bound + settled.social.bound,
    )


@given(crowds(most=3), FACTOR)
def test_a_lower_bound_on_the_levels_is_what_everyone_pays_alone_on_a_board(made: list[Crowd], factor: int) -> None:
    settled = settle(made, 4, factor, 1)
    alone = sum(c.count * min(p + factor * w * w for p, w in zip(c.private, c.work, strict=True)) for c in made)
    assert settled.selfish.bound == (settled.selfish.start - 2 * alone) // 2
    assert settled.social.bound == settled.social.start - alone
    assert settled.selfish.end >= 2 * alone and settled.social.end >= alone


def test_without_congestion_everyone_takes_what_is_cheapest_and_the_first_of_equals() -> None:
    settled = settle([Crowd(5, (0, 1, 2), (7, 3, 3), (1, 1, 1)), Crowd(2, (2, 0), (4, 4), (9, 9))], 3, 0, 1)
    assert settled.assignment == ((0, 5, 0), (2, 0)) and settled.loads == (0, 5, 18)


def test_equal_players_spread_evenly_over_equal_boards() -> None:
    settled = settle([Crowd(9, (0, 1, 2), (0, 0, 0), (4, 4, 4))], 3, 1, 1)
    assert settled.loads == (12, 12, 12)


def test_who_moves_to_another_model_of_its_board_leaves_its_own_work_behind() -> None:
    """The light model costs 10 more in private; alone on the board, congestion costs the heavy one 25, the light one 1."""
    assert settle([Crowd(1, (0, 0), (0, 10), (5, 1))], 1, 1, 1).assignment == ((0, 1),)
    crowded = [Crowd(1, (0,), (0,), (100,)), Crowd(1, (0, 0), (400, 0), (1, 5))]
    assert settle(crowded, 1, 1, 1).assignment[1] == (1, 0), "400 + 101 are less than 5 * 105"


def test_players_without_an_option_are_shed_and_disturb_nobody() -> None:
    settled = settle([Crowd(3, (), (), ()), Crowd(2, (0, 1), (1, 1), (2, 2))], 2, 3, 1)
    assert settled.assignment == ((), (1, 1)) and settled.loads == (2, 2)
    assert settle([], 0, 1, 1).bound == settle([Crowd(1, (), (), ())], 0, 1, 1).moves == 0


@pytest.mark.parametrize(("factor", "gain"), [(1, 0), (1, -5), (-1, 1)])
def test_a_threshold_that_would_not_stop_the_moves_is_a_bug(factor: int, gain: int) -> None:
    with pytest.raises(ValueError, match="the dynamics need"):
        settle([Crowd(1, (0,), (0,), (1,))], 1, factor, gain)


@pytest.mark.parametrize("columns", [((0,), (0, 1), (1,)), ((0,), (-1,), (1,)), ((0,), (0,), (0,))])
def test_a_crowd_whose_columns_do_not_fit_or_go_below_nothing_is_a_bug(columns: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match=r"columns|a crowd has"):
        Crowd(1, *columns)
