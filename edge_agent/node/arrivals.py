"""How often requests of each class come in at this board, as a decayed rate that it tells the others.

Rules: integers only, and a function of what was counted and asked, and when; the table of classes is bounded, and the least
frequent give way; a rate that has decayed under ``MIN_RATE_MHZ`` is forgotten.  What was told stays until it is half as much
again as the rate, or the rate half as much again as it, so that the chance in a steady stream does not make all boards plan
anew.  (Such inertia is the writer's own affair; between a record and the table there is none.)
"""

from __future__ import annotations

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
MIN_RATE_MHZ = 10


class Arrivals:
    """``time_constant_us``: how long a request counts, about; the rate is the weight of all over it."""

    def __init__(self, time_constant_us: int = 10_000_000) -> None:
        self._constant_us = bounded("arrivals time_constant_us", time_constant_us, 1, 2**53, "µs")
        self._step_us = max(1, time_constant_us // STEPS)
        self._weights: dict[Wanted, tuple[int, int]] = {}
        """By class: its weight, and the step that it was decayed to."""
        self._told_mhz: dict[Wanted, int] = {}

    def __len__(self) -> int:
        return len(self._weights)

    def count(self, wanted: Wanted, now_us: int) -> None:
        """A request came in; its class is counted."""
        kind = wanted.classed()
        if kind not in self._weights and len(self._weights) >= MAX_CLASSES:
            self._forget_least(now_us)
        self._weights[kind] = (min(MAX_WEIGHT, self._decayed(kind, now_us) + ONE), now_us // self._step_us)

    def demand(self, now_us: int) -> tuple[Demand, ...]:
        """The classes that come most, ascending, each with about its rate."""
        rates = {kind: self._rate_mhz(kind, now_us) for kind in list(self._weights)}
        for kind in [kind for kind, rate_mhz in rates.items() if rate_mhz < MIN_RATE_MHZ]:
            del rates[kind], self._weights[kind]
        most = sorted(rates, key=lambda kind: (-rates[kind], kind))[:MAX_DEMANDS]
        self._told_mhz = {kind: _settled(self._told_mhz.get(kind, 0), rates[kind]) for kind in sorted(most)}
        return tuple(Demand(kind, rate_mhz) for kind, rate_mhz in self._told_mhz.items())

    def _rate_mhz(self, kind: Wanted, now_us: int) -> int:
        return min(MAX_RATE_MHZ, self._decayed(kind, now_us) * 10**9 // (ONE * self._constant_us))

    def _decayed(self, kind: Wanted, now_us: int) -> int:
        weight, step = self._weights.get(kind, (0, 0))
        steps = now_us // self._step_us - step
        if steps > FORGOTTEN_STEPS:
            return 0
        for _ in range(steps):
            weight -= -(-weight // STEPS)
        return weight

    def _forget_least(self, now_us: int) -> None:
        del self._weights[min(self._weights, key=lambda kind: (self._decayed(kind, now_us), kind))]


def _settled(told: int, now: int) -> int:
    """What was told, while neither number is more than one and a half times the other."""
    return told if 2 * told <= 3 * now and 2 * now <= 3 * told else now
