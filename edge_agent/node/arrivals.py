"""How often requests of each class come in at this board, as a decayed rate that it tells the others.

Rules: integers only, and a function of what was counted and when, whenever it was asked; the table of classes is bounded, and
the least frequent give way; a rate that has decayed under ``MIN_RATE_MHZ`` is forgotten.  What is told is rounded to
``KEPT_BITS`` bits, so that a steady stream does not make the board speak.
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
KEPT_BITS = 3


class Arrivals:
    """``time_constant_us``: how long a request counts, about; the rate is the weight of all over it."""

    def __init__(self, time_constant_us: int = 10_000_000) -> None:
        self._constant_us = bounded("arrivals time_constant_us", time_constant_us, 1, 2**53, "µs")
        self._step_us = max(1, time_constant_us // STEPS)
        self._weights: dict[Wanted, tuple[int, int]] = {}
        """By class: its weight, and the step that it was decayed to."""

    def __len__(self) -> int:
        return len(self._weights)

    def count(self, wanted: Wanted, now_us: int) -> None:
        """A request came in; its class is counted."""
        kind = wanted.classed()
        if kind not in self._weights and len(self._weights) >= MAX_CLASSES:
            self._forget_least(now_us)
        self._weights[kind] = (min(MAX_WEIGHT, self._decayed(kind, now_us) + ONE), now_us // self._step_us)

    def demand(self, now_us: int) -> tuple[Demand, ...]:
        """The classes that come most, ascending, each with its rate."""
        rates = {kind: self._rate_mhz(kind, now_us) for kind in list(self._weights)}
        for kind in [kind for kind, rate_mhz in rates.items() if rate_mhz < MIN_RATE_MHZ]:
            del rates[kind], self._weights[kind]
        most = sorted(rates, key=lambda kind: (-rates[kind], kind))[:MAX_DEMANDS]
        return tuple(Demand(kind, _rounded(rates[kind])) for kind in sorted(most))

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


def _rounded(number: int) -> int:
    """The number with its first ``KEPT_BITS`` bits, to the nearest."""
    shift = max(0, number.bit_length() - KEPT_BITS)
    return number + (1 << shift >> 1) >> shift << shift
