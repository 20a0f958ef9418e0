"""The agreed table: made from what all boards say of themselves, the same on every board.

Owns ``TableMaker``; the table itself is a value of ``agreed``.  Rules: a table is a pure integer function of the set of
``BoardFacts`` and of the rules; what the maker keeps from one table to the next only saves time; the filters and the costs are
those of the live choice (``options``), over a view built from the facts; whatever a board claims is bounded here, so that a lie
saturates and never overflows.

The players of the game are *units* of demand: the requests of one class that come in at one board within the policy's horizon,
in at most ``MAX_UNITS_EACH`` equal parts, at most ``MAX_UNITS`` in the whole fleet.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import compress, repeat
from operator import floordiv, mul
from typing import NamedTuple

from edge_agent.core.config import PolicySection
from edge_agent.core.values import TrustTier
from edge_agent.core.wanted import Demand, Wanted
from edge_agent.placement.agreed import EMPTY, MAX_ENTRIES, MAX_FIGURE, MAX_OPTIONS, Booking, Entry, Ranked, Table
from edge_agent.placement.facts import BoardFacts, by_board, facts_digest, rules_digest
from edge_agent.placement.game import Crowd, Equilibrium, settle
from edge_agent.placement.options import BoardView, Rules, kv_plan, weigh, why_not_board, why_not_model

__all__ = ["EMPTY", "MAX_ENTRIES", "Booking", "Entry", "Ranked", "Table", "TableMaker"]

MAX_UNITS = MAX_ENTRIES
"""Of all demands. Demands past these, the least first, have no entry: the live choice places them alone."""
MAX_UNITS_EACH = 32
MAX_OPTION_US = 2**40
"""What an option may cost, or keep a board busy, for one request: 12 days."""
MAX_UNIT_MREQ = 2**30
KEPT_CLASSES = 64
"""A maker keeps the options of so many classes, and twice as many as are wanted."""


_Option = tuple[str, int, int, int, int, bool]
"""Model, index of the board, what one request costs there, keeps busy, and holds of KV memory (byte-µs), and if it is played:
not, where another model of the board costs and keeps busy no more."""


class _Group(NamedTuple):
    """The demand for one class at one ingress: ``count`` units of ``unit_mreq``; columns of options by (model, board)."""

    ingress: str
    demand: Demand
    units: int
    unit_mreq: int
    models: tuple[str, ...]
    boards: tuple[int, ...]
    cost_us: tuple[int, ...]
    work_us: tuple[int, ...]
    hold_byte_us: tuple[int, ...]
    plays: tuple[bool, ...]

    def played(self, column: tuple[int, ...]) -> tuple[int, ...]:
        return column if all(self.plays) else tuple(compress(column, self.plays))

    def told(self, taken: Iterable[int]) -> list[int]:
        """Units by option, given those by played option and, perhaps, those that are shed."""
        each = iter(taken)
        return [next(each) if plays else 0 for plays in self.plays]


class TableMaker:
    """Makes tables by ``rules``; keeps the options of boards that say the same as before."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._rules_digest = rules_digest(rules)
        self._classes: dict[Wanted, int] = {}
        self._supply: dict[str, tuple[int, bytes]] = {}
        self._cells: dict[str, dict[int, list[_Option]]] = {}

    def make(self, facts: Iterable[BoardFacts]) -> Table:
        """The table of these facts. Raises ``ValueError`` for a board that is there twice."""
        ordered = by_board(facts)
        demands = _demands(ordered)
        self._forget(ordered, [each.wanted for _, each in demands])
        policy = self._rules.policy
        units = _units([demand.rate_mhz * policy.horizon_us // 10**6 or 1 for _, demand in demands])
        groups = [
            self._group(ingress, demand, count, unit_mreq, ordered)
            for (ingress, demand), (count, unit_mreq) in zip(demands, units, strict=True)
        ]
        crowds, pools = _crowds(groups, ordered, policy)
        played = settle(crowds, len(ordered) + 1, policy.congestion_factor, policy.gain_us * policy.horizon_us, pools)
        plan = _Plan(ordered, groups, played, policy)
        return Table(
            tuple(plan.entries()),
            tuple(plan.bookings()),
            facts_digest(ordered),
            self._rules_digest,
            min(played.moves, MAX_FIGURE),
            min(played.bound, MAX_FIGURE),
        )

    def _forget(self, facts: Sequence[BoardFacts], wanted: Sequence[Wanted]) -> None:
        """Keep only what holds still: the options of boards that say the same, of no more classes than are wanted and some."""
        classes = dict.fromkeys(wanted)
        if len(self._classes) > 2 * len(classes) + KEPT_CLASSES:
            self._classes, self._supply = {}, {}
        for each in classes:
            self._classes.setdefault(each, len(self._classes))
        supply = {each.board: (index, each.supply_bytes) for index, each in enumerate(facts)}
        self._cells = {board: self._cells[board] if self._supply.get(board) == said else {} for board, said in supply.items()}
        self._supply = supply

    def _group(self, ingress: str, demand: Demand, count: int, unit_mreq: int, facts: Sequence[BoardFacts]) -> _Group:
        number = 2 * self._classes[demand.wanted]
        options: list[_Option] = []
        for index, each in enumerate(facts):
            local = each.board == ingress
            cells, key = self._cells[each.board], number + local
            cell = cells.get(key)
            if cell is None:
                cell = cells[key] = _played(list(_options(demand.wanted, each, index, local, self._rules)))
            options += cell
        options.sort()
        columns = zip(*options, strict=True) if options else [()] * 6
        return _Group(ingress, demand, count, unit_mreq, *columns)


def _demands(facts: Sequence[BoardFacts]) -> list[tuple[str, Demand]]:
    """What comes in where, ascending by (board, class): of boards that are up and not contraindicated."""
    found = [
        (each.board, demand) for each in facts if each.up and each.trust > TrustTier.CONTRAINDICATED for demand in each.demand
    ]
    if len(found) > MAX_ENTRIES:
        found = sorted(sorted(found, key=lambda each: (-each[1].rate_mhz, each[0], each[1].wanted))[:MAX_ENTRIES])
    return found


def _units(wanted_mreq: Sequence[int]) -> list[tuple[int, int]]:
    """Into how many units each demand is split, and of how many thousandths of a request (rounded up) each of its units is."""
    asked = [min(max(1, -(-mreq // 1000)), MAX_UNITS_EACH) for mreq in wanted_mreq]
    spare, more = MAX_UNITS - len(asked), sum(asked) - len(asked)
    counts = [1 + (count - 1) * spare // more for count in asked] if more > spare else asked
    return [(count, min(-(-mreq // count), MAX_UNIT_MREQ)) for count, mreq in zip(counts, wanted_mreq, strict=True)]


def _options(wanted: Wanted, facts: BoardFacts, index: int, local: bool, rules: Rules) -> Iterator[_Option]:
    """What the live choice would see of this board for a request of the class, if the board were booked for nothing."""
    view = BoardView(
        facts.board, facts.offers, local=local, headroom_mdegc=facts.headroom_mdegc, barred="" if facts.up else "it is not up",
        kv={state.model: state for state in facts.kv}, trust=facts.trust,
    )  # fmt: skip
    if why_not_board(wanted, view, rules):
        return
    for offer in view.offers:
        plan = kv_plan(wanted, view, offer, (), rules.policy)
        if wanted.served_by(offer) and not why_not_model(wanted, offer, rules) and not plan.lacking:
            cost = weigh(wanted, view, offer, plan, wanted.deadline_us, rules.policy)
            busy_us = min(cost.busy_us, MAX_OPTION_US)
            work_us = max(1, min(cost.work_us, MAX_OPTION_US))
            yield offer.model, index, min(cost.total_us, MAX_OPTION_US), work_us, plan.room_bytes * busy_us, True


def _played(options: list[_Option]) -> list[_Option]:
    """The options of one board, those marked that no player would ever take."""
    return [(*each[:5], not any(_beats(other, each) for other in options)) for each in options]


def _beats(one: _Option, other: _Option) -> bool:
    """Is ``one`` no worse, whatever the rest do? It must need no memory, for a pool may be full; of equals, the first is."""
    return one[4] == 0 and one[2] <= other[2] and one[3] <= other[3] and (one[2:4] != other[2:4] or one[0] < other[0])


def _crowds(groups: Sequence[_Group], facts: Sequence[BoardFacts], policy: PolicySection) -> tuple[list[Crowd], list[int]]:
    """The units of demand as players, and the KV memory that they may hold of each board's language models.

    A pool stays out of the game where even all units together that could take of it would find room.
    """
    at = {(index, state.model): state.free_bytes for index, each in enumerate(facts) for state in each.kv}
    pool_of = {key: pool for pool, key in enumerate(at)}
    asked = [0] * len(at)
    rooms = [_room(group, pool_of, policy.horizon_us) for group in groups]
    for group, (pools, room) in zip(groups, rooms, strict=True):
        for pool, need in zip(pools, room, strict=True):
            asked[pool] += need * group.units
    tight = [need > free for need, free in zip(asked, at.values(), strict=True)]
    crowds = []
    for group, (pools, room) in zip(groups, rooms, strict=True):
        room = tuple([need if tight[pool] else 0 for pool, need in zip(pools, room, strict=True)])
        crowds.append(_crowd(group, facts, policy, pools, room if any(room) else ()))
    return crowds, list(at.values())


def _room(group: _Group, pool_of: Mapping[tuple[int, str], int], horizon_us: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The pool of each option and the bytes that a unit holds of it on average: rate * time * bytes (Little's law), rounded up.

    Nothing and nothing, if no option holds any.
    """
    if not any(group.hold_byte_us):
        return (), ()
    pools = group.played(tuple([pool_of.get(key, 0) for key in zip(group.boards, group.models, strict=True)]))
    hold = group.played(group.hold_byte_us)
    return pools, tuple([-(-each * group.unit_mreq // (1000 * horizon_us)) for each in hold])


def _crowd(
    group: _Group, facts: Sequence[BoardFacts], policy: PolicySection, pools: tuple[int, ...], room: tuple[int, ...]
) -> Crowd:
    """With ``room`` comes the last option: to be shed."""
    unit, boards, work_us = repeat(group.unit_mreq), group.played(group.boards), group.played(group.work_us)
    costs = map(mul, group.played(group.cost_us), repeat(policy.horizon_us))
    private = tuple(map(floordiv, map(mul, costs, unit), repeat(1000)))
    work = tuple([max(1, work // 1000) for work in map(mul, work_us, unit)])
    if not room:
        return Crowd(group.units, boards, private, work)
    shed = 2 * MAX_OPTION_US * policy.horizon_us * group.unit_mreq // 1000
    return Crowd(group.units, (*boards, len(facts)), (*private, shed), (*work, 1), (*pools, 0), (*room, 0))


class _Plan:
    """An equilibrium in the words of the table."""

    def __init__(self, facts: Sequence[BoardFacts], groups: Sequence[_Group], played: Equilibrium, policy: PolicySection) -> None:
        self._boards = [each.board for each in facts]
        self._groups = [(group, group.told(taken)) for group, taken in zip(groups, played.assignment, strict=True)]
        self._factor, self._horizon_us = policy.congestion_factor, policy.horizon_us
        self._loads = played.loads

    def entries(self) -> Iterator[Entry]:
        for group, units in self._groups:
            names = [self._boards[board] for board in group.boards]
            shares = _shares(units, group.units)
            ranked = sorted(zip(self._costs(group, units), group.models, names, shares, strict=True))
            if len(ranked) > MAX_OPTIONS:
                ranked = sorted(sorted(ranked, key=lambda each: (each[3] == 0, each))[:MAX_OPTIONS])
            options = tuple([Ranked(board, model, share, cost) for cost, model, board, share in ranked])
            yield Entry(group.ingress, group.demand.wanted, group.demand.rate_mhz, options)

    def _costs(self, group: _Group, taken: Sequence[int]) -> list[int]:
        """What a request pays where units of its class are already, and would pay as one more unit elsewhere."""
        loads, factor, horizon_us, unit = self._loads, self._factor, self._horizon_us, group.unit_mreq
        costs = [
            cost_us + factor * work_us * (loads[board] if units else loads[board] + work_us * unit // 1000) // horizon_us
            for board, cost_us, work_us, units in zip(group.boards, group.cost_us, group.work_us, taken, strict=True)
        ]
        return costs if max(costs, default=0) <= MAX_FIGURE else [min(cost, MAX_FIGURE) for cost in costs]

    def bookings(self) -> Iterator[Booking]:
        booked: list[dict[str, int]] = [{} for _ in self._boards]
        for group, taken in self._groups:
            for board, work_us, units in zip(group.boards, group.work_us, taken, strict=True):
                if units:
                    of, unit_us = booked[board], max(1, work_us * group.unit_mreq // 1000)
                    of[group.ingress] = min(of.get(group.ingress, 0) + unit_us * units, MAX_FIGURE)
        for name, by_ingress in zip(self._boards, booked, strict=True):
            if by_ingress:
                yield Booking(name, tuple(sorted(by_ingress.items())))


def _shares(taken: Sequence[int], units: int) -> list[int]:
    """Units as per mille of all, by the largest remainder; the option that stands first wins a tie. What is shed has the rest."""
    shares = [1000 * each // units for each in taken]
    missing = -(-1000 * sum(taken) // units) - sum(shares)
    if missing:
        rest = sorted((-(1000 * each % units), option) for option, each in enumerate(taken) if each)
        for _, option in rest[:missing]:
            shares[option] += 1
    return shares
