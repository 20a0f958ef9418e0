"""The placement game: who runs on which board, settled in a finite number of moves, in integers alone.

Owns the dynamics; ``docs/convergence.md`` has the theorems.  A player that takes an option pays ``private + factor * work * L``,
where ``L`` is all the work on the option's board, its own included.  That is a weighted congestion game with affine costs on
unrelated machines, with the exact potential ``Phi = sum private + factor/2 * (sum L^2 + sum work^2)`` (Fotakis, Kontogiannis,
Spirakis 2005).  The social cost is ``SC = sum private + factor * sum L^2``.

Rules: no floats, no hash, no set, no clock.  Three stages, each in the fixed order of the players: everyone enters by best
response; then players move while one *pays* less by at least ``gain``, which lowers Phi by as much; then while *all together*
pay less by at least ``gain``, which lowers SC.  Ties go to the option that stands first.  Players that are alike are one
``Crowd``: they move together as far as each single move still gains, and every single move is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import repeat
from operator import add, itemgetter, mul

ENTRY_BLOCKS = 8
"""A crowd enters in so many blocks, at most."""


@dataclass(frozen=True, slots=True)
class Crowd:
    """``count`` players with the same options: on ``boards[o]``, for ``private[o]``, with ``work[o]``; the first wins a tie.

    Without options they are shed: they take part in nothing.  Raises ``ValueError`` for columns that do not fit together.
    """

    count: int
    boards: tuple[int, ...]
    private: tuple[int, ...]
    work: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.boards) == len(self.private) == len(self.work):
            raise ValueError(f"columns of {len(self.boards)}, {len(self.private)} and {len(self.work)} options")
        if self.count < 1 or min(self.private, default=0) < 0 or min(self.work, default=1) < 1:
            raise ValueError("a crowd has players, private costs of at least 0 and work of at least 1")


@dataclass(frozen=True, slots=True)
class Descent:
    """One stage: what it lowered, from where to where, and in how many moves of how many there could be at most."""

    start: int
    end: int
    moves: int
    bound: int
    sweeps: int


@dataclass(frozen=True, slots=True)
class Equilibrium:
    """``assignment``: of each crowd, how many took each option. ``loads``: work by board.

    ``selfish`` lowers the doubled potential ``2 Phi`` (so it stays whole), ``social`` the social cost.
    """

    assignment: tuple[tuple[int, ...], ...]
    loads: tuple[int, ...]
    selfish: Descent
    social: Descent

    @property
    def moves(self) -> int:
        return self.selfish.moves + self.social.moves

    @property
    def bound(self) -> int:
        return self.selfish.bound + self.social.bound


def settle(crowds: Sequence[Crowd], boards: int, factor: int, gain: int) -> Equilibrium:
    """Where the game of ``crowds`` over ``boards`` boards rests. Raises ``ValueError`` for a gain under 1 or a factor under 0."""
    if gain < 1 or factor < 0:
        raise ValueError(f"a gain of {gain} or a factor of {factor}: the dynamics need 1 or more, and 0 or more")
    play = _Play(crowds, boards, factor)
    play.enter()
    floor = sum(crowd.count * min(seat.alone) for crowd, seat in zip(crowds, play.seats, strict=True) if seat.alone)
    selfish = play.descend(1, gain, play.potential, 2 * floor, 2 * gain)
    social = play.descend(2, gain, play.social_cost, floor, gain)
    return Equilibrium(tuple(tuple(seat.taken) for seat in play.seats), tuple(play.loads), selfish, social)


class _Seat:
    """A crowd in play. ``alone``: what an option costs on an empty board; ``slopes``: what a unit of work there adds to it."""

    def __init__(self, crowd: Crowd, factor: int) -> None:
        self.crowd = crowd
        self.slopes = tuple(map(mul, crowd.work, repeat(factor)))
        self.alone = tuple(map(add, crowd.private, map(mul, self.slopes, crowd.work)))
        self.taken = [0] * len(crowd.boards)
        self.loads_of: Callable[[list[int]], Sequence[int]] = _picker(crowd.boards)


class _Play:
    def __init__(self, crowds: Sequence[Crowd], boards: int, factor: int) -> None:
        self.seats = [_Seat(crowd, factor) for crowd in crowds]
        self.loads = [0] * boards
        self._factor = factor

    def enter(self) -> None:
        """Every player, in order, takes what is best for it beside those who are there already."""
        for seat in self.seats:
            left = seat.crowd.count if seat.alone else 0
            block = -(-left // ENTRY_BLOCKS)
            while left:
                players = min(block, left)
                costs = list(map(add, seat.alone, map(mul, seat.slopes, seat.loads_of(self.loads))))
                option = costs.index(min(costs))
                seat.taken[option] += players
                self.loads[seat.crowd.boards[option]] += players * seat.crowd.work[option]
                left -= players

    def descend(self, weight: int, gain: int, level: Callable[[], int], floor: int, drop: int) -> Descent:
        """Move players while one gains, with ``weight`` times the slopes: 1, what it pays itself; 2, what all pay for it.

        Each move lowers ``level`` by at least ``drop``, and ``level`` is never under ``floor``.
        """
        start, moves, sweeps, settled = level(), 0, 0, False
        while not settled:
            moved = sum(self._best_responses(seat, weight, gain) for seat in self.seats)
            moves, sweeps, settled = moves + moved, sweeps + 1, not moved
        return Descent(start, level(), moves, (start - floor) // drop, sweeps)

    def _best_responses(self, seat: _Seat, weight: int, gain: int) -> int:
        """Let the players on each option move, as many as gain; how many did."""
        loads, boards, work = self.loads, seat.crowd.boards, seat.crowd.work
        slopes = seat.slopes if weight == 1 else tuple(map(mul, seat.slopes, repeat(weight)))
        moves = 0
        for option, players in enumerate(seat.taken):
            if not players:
                continue
            loads[boards[option]] -= work[option]
            costs = list(map(add, seat.alone, map(mul, slopes, seat.loads_of(loads))))
            loads[boards[option]] += work[option]
            least = min(costs)
            gained = costs[option] - least
            if gained >= gain:
                other = costs.index(least)
                lost = weight * self._factor * _bend(boards[option] == boards[other], work[option], work[other])
                moves += self._move(seat, option, other, min(players, 1 + (gained - gain) // lost) if lost else players)
        return moves

    def _move(self, seat: _Seat, option: int, other: int, players: int) -> int:
        boards, work = seat.crowd.boards, seat.crowd.work
        seat.taken[option] -= players
        seat.taken[other] += players
        self.loads[boards[option]] -= players * work[option]
        self.loads[boards[other]] += players * work[other]
        return players

    def potential(self) -> int:
        """2 Phi."""
        own = sum(sum(map(mul, seat.taken, map(mul, seat.slopes, seat.crowd.work))) for seat in self.seats)
        return self.social_cost() + self._private() + own

    def social_cost(self) -> int:
        squares: int = sum(map(mul, self.loads, self.loads))
        return self._private() + self._factor * squares

    def _private(self) -> int:
        return sum(sum(map(mul, seat.taken, seat.crowd.private)) for seat in self.seats)


def _bend(same_board: bool, left: int, taken: int) -> int:
    """By how much less each next player of a crowd gains that makes the move of the one before it, for a factor of 1."""
    return (left - taken) * (left - taken) if same_board else left * left + taken * taken


def _picker(boards: tuple[int, ...]) -> Callable[[list[int]], Sequence[int]]:
    """The loads of these boards out of those of all: ``itemgetter``, which gives no tuple for a single one."""
    if len(boards) > 1:
        return itemgetter(*boards)
    return lambda loads: [loads[board] for board in boards]
