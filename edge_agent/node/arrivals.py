"""How often requests of each class come in at this board, as decayed rates that it tells the others.

Rules: integers only, and a function of what was counted and asked, and when; the table of classes is bounded, and the least
frequent give way; a class that has decayed under ``FORGOTTEN`` is forgotten.  Each class is counted twice, over a short time and
a long one: a rate is told by the long one, and stays until one of them contradicts it by more than chance, so that chance in a
steady stream does not make all boards plan anew, and a change in it is told within the short time.  (Such inertia is the writer's
own affair; between a record and the table there is none.)
"""

from __future__ import annotations

from math import isqrt

from edge_agent.core.values import bounded
from edge_agent.core.wanted import MAX_DEMANDS, MAX_RATE_MHZ, Demand, Wanted

MAX_CLASSES = 4 * MAX_DEMANDS
STEPS = 16
"""Decay goes in steps of a 16th of the time constant, and takes a 16th of the weight each."""
ONE = 2**20
"""The weight of one request."""
MAX_WEIGHT = ONE * MAX_RATE_MHZ
FORGOTTEN_STEPS = 32 * STEPS
"""After so many nothing is left that counts."""
LONG = 6
"""The long time is so many short ones."""
FORGOTTEN = ONE // 6
"""In the long time: what came once is forgotten after not quite two of them."""
CHANCE_SHORT, CHANCE_LONG = 3, 2
"""So many standard deviations of what comes by chance are none of a change, in the short time and in the long one."""


class Arrivals:
    """``time_constant_us``: how long a request counts in the short time, about; a rate is the weight of all over it."""

    def __init__(self, time_constant_us: int = 10_000_000) -> None:
        self._short = _Memory(bounded("arrivals time_constant_us", time_constant_us, 1, 2**50, "µs"))
        self._long = _Memory(LONG * time_constant_us)
        self._began_us: int | None = None
        self._told_mhz: dict[Wanted, int] = {}

    def __len__(self) -> int:
        return len(self._long.weights)

    def count(self, wanted: Wanted, now_us: int) -> None:
        """A request came in; its class is counted."""
        kind = wanted.classed()
        if self._began_us is None:
            self._began_us = now_us
        if kind not in self._long.weights and len(self) >= MAX_CLASSES:
            self._forget(min(self._long.weights, key=lambda each: (self._long.weight(each, now_us), each)))
        self._short.count(kind, now_us)
        self._long.count(kind, now_us)

    def demand(self, now_us: int, may_change: bool = True) -> tuple[Demand, ...]:
        """The classes that come most, ascending, each with about its rate.

        Unless it ``may_change``, what was told stays while the short time does not contradict it.
        """
        short_us, long_us = self._short.constant_us, self._watched_us(now_us)
        for kind in [kind for kind in self._long.weights if self._long.weight(kind, now_us) < FORGOTTEN]:
            self._forget(kind)
        long = {kind: _rate_mhz(self._long.weight(kind, now_us), long_us) for kind in self._long.weights}
        short = {kind: _rate_mhz(self._short.weight(kind, now_us), short_us) for kind in long}
        told = self._told_mhz
        if may_change or any(_is_news(told.get(kind, 0), short.get(kind, 0), short_us, CHANCE_SHORT) for kind in told | long):
            self._told_mhz = {kind: self._settled(kind, long[kind], long_us, short[kind]) for kind in self._most(long)}
        return tuple(Demand(kind, rate_mhz) for kind, rate_mhz in self._told_mhz.items())

    def _settled(self, kind: Wanted, long_mhz: int, long_us: int, short_mhz: int) -> int:
        told_mhz = self._told_mhz.get(kind, 0)
        if not told_mhz or _is_news(told_mhz, long_mhz, long_us, CHANCE_LONG):
            told_mhz = long_mhz
        if _is_news(told_mhz, short_mhz, self._short.constant_us, CHANCE_SHORT):
            told_mhz = short_mhz
        return max(1, told_mhz)

    def _most(self, rates: dict[Wanted, int]) -> list[Wanted]:
        """The classes that are told, ascending: of those that are not, one must come twice as often as one that is."""
        most = sorted(rates, key=lambda kind: (-rates[kind] * (1 + (kind in self._told_mhz)), kind))
        return sorted(most[:MAX_DEMANDS])

    def _watched_us(self, now_us: int) -> int:
        """The long time, or as much of it as counts since the first request; never less than the short time."""
        began_us = now_us if self._began_us is None else self._began_us
        long_us = self._long.constant_us
        before = _decayed(ONE, (now_us - began_us) // self._long.step_us)
        return max(self._short.constant_us, long_us * (ONE - before) // ONE)

    def _forget(self, kind: Wanted) -> None:
        self._short.weights.pop(kind, None)
        self._long.weights.pop(kind, None)


class _Memory:
    """Decaying weights of classes: how much each has, and the step that it was decayed to."""

    def __init__(self, constant_us: int) -> None:
        self.constant_us, self.step_us = constant_us, max(1, constant_us // STEPS)
        self.weights: dict[Wanted, tuple[int, int]] = {}

    def count(self, kind: Wanted, now_us: int) -> None:
        self.weights[kind] = (min(MAX_WEIGHT, self.weight(kind, now_us) + ONE), now_us // self.step_us)

    def weight(self, kind: Wanted, now_us: int) -> int:
        weight, step = self.weights.get(kind, (0, 0))
        return _decayed(weight, now_us // self.step_us - step)


def _decayed(weight: int, steps: int) -> int:
    if steps > FORGOTTEN_STEPS:
        return 0
    for _ in range(steps):
        weight -= -(-weight // STEPS)
    return weight


def _rate_mhz(weight: int, constant_us: int) -> int:
    return min(MAX_RATE_MHZ, weight * 10**9 // (ONE * constant_us))


def _is_news(told_mhz: int, now_mhz: int, constant_us: int, deviations: int) -> bool:
    """Does a rate differ from what was told by more than its half and by more than chance?

    Of ``n`` requests that count, decayed, the variance is ``n / 2``; ``now_mhz`` is of ``constant_us``.
    """
    chance_mhz = deviations * isqrt(max(told_mhz, now_mhz) * 10**9 // (2 * constant_us))
    return abs(told_mhz - now_mhz) > max(min(told_mhz, now_mhz) // 2, chance_mhz)
