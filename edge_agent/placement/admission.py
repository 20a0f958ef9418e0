"""Which waiting request is next, which is given up because it cannot be done in time, and which gives way to another board's.

Owns the order of what waits on a board, over all its lanes.  Rules: pure, no clock; ``edf`` takes the earliest deadline (of what
can be done in time at all, nothing does more: Jackson, 1955) and ``fifo`` the oldest, ties by arrival; nothing is given up on a
guess: only what was measured often enough says how long something takes at least; when the queue is full the origin with the most
waiting work gives way, as long as it keeps more than the one that asks has.  Every operation costs some tens of comparisons,
however many wait.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from edge_agent.core.config import QueueSection
from edge_agent.placement.options import Decision, Option

CONFIDENT = 8
"""Measurements of a model and shape before they say that something cannot be done."""
TRIED_EVERY = 16
"""Of what is found hopeless one in so many is run nevertheless, so that an estimate that became wrong is corrected."""
LATE_PART = 4
"""A request is not placed when every option is late by this part of what is left of its deadline."""
MAX_DISPLACED = 16
"""Waiting requests that may give way to one that comes."""
CHUNK = 64

Rank = tuple[int, int]
"""What comes first: a deadline in µs (0 for ``fifo``), and the arrival."""


@dataclass(frozen=True, slots=True)
class Waiter:
    """A job as admission sees it. ``origin``: the board that placed it. ``busy_us``: expected; ``least_us``: it takes so long at
    least, 0 where that is not known well."""

    key: str
    lane: str
    origin: str
    deadline_us: int
    size_bytes: int
    busy_us: int
    least_us: int = 0


def least_us(busy_us: int, spread_us: int, measured: int) -> int:
    """What a job takes at least, by what was measured; 0 if that is too little to say."""
    return max(0, busy_us - spread_us) if measured >= CONFIDENT else 0


def why_hopeless(least_us: int, before_us: int, left_us: int) -> str:
    """Why a job that takes ``least_us`` after ``before_us`` of other work cannot be done in ``left_us``; empty if it may."""
    if not least_us or before_us + least_us <= left_us:
        return ""
    before = f"after {before_us} µs of other work " if before_us else ""
    return (
        f"it cannot be done in time: {before}it takes {least_us} µs at least and {left_us} µs are left of its deadline; "
        "a longer deadline, a quicker model or a board with less to do may serve it"
    )


class TooLate:
    """Which requests are answered at once because no option can do them in time, by what was measured.

    One in ``TRIED_EVERY`` of those is placed nevertheless, so that estimates which became wrong are corrected.
    """

    def __init__(self) -> None:
        self._found = 0

    def why(self, decision: Decision, budget_us: int) -> str:
        """Why a request of this decision is not placed; empty if it is."""
        soonest = min(decision.ranked, key=lambda option: option.cost.latency_us, default=None)
        if soonest is None or any(not _is_late(option, budget_us) for option in decision.ranked):
            return ""
        self._found += 1
        if self._found % TRIED_EVERY == 0:
            return ""
        return (
            f"no board can do it in time: {budget_us} µs are left of its deadline, and the soonest, {soonest.offer.model} on "
            f"{soonest.board}, would take {soonest.cost.latency_us} µs; a longer deadline or a lower quality floor may be served"
        )


def _is_late(option: Option, budget_us: int) -> bool:
    """Surely: by a quarter of its budget, and by more than a few measurements."""
    measured = max((each.measured for each in option.offer.shapes), default=0)
    return measured >= CONFIDENT and option.cost.latency_us > budget_us + budget_us // LATE_PART


class Line:
    """Keys by rank, each with a weight: the first, the last, and the weight of all before one of them."""

    def __init__(self) -> None:
        self._chunks: list[list[tuple[Rank, str, int]]] = []
        self._weights: list[int] = []
        """Of each chunk."""
        self.total = 0
        """The weight of all."""
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[str]:
        """In order. The line must not change meanwhile."""
        return (key for chunk in self._chunks for _, key, _ in chunk)

    def __reversed__(self) -> Iterator[str]:
        return (key for chunk in reversed(self._chunks) for _, key, _ in reversed(chunk))

    def add(self, rank: Rank, key: str, weight: int) -> None:
        """A rank may be there once."""
        if not self._chunks:
            self._chunks, self._weights = [[]], [0]
        number = max(0, bisect_right(self._chunks, rank, key=_first_rank) - 1) if self._count else 0
        chunk = self._chunks[number]
        chunk.insert(bisect_left(chunk, rank, key=_rank), (rank, key, weight))
        self._weights[number] += weight
        self.total += weight
        self._count += 1
        if len(chunk) > 2 * CHUNK:
            self._chunks[number : number + 1] = [chunk[:CHUNK], chunk[CHUNK:]]
            self._weights[number : number + 1] = [sum(entry[2] for entry in half) for half in (chunk[:CHUNK], chunk[CHUNK:])]

    def remove(self, rank: Rank) -> None:
        """Raises ``KeyError`` for a rank that is not there."""
        number, place = self._find(rank)
        weight = self._chunks[number].pop(place)[2]
        self._weights[number] -= weight
        self.total -= weight
        self._count -= 1
        if not self._chunks[number]:
            del self._chunks[number], self._weights[number]

    def before(self, rank: Rank) -> int:
        """The weight of what is before ``rank``, which need not be there."""
        number = bisect_right(self._chunks, rank, key=_first_rank) - 1
        if number < 0:
            return 0
        chunk = self._chunks[number]
        return sum(self._weights[:number]) + sum(entry[2] for entry in chunk[: bisect_left(chunk, rank, key=_rank)])

    def _find(self, rank: Rank) -> tuple[int, int]:
        number = bisect_right(self._chunks, rank, key=_first_rank) - 1
        if number >= 0:
            chunk = self._chunks[number]
            place = bisect_left(chunk, rank, key=_rank)
            if place < len(chunk) and chunk[place][0] == rank:
                return number, place
        raise KeyError(rank)


def _rank(entry: tuple[Rank, str, int]) -> Rank:
    return entry[0]


def _first_rank(chunk: list[tuple[Rank, str, int]]) -> Rank:
    return chunk[0][0]


class Waiting:
    """All that waits on a board: bounded in number and bytes, in order within each lane."""

    def __init__(self, limits: QueueSection) -> None:
        self.limits = limits
        self.size_bytes = 0
        self._arrivals = 0
        self._ranked: dict[str, tuple[Waiter, Rank]] = {}
        self._lanes: dict[str, Line] = {}
        self._least: dict[str, Line] = {}
        self._origins: dict[str, Line] = {}
        """Weights: what is expected of each job by lane, what it takes at least by lane, what is expected by origin."""

    def __len__(self) -> int:
        return len(self._ranked)

    def __contains__(self, key: str) -> bool:
        return key in self._ranked

    def add(self, waiter: Waiter) -> None:
        """Ask ``full`` first. Raises ``RuntimeError`` for a key that waits already."""
        if waiter.key in self._ranked:
            raise RuntimeError(f"job {waiter.key} waits already")
        self._arrivals += 1
        rank = (waiter.deadline_us if self.limits.order == "edf" else 0, self._arrivals)
        self._ranked[waiter.key] = waiter, rank
        self._lanes.setdefault(waiter.lane, Line()).add(rank, waiter.key, waiter.busy_us)
        self._least.setdefault(waiter.lane, Line()).add(rank, waiter.key, waiter.least_us)
        self._origins.setdefault(waiter.origin, Line()).add(rank, waiter.key, max(1, waiter.busy_us))
        self.size_bytes += waiter.size_bytes

    def remove(self, key: str) -> Waiter | None:
        """Take a job out; ``None`` if it does not wait."""
        waiter, rank = self._ranked.pop(key, (None, (0, 0)))
        if waiter is None:
            return None
        for lines, name in ((self._lanes, waiter.lane), (self._least, waiter.lane), (self._origins, waiter.origin)):
            lines[name].remove(rank)
            if not len(lines[name]):
                del lines[name]
        self.size_bytes -= waiter.size_bytes
        return waiter

    def in_order(self, lane: str) -> Iterator[str]:
        """The keys of a lane, the next one first. Nothing may be added or removed meanwhile."""
        return iter(self._lanes.get(lane, ()))

    def count(self, lane: str) -> int:
        return len(self._lanes.get(lane, ()))

    def before_us(self, key: str) -> int:
        """What the jobs before this one in its lane take at least. Raises ``KeyError`` if it does not wait."""
        waiter, rank = self._ranked[key]
        return self._least[waiter.lane].before(rank)

    def due_permille(self, lane: str, deadline_us: int) -> int:
        """How much of the expected work of a lane is before what has this deadline and comes now, rounded up."""
        line = self._lanes.get(lane)
        if line is None or not line.total or self.limits.order != "edf":
            return 1000
        return -(-1000 * line.before((deadline_us + 1, 0)) // line.total)

    def work_us(self, origin: str) -> int:
        """The expected work that waits here for one origin."""
        line = self._origins.get(origin)
        return line.total if line else 0

    def full(self, size_bytes: int, origin: str = "") -> str:
        """Why a job of this size, of this origin, cannot wait here; empty if it can, perhaps in the place of others."""
        reason = self._short_of(size_bytes, 0, 0)
        return "" if not reason or (origin and self.giving_way(size_bytes, origin)) else reason

    def giving_way(self, size_bytes: int, origin: str) -> list[str]:
        """The jobs that must go for one of ``origin`` to have a place, the last ones of whoever has most waiting; none if there
        is a place, or fairness gives it none."""
        mine_us = self.work_us(origin)
        theirs_us = {name: line.total for name, line in self._origins.items() if name != origin}
        tails = {name: reversed(self._origins[name]) for name in theirs_us}
        going: list[Waiter] = []
        while self._short_of(size_bytes, len(going), sum(each.size_bytes for each in going)):
            largest = max(theirs_us, key=lambda name: (theirs_us[name], name), default=None)
            if largest is None or len(going) == MAX_DISPLACED:
                return []
            last, _ = self._ranked[next(tails[largest])]
            theirs_us[largest] -= max(1, last.busy_us)
            if theirs_us[largest] <= mine_us:
                return []
            going.append(last)
        return [each.key for each in going]

    def why_displaced(self, loser: str, winner: str) -> str:
        """What the client of a job that gave way is told, before it goes."""
        return (
            f"it gave way in a full queue of {len(self)} requests and {self.size_bytes} bytes, in which {loser} has "
            f"{self.work_us(loser)} µs of work and {winner} {self.work_us(winner)} µs; another board may serve it, this one later"
        )

    def _short_of(self, size_bytes: int, going: int, going_bytes: int) -> str:
        count, waiting_bytes = len(self) - going, self.size_bytes - going_bytes
        if count >= self.limits.max_requests:
            return f"the queue is full: {count} requests wait"
        if waiting_bytes + size_bytes > self.limits.max_bytes:
            return f"the queue is full: {waiting_bytes} of {self.limits.max_bytes} bytes wait, {size_bytes} more asked"
        return ""
