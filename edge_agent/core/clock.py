"""Time, as something that is passed in.

Rules: whole microseconds.  Intervals are taken on ``monotonic_us`` only; ``wall_us`` may jump, and is never used to decide
whether a peer's stamp is old.
"""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    def monotonic_us(self) -> int:
        """Microseconds since an arbitrary start; never goes back."""

    def wall_us(self) -> int:
        """Microseconds since 1970-01-01 UTC, as far as this machine knows."""


class SystemClock:
    def monotonic_us(self) -> int:
        return time.monotonic_ns() // 1000

    def wall_us(self) -> int:
        return time.time_ns() // 1000


class VirtualClock:
    """A clock that stands still until it is moved: the simulator's and the tests'."""

    def __init__(self, start_us: int = 0, wall_offset_us: int = 0) -> None:
        self._now_us = start_us
        self.wall_offset_us = wall_offset_us

    def monotonic_us(self) -> int:
        return self._now_us

    def wall_us(self) -> int:
        return self._now_us + self.wall_offset_us

    def advance(self, interval_us: int) -> None:
        """Move forward. Raises ``ValueError`` for a negative interval."""
        if interval_us < 0:
            raise ValueError(f"time does not go back: got {interval_us} µs")
        self._now_us += interval_us
