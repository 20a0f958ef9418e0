"""How much work this board has sent to each board of late, to be held against its part in the agreed table.

Rules: integers; a decayed sum whose steady state is the work sent within one horizon, so that it can be compared with what the
table books; bounded by the boards of the fleet; it never leaves this board, so that the table stays a function of joined facts.
"""

from __future__ import annotations

STEPS = 64
"""Decay goes in steps of a 64th of the horizon, and takes a 64th of the sum each."""
FORGOTTEN_STEPS = 40 * STEPS


class Bookings:
    def __init__(self, horizon_us: int) -> None:
        self._step_us = max(1, horizon_us // STEPS)
        self._sent: dict[str, tuple[int, int]] = {}
        """By board: the sum in 1/``STEPS`` µs, and the step that it was decayed to."""

    def send(self, board: str, busy_us: int, now_us: int) -> None:
        """A request that takes ``busy_us`` goes to ``board``."""
        self._sent[board] = (self._decayed(board, now_us) + busy_us * STEPS, now_us // self._step_us)

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
