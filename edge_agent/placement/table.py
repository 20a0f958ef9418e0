"""The agreed table: made from what all boards say of themselves, the same on every board.

Owns ``TableMaker``; the table itself is a value of ``agreed``.  Rules: a table is a pure integer function of the set of
``BoardFacts`` and of the rules; what the maker keeps from one table to the next only saves time; the filters and the costs are
those of the live choice (``options``), over a view built from the facts; whatever a board claims is bounded here, so that a lie
saturates and never overflows.

The players of the game are *units* of demand: the requests of one class that come in at one board within the policy's horizon,
in at most ``MAX_UNITS_EACH`` equal parts, at most ``MAX_UNITS`` in the whole fleet.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from operator import add, floordiv, mul
from typing import NamedTuple

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


class _Cell(NamedTuple):
    """The options of one class on one board: models, and what one request costs and keeps busy there."""

    models: tuple[str, ...]
    cost_us: tuple[int, ...]
    work_us: tuple[int, ...]


class _Group(NamedTuple):
    """The demand for one class at one ingress: ``count`` units of ``unit_mreq``; columns of options by (model, board)."""

    ingress: str
    demand: Demand
    units: int
    unit_mreq: int
    boards: tuple[int, ...]
    models: tuple[str, ...]
    cost_us: tuple[int, ...]
    work_us: tuple[int, ...]


class TableMaker:
    """Makes tables by ``rules``; keeps the options of boards that say the same as before."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._rules_digest = rules_digest(rules)
        self._classes: dict[Wanted, int] = {}
        self._supply: dict[str, bytes] = {}
        self._cells: dict[str, dict[int, _Cell]] = {}

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
        crowds = [_crowd(group, ordered, self._rules) for group in groups]
        played = settle(crowds, len(ordered), policy.congestion_factor, policy.gain_us * policy.horizon_us)
        plan = _Plan(ordered, groups, crowds, played, self._rules)
        return Table(
            tuple(plan.entries()),
            tuple(plan.bookings()),
            facts_digest(ordered),
            self._rules_digest,
            min(played.moves, MAX_FIGURE),
            min(played.bound, MAX_FIGURE),
        )

    def _forget(self, facts: Sequence[BoardFacts], wanted: Sequence[Wanted]) -> None:
        """Keep only what holds still: cells of boards that say the same, of classes that somebody wants."""
        classes = dict.fromkeys(wanted)
        if any(each not in self._classes for each in classes) or len(self._classes) > 2 * len(classes):
            same = {number: index for index, each in enumerate(classes) if (number := self._classes.get(each)) is not None}
            self._classes = {each: index for index, each in enumerate(classes)}
            self._cells = {
                board: {2 * same[key >> 1] + (key & 1): cell for key, cell in cells.items() if key >> 1 in same}
                for board, cells in self._cells.items()
            }
        self._cells = {
            each.board: self._cells.get(each.board, {}) if self._supply.get(each.board) == each.supply_bytes else {}
            for each in facts
        }
        self._supply = {each.board: each.supply_bytes for each in facts}

    def _group(self, ingress: str, demand: Demand, count: int, unit_mreq: int, facts: Sequence[BoardFacts]) -> _Group:
        number = 2 * self._classes[demand.wanted]
        options: list[tuple[str, int, int, int]] = []
        for index, each in enumerate(facts):
            local = each.board == ingress
            cells, key = self._cells[each.board], number + local
            cell = cells.get(key)
            if cell is None:
                cell = cells[key] = _cell(demand.wanted, each, local, self._rules)
            options += zip(cell.models, repeat(index), cell.cost_us, cell.work_us)
        options.sort()
        models, boards, cost_us, work_us = zip(*options, strict=True) if options else ((), (), (), ())
        return _Group(ingress, demand, count, unit_mreq, boards, models, cost_us, work_us)


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


def _cell(wanted: Wanted, facts: BoardFacts, local: bool, rules: Rules) -> _Cell:
    """What the live choice would see of this board for a request of the class, if the board were booked for nothing."""
    view = BoardView(
        facts.board, facts.offers, facts.queue_us, local, facts.headroom_mdegc, "" if facts.up else "it is not up",
        kv={state.model: state for state in facts.kv}, trust=facts.trust,
    )  # fmt: skip
    if why_not_board(wanted, view, rules):
        return _Cell((), (), ())
    options = []
    for offer in view.offers:
        plan = kv_plan(wanted, view, offer, (), rules.policy)
        if not wanted.served_by(offer) or why_not_model(wanted, offer, rules) or plan.lacking:
            continue
        cost = weigh(wanted, view, offer, plan, wanted.deadline_us, rules.policy)
        work_us = max(1, -(-cost.busy_us // offer.parallel))
        options.append((offer.model, min(cost.total_us, MAX_OPTION_US), min(work_us, MAX_OPTION_US)))
    return _Cell(*zip(*options, strict=True)) if options else _Cell((), (), ())


def _crowd(group: _Group, facts: Sequence[BoardFacts], rules: Rules) -> Crowd:
    """The units of a demand as players: what waits on a board already is part of what they pay in private."""
    policy, unit = rules.policy, repeat(group.unit_mreq)
    waiting = map(mul, repeat(policy.congestion_factor), map(mul, [facts[b].queue_us for b in group.boards], group.work_us))
    private = map(add, map(mul, group.cost_us, repeat(policy.horizon_us)), waiting)
    return Crowd(
        group.units,
        group.boards,
        tuple(map(floordiv, map(mul, private, unit), repeat(1000))),
        tuple(max(1, work // 1000) for work in map(mul, group.work_us, unit)),
    )


class _Plan:
    """An equilibrium in the words of the table."""

    def __init__(
        self, facts: Sequence[BoardFacts], groups: Sequence[_Group], crowds: Sequence[Crowd], played: Equilibrium, rules: Rules
    ) -> None:
        self._boards = [each.board for each in facts]
        self._groups, self._crowds, self._played = groups, crowds, played
        self._factor, self._horizon_us = rules.policy.congestion_factor, rules.policy.horizon_us
        self._loads = [load + each.queue_us for load, each in zip(played.loads, facts, strict=True)]

    def entries(self) -> Iterator[Entry]:
        for group, crowd, taken in zip(self._groups, self._crowds, self._played.assignment, strict=True):
            names = [self._boards[board] for board in group.boards]
            costs = list(self._costs(group, crowd, taken))
            ranked = sorted(zip(costs, group.models, names, _shares(taken), strict=True))
            if len(ranked) > MAX_OPTIONS:
                ranked = sorted(sorted(ranked, key=lambda each: (each[3] == 0, each))[:MAX_OPTIONS])
            options = tuple([Ranked(board, model, share, cost) for cost, model, board, share in ranked])
            yield Entry(group.ingress, group.demand.wanted, group.demand.rate_mhz, options)

    def _costs(self, group: _Group, crowd: Crowd, taken: Sequence[int]) -> Iterator[int]:
        """What a request of a unit pays where units are already, and would pay as one more unit elsewhere."""
        for board, cost_us, work_us, unit_us, units in zip(
            group.boards, group.cost_us, group.work_us, crowd.work, taken, strict=True
        ):
            load = self._loads[board] if units else self._loads[board] + unit_us
            yield min(cost_us + self._factor * work_us * load // self._horizon_us, MAX_FIGURE)

    def bookings(self) -> Iterator[Booking]:
        booked: list[dict[str, int]] = [{} for _ in self._boards]
        for group, crowd, taken in zip(self._groups, self._crowds, self._played.assignment, strict=True):
            for at, work, units in zip(crowd.boards, crowd.work, taken, strict=True):
                if units:
                    of = booked[at]
                    of[group.ingress] = min(of.get(group.ingress, 0) + work * units, MAX_FIGURE)
        for board, by_ingress in zip(self._boards, booked, strict=True):
            if by_ingress:
                yield Booking(board, tuple(sorted(by_ingress.items())))


def _shares(taken: Sequence[int]) -> list[int]:
    """Units as per mille of all, by the largest remainder; the option that stands first wins a tie."""
    total = sum(taken)
    if not total:
        return [0] * len(taken)
    shares = [1000 * units // total for units in taken]
    rest = sorted(range(len(taken)), key=lambda option: (-(1000 * taken[option] % total), option))
    for option in rest[: 1000 - sum(shares)]:
        shares[option] += 1
    return shares
