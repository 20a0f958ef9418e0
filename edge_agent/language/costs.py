"""What steps of so many rows cost, learned while they run: a noisy start is forgotten, and so is a quiet one.

Rules: pure, integers only, bounded.  Of each ``EPOCH_STEPS`` steps the quickest of each number of rows counts.  What was quicker
than the curve says is believed at once, for no noise makes a step quick; what was slower moves it by a quarter of the difference,
and only after ``LEAST_STEPS``.  What was not tried moves in proportion with the nearest number of rows that was, or what a noisy
start made look dear would never be tried again.  More rows never cost less.
"""

from __future__ import annotations

from itertools import pairwise

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
            self._learn()
            self._seen, self._steps = {}, 0

    def _learn(self) -> None:
        known = {rows for rows, _ in self.curve.points}
        fresh = sorted(rows for rows in self._seen if rows not in known and rows < max(known))
        known.update(fresh[: MAX_CURVE_POINTS - len(known)])
        new = {rows: self._believed(rows) for rows in sorted(known & self._seen.keys(), reverse=True)}
        if not new:
            return
        for larger, smaller in pairwise(new):
            new[smaller] = min(new[larger], new[smaller])
        points: list[tuple[int, int]] = []
        for rows in sorted(known):
            most = min((us for each, us in new.items() if each >= rows), default=MAX_STEP_US)
            us = min(new[rows] if rows in new else self._moved(rows, new), most)
            points.append((rows, max(us, points[-1][1] if points else 1)))
        self.curve = CostCurve(tuple(points))

    def _believed(self, rows: int) -> int:
        count, least = self._seen[rows]
        old = self.curve.us(rows)
        if least <= old:
            return max(1, least)
        return min(old + (least - old) // SLOWER, MAX_STEP_US) if count >= LEAST_STEPS else old

    def _moved(self, rows: int, new: dict[int, int]) -> int:
        """What ``rows`` rows cost if they changed as the nearest ones did that were tried."""
        nearest = min(new, key=lambda each: (abs(each - rows), each))
        return self.curve.us(rows) * new[nearest] // max(1, self.curve.us(nearest))
