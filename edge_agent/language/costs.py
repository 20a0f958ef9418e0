"""What steps of so many rows cost, learned while they run: a noisy start is forgotten, and so is a quiet one.

Rules: pure, integers only, bounded.  Of each ``EPOCH_STEPS`` steps the quickest of each number of rows counts.  What was quicker
than the curve says is believed at once, for no noise makes a step quick; what was slower moves it by a quarter of the difference,
and only after ``LEAST_STEPS``.  More rows never cost less: what one number of rows teaches bounds the others.
"""

from __future__ import annotations

from edge_agent.language.batching import MAX_CURVE_POINTS, MAX_STEP_US, CostCurve

EPOCH_STEPS = 64
LEAST_STEPS = 8
"""Of one number of rows in an epoch, before it is believed that they got dearer."""
SLOWER = 4
"""One part in so many of the difference is believed each time."""


class Costs:
    """``curve`` is what is believed now."""

    def __init__(self, curve: CostCurve) -> None:
        self.curve = curve
        self._steps = 0
        self._seen: dict[int, tuple[int, int]] = {}

    def took(self, rows: int, us: int) -> None:
        """A step of ``rows`` rows took ``us`` µs."""
        count, least = self._seen.get(rows, (0, us))
        self._seen[rows] = count + 1, min(us, least)
        self._steps += 1
        if self._steps >= EPOCH_STEPS:
            for each, (count, least) in self._seen.items():
                self._learn(each, count, min(max(1, least), MAX_STEP_US))
            self._seen, self._steps = {}, 0

    def _learn(self, rows: int, count: int, us: int) -> None:
        known = dict(self.curve.points)
        if rows not in known and (len(known) >= MAX_CURVE_POINTS or rows > self.curve.points[-1][0]):
            return
        old = self.curve.us(rows)
        if us > old:
            us = old + (us - old) // SLOWER if count >= LEAST_STEPS else old
        known[rows] = us
        bounded = [(n, us if n == rows else min(known[n], us) if n < rows else max(known[n], us)) for n in sorted(known)]
        self.curve = CostCurve(tuple(bounded))
