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

ENTRY_PARTS = 8
"""A crowd enters in so many parts."""
MAX_LOOKS = 2_000
"""At pairs of players that may exchange; where memory does not bind, there are none."""
FULL = 1 << 200
"""What an option costs whose pool has no room: more than any cost there is."""


@dataclass(frozen=True, slots=True)
class Crowd:
    """``count`` players with the same options: on ``boards[o]``, for ``private[o]``, with ``work[o]``; the first wins a tie.

    Where memory counts, an option also holds ``room[o]`` of the pool ``pools[o]``, and one of them holds none, so that there is
    always a place.  Without options the players are shed: they take part in nothing.  Raises ``ValueError`` for columns that do
    not fit together.
    """

    count: int
    boards: tuple[int, ...]
    private: tuple[int, ...]
    work: tuple[int, ...]
    pools: tuple[int, ...] = ()
    room: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        lengths = [len(self.boards), len(self.private), len(self.work)] + [len(self.pools), len(self.room)] * bool(self.room)
        if len(dict.fromkeys(lengths)) > 1:
            raise ValueError(f"columns of {lengths} options")
        if self.count < 1 or min(self.private, default=0) < 0 or min(self.work, default=1) < 1:
            raise ValueError("a crowd has players, private costs of at least 0 and work of at least 1")
        if self.room and min(self.room) != 0:
            raise ValueError(f"room {self.room}: one option must need none, and none less")


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


def settle(
    crowds: Sequence[Crowd], boards: int, factor: int, gain: int, pools: Sequence[int] = (), *, together: bool = True
) -> Equilibrium:
    """Where the game of ``crowds`` over ``boards`` boards rests; ``pools`` is the memory that may be held of each pool.

    Without ``together`` it is left at the equilibrium of what each pays.  Raises ``ValueError`` for a gain under 1 or a factor
    under 0.
    """
    if gain < 1 or factor < 0:
        raise ValueError(f"a gain of {gain} or a factor of {factor}: the dynamics need 1 or more, and 0 or more")
    play = _Play(crowds, boards, factor, pools)
    play.enter()
    floor = sum(seat.crowd.count * min(seat.alone) for seat in play.seats if seat.alone)
    selfish = play.descend(1, gain, play.potential, 2 * floor, 2 * gain)
    social = play.save(gain, floor) if together else play.rest()
    return Equilibrium(tuple(tuple(seat.taken) for seat in play.seats), tuple(play.loads), selfish, social)


class _Shape:
    """What crowds on the same boards have in common: how to pick the loads of their options, and which share a board."""

    def __init__(self, boards: tuple[int, ...]) -> None:
        at: dict[int, list[int]] = {}
        for option, board in enumerate(boards):
            at.setdefault(board, []).append(option)
        self.beside = [[other for other in at[board] if other != option] for option, board in enumerate(boards)]
        self.crowded = any(self.beside)
        self.loads_of: Callable[[list[int]], Sequence[int]]
        if len(boards) > 1:
            self.loads_of = itemgetter(*boards)
        else:
            self.loads_of = lambda loads: [loads[board] for board in boards]


class _Seat:
    """A crowd in play. ``alone``: what an option costs on an empty board; ``used``: the options that somebody has taken.

    ``slopes``: what a unit of work on the board adds to it in the present stage; ``own``: what a player's own work would add.
    """

    def __init__(self, crowd: Crowd, factor: int, shape: _Shape) -> None:
        self.crowd, self.shape = crowd, shape
        self.weigh(factor)
        self.alone = tuple(map(add, crowd.private, self.own))
        self.taken = [0] * len(crowd.boards)
        self.used: tuple[int, ...] = ()

    def weigh(self, factor: int) -> None:
        self.slopes = tuple(map(mul, self.crowd.work, repeat(factor)))
        self.own = tuple(map(mul, self.slopes, self.crowd.work))

    def entering(self, loads: list[int]) -> list[int]:
        """What one more player would pay, by option, wherever there is room."""
        return list(map(add, self.alone, map(mul, self.slopes, self.shape.loads_of(loads))))

    def least_beside(self, option: int, costs: list[int], least: int) -> int:
        """The least that a player on ``option`` could pay: to other options of its board it takes its own work along."""
        work = self.crowd.work[option]
        for other in self.shape.beside[option]:
            least = min(least, costs[other] - self.slopes[other] * work)
        return least


class _Play:
    def __init__(self, crowds: Sequence[Crowd], boards: int, factor: int, pools: Sequence[int]) -> None:
        shapes = {crowd.boards: _Shape(crowd.boards) for crowd in {crowd.boards: crowd for crowd in crowds}.values()}
        self.seats = [_Seat(crowd, factor, shapes[crowd.boards]) for crowd in crowds]
        self.loads = [0] * boards
        self._free = list(pools)
        self._looks = MAX_LOOKS
        self._factor = factor

    def enter(self) -> None:
        """A part of every crowd, in order, takes what is best for its first player; then the next part of every crowd."""
        for part in range(ENTRY_PARTS):
            for seat in self.seats:
                left = (seat.crowd.count + ENTRY_PARTS - 1 - part) // ENTRY_PARTS if seat.alone else 0
                while left:
                    costs = self._entering(seat)
                    option = costs.index(min(costs))
                    players = min(left, self._fit(seat, option)) if seat.crowd.room else left
                    self._take(seat, option, players)
                    left -= players

    def descend(self, weight: int, gain: int, level: Callable[[], int], floor: int, drop: int) -> Descent:
        """Move players while one gains, with ``weight`` times the slopes: 1, what it pays itself; 2, what all pay for it.

        Each move lowers ``level`` by at least ``drop``, and ``level`` is never under ``floor``.  A crowd is not asked again until
        somebody has moved since it was.
        """
        start, moves, sweeps = level(), 0, 0
        seats = [seat for seat in self.seats if seat.alone]
        for seat in seats:
            if weight > 1:
                seat.weigh(weight * self._factor)
            seat.used = tuple([option for option, players in enumerate(seat.taken) if players])
        asked = [-1] * len(seats)
        while asked and min(asked) < moves:
            sweeps += 1
            for index, seat in enumerate(seats):
                if asked[index] < moves:
                    asked[index] = moves
                    moves += self._respond(seat, weight, gain)
        return Descent(start, level(), moves, (start - floor) // drop, sweeps)

    def rest(self) -> Descent:
        """The social stage without a move."""
        cost = self.social_cost()
        return Descent(cost, cost, 0, 0, 0)

    def save(self, gain: int, floor: int) -> Descent:
        """Moves that all together gain by; where memory binds, also exchanges of two players, each counted as one move."""
        stage = self.descend(2, gain, self.social_cost, floor, gain)
        moves, sweeps, bound = stage.moves, stage.sweeps, stage.bound
        start, seats = stage.start, [seat for seat in self.seats if seat.crowd.room]
        while exchanged := sum(self._exchanges(seat, seats, gain) for seat in seats):
            stage = self.descend(2, gain, self.social_cost, floor, gain)
            moves, sweeps = moves + exchanged + stage.moves, sweeps + stage.sweeps
        return Descent(start, stage.end, moves, bound, sweeps)

    def _exchanges(self, seat: _Seat, seats: Sequence[_Seat], gain: int) -> int:
        """Let players of a crowd take the room of others who then go elsewhere, while that saves enough; how many did."""
        done = 0
        for option in seat.used:
            while seat.taken[option] and self._displace(seat, option, seats, gain):
                done += 1
        return done

    def _displace(self, seat: _Seat, option: int, seats: Sequence[_Seat], gain: int) -> bool:
        self._take(seat, option, -1)
        costs = seat.entering(self.loads)
        better = sorted((cost, other) for other, cost in enumerate(costs) if costs[option] - cost >= gain)
        for _, other in better:
            for rival in seats:
                for theirs in rival.used if rival is not seat else ():
                    if rival.crowd.room[theirs] and rival.crowd.pools[theirs] == seat.crowd.pools[other] and self._looks:
                        self._looks -= 1
                        if self._swap(seat, other, rival, theirs, costs[option] - gain):
                            return True
        self._take(seat, option, 1)
        return False

    def _swap(self, seat: _Seat, other: int, rival: _Seat, theirs: int, saved: int) -> bool:
        """Put a player on ``other`` in the place of one of ``rival``, which goes where it costs least, if less than is saved."""
        self._take(rival, theirs, -1)
        saved += rival.entering(self.loads)[theirs]
        if self._fit(seat, other):
            saved -= seat.entering(self.loads)[other]
            self._take(seat, other, 1)
            costs = self._entering(rival)
            if min(costs) <= saved:
                self._take(rival, costs.index(min(costs)), 1)
                for each in (seat, rival):
                    each.used = tuple([option for option, players in enumerate(each.taken) if players])
                return True
            self._take(seat, other, -1)
        self._take(rival, theirs, 1)
        return False

    def _respond(self, seat: _Seat, weight: int, gain: int) -> int:
        """Let the players on each option move, as many as gain; how many did.

        One look at the loads tells what each gains at most, for a full pool only makes it less.
        """
        costs, moves = seat.entering(self.loads), 0
        least = min(costs)
        crowded, own = seat.shape.crowded, seat.own
        for option in seat.used:
            best = seat.least_beside(option, costs, least) if crowded else least
            if costs[option] - own[option] - best >= gain:
                moves += self._respond_on(seat, option, weight, gain)
                costs = seat.entering(self.loads)
                least = min(costs)
        return moves

    def _respond_on(self, seat: _Seat, option: int, weight: int, gain: int) -> int:
        """Move players from ``option`` to the best response of one of them, as many as gain; how many did."""
        players, boards, work = seat.taken[option], seat.crowd.boards, seat.crowd.work
        self._take(seat, option, -1)
        costs = self._entering(seat)
        other = costs.index(min(costs))
        fit = self._fit(seat, other) if seat.crowd.room else players
        self._take(seat, option, 1)
        gained = costs[option] - costs[other]
        if gained < gain:
            return 0
        lost = weight * self._factor * _bend(boards[option] == boards[other], work[option], work[other])
        movers = min(players, fit, 1 + (gained - gain) // lost) if lost else min(players, fit)
        self._take(seat, option, -movers)
        self._take(seat, other, movers)
        seat.used = tuple([each for each, count in enumerate(seat.taken) if count])
        return movers

    def _entering(self, seat: _Seat) -> list[int]:
        """What one more player would pay, by option; ``FULL`` where there is no room."""
        costs = seat.entering(self.loads)
        for option, need in enumerate(seat.crowd.room):
            if need > self._free[seat.crowd.pools[option]]:
                costs[option] = FULL
        return costs

    def _fit(self, seat: _Seat, option: int) -> int:
        """How many more players of a crowd find room on an option."""
        need = seat.crowd.room[option]
        return self._free[seat.crowd.pools[option]] // need if need else seat.crowd.count

    def _take(self, seat: _Seat, option: int, players: int) -> None:
        """So many more players on an option; fewer, if negative."""
        seat.taken[option] += players
        self.loads[seat.crowd.boards[option]] += players * seat.crowd.work[option]
        if seat.crowd.room:
            self._free[seat.crowd.pools[option]] -= players * seat.crowd.room[option]

    def potential(self) -> int:
        """2 Phi."""
        own: int = sum(sum(map(mul, seat.taken, map(mul, seat.crowd.work, seat.crowd.work))) for seat in self.seats)
        return self.social_cost() + self._private() + self._factor * own

    def social_cost(self) -> int:
        squares: int = sum(map(mul, self.loads, self.loads))
        return self._private() + self._factor * squares

    def _private(self) -> int:
        return sum(sum(map(mul, seat.taken, seat.crowd.private)) for seat in self.seats)


def _bend(same_board: bool, left: int, taken: int) -> int:
    """By how much less each next player of a crowd gains that makes the move of the one before it, for a factor of 1."""
    return (left - taken) * (left - taken) if same_board else left * left + taken * taken
