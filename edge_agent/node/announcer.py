"""When this board speaks of itself: 1 s after a change, every 15 s without one, at once on a new connection.

Owns the sequence numbers of its records within one boot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from edge_agent.gossip.record import BoardRecord

CHANGED_PERIOD_US = 1_000_000
QUIET_PERIOD_US = 15_000_000


class Announcer:
    def __init__(self) -> None:
        self._last: BoardRecord | None = None
        self._last_us = 0
        self._forced = True

    def force(self) -> None:
        """Say it again at the next opportunity, changed or not."""
        self._forced = True

    def due(self, record_at: Callable[[int, int], BoardRecord], now_us: int) -> Iterator[BoardRecord]:
        """The record to publish now, if one is due; ``record_at(sequence, now_us)`` makes it."""
        since_us = now_us - self._last_us
        if not self._forced and since_us < CHANGED_PERIOD_US:
            return
        sequence = self._last.sequence + 1 if self._last else 1
        record = record_at(sequence, now_us)
        changed = self._last is None or replace(record, sequence=self._last.sequence) != self._last
        if self._forced or changed or since_us >= QUIET_PERIOD_US:
            self._last, self._last_us, self._forced = record, now_us, False
            yield record
