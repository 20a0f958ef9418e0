"""What this board has given to others and to itself: the work that is unanswered, and how much went where of late.

Rules: integers; bounded by what is pending and by the boards of the fleet; nothing of it leaves this board, so that the agreed
table stays a function of joined facts.  What was sent lately is a decayed sum whose steady state is the work of one horizon, so
that it can be held against what the table plans.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge_agent.placement.cost import CostParts

STEPS = 64
"""Decay goes in steps of a 64th of the horizon, and takes a 64th of the sum each."""
FORGOTTEN_STEPS = 40 * STEPS

Lane = tuple[str, str]
"""A board and the queue there: a language model's own, or ``""`` for all others."""


@dataclass(frozen=True, slots=True)
class _Given:
    given_us: int
    deadline_us: int
    work_us: int


@dataclass(frozen=True, slots=True)
class Ahead:
    """Work of this board's own in a lane, due no later than a request that might join it.

    ``jobs``: how many are unanswered, whenever they are due, ``fresh_jobs`` of them given since the lane's board last spoke;
    ``unanswered_us`` of the urgent ones, ``fresh_us`` of those among them that were given since then.
    """

    jobs: int
    fresh_jobs: int
    unanswered_us: int
    fresh_us: int


class Bookings:
    def __init__(self, horizon_us: int) -> None:
        self._step_us = max(1, horizon_us // STEPS)
        self._sent: dict[str, tuple[int, int]] = {}
        """By board: the sum in 1/``STEPS`` µs, and the step that it was decayed to."""
        self._given: dict[Lane, dict[str, _Given]] = {}

    def give(self, request_id: str, lane: Lane, cost: CostParts, deadline_us: int, now_us: int) -> None:
        """A request goes to a lane."""
        self._given.setdefault(lane, {})[request_id] = _Given(now_us, deadline_us, cost.work_us)
        board = lane[0]
        self._sent[board] = (self._decayed(board, now_us) + cost.work_us * STEPS, now_us // self._step_us)

    def take_back(self, request_id: str, lane: Lane) -> None:
        """It was answered there, or is given up."""
        given = self._given[lane]
        del given[request_id]
        if not given:
            del self._given[lane]

    def ahead(self, lane: Lane, deadline_us: int, since_us: int) -> Ahead:
        """What a request of this deadline would find before it in a lane whose board last spoke at ``since_us``."""
        given = self._given.get(lane, {})
        urgent = [each for each in given.values() if each.deadline_us <= deadline_us]
        fresh_us = sum(each.work_us for each in urgent if each.given_us >= since_us)
        fresh_jobs = sum(each.given_us >= since_us for each in given.values())
        return Ahead(len(given), fresh_jobs, sum(each.work_us for each in urgent), fresh_us)

    def recent_us(self, board: str, now_us: int) -> int:
        """The work that was sent to ``board`` within about a horizon."""
        return self._decayed(board, now_us) // STEPS

    def _decayed(self, board: str, now_us: int) -> int:
        total, step = self._sent.get(board, (0, 0))
        steps = now_us // self._step_us - step
        if steps > FORGOTTEN_STEPS:
            return 0
        for _ in range(steps):
            if not total:
                break
            total -= -(-total // STEPS)
        return total
