"""When this board speaks of itself: 1 s after a change, every 15 s without one, at once on a new connection.

Owns the sequence numbers of its records within one boot, and when its birth is said.  Rules: nothing that others do makes it
speak more than once a second; the birth is repeated too, because a will that came late, or was sent again by somebody, says
"offline" until the board itself says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from edge_agent.gossip.record import BoardRecord

CHANGED_PERIOD_US = 1_000_000
QUIET_PERIOD_US = 15_000_000


class Announcer:
    def __init__(self) -> None:
        self._last: BoardRecord | None = None
        self._record_us = self._birth_us = -CHANGED_PERIOD_US
        self._record_forced = self._birth_due = True

    def connected(self) -> None:
        """The other side knows nothing of us: say all of it now."""
        self._record_us = self._birth_us = -CHANGED_PERIOD_US
        self._record_forced = self._birth_due = True

    def repeat(self) -> None:
        """Something of it was not sent, or somebody says otherwise: say it again, when a second has passed since."""
        self._record_forced = self._birth_due = True

    def repeat_record(self) -> None:
        """Somebody holds an older one."""
        self._record_forced = True

    def takes_birth(self, now_us: int) -> bool:
        """Whether the birth is to be published now; it counts as said with this."""
        if now_us - self._birth_us < (CHANGED_PERIOD_US if self._birth_due else QUIET_PERIOD_US):
            return False
        self._birth_us, self._birth_due = now_us, False
        return True

    def take_record(self, record_at: Callable[[int, int], BoardRecord], now_us: int) -> BoardRecord | None:
        """The record to publish now, if one is due; ``record_at(sequence, now_us)`` makes it."""
        since_us = now_us - self._record_us
        if since_us < CHANGED_PERIOD_US:
            return None
        record = record_at(self._last.sequence + 1 if self._last else 1, now_us)
        changed = self._last is None or replace(record, sequence=self._last.sequence) != self._last
        if not (self._record_forced or changed or since_us >= QUIET_PERIOD_US):
            return None
        self._last, self._record_us, self._record_forced = record, now_us, False
        return record
