"""Time, as something that is passed in.

Rules: whole microseconds.  Intervals are taken on ``monotonic_us`` only; ``wall_us`` may jump, and is never used to decide
whether a peer's stamp is old.  Timers that are due at the same instant run in the order in which they were set, so a run on
virtual time is the same every time.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from typing import Protocol


class Clock(Protocol):
    def monotonic_us(self) -> int:
        """Microseconds since an arbitrary start; never goes back."""

    def wall_us(self) -> int:
        """Microseconds since 1970-01-01 UTC, as far as this machine knows."""


class Timer(Protocol):
    def cancel(self) -> None:
        """The callback will not run. Harmless after it ran and when repeated."""


class Timers(Protocol):
    def call_at(self, time_us: int, callback: Callable[[], object]) -> Timer:
        """Run ``callback`` once when the monotonic time is ``time_us``; a time that is past means as soon as possible."""


class TimedClock(Clock, Timers, Protocol):
    """A clock that also runs timers."""


class SystemClock:
    def monotonic_us(self) -> int:
        return time.monotonic_ns() // 1000

    def wall_us(self) -> int:
        return time.time_ns() // 1000


class VirtualClock:
    """A clock that stands still until it is moved, with timers: the simulator's and the tests'."""

    def __init__(self, start_us: int = 0, wall_offset_us: int = 0) -> None:
        self._now_us = start_us
        self.wall_offset_us = wall_offset_us
        self._timers: list[_VirtualTimer] = []
        self._timers_set = 0

    def monotonic_us(self) -> int:
        return self._now_us

    def wall_us(self) -> int:
        return self._now_us + self.wall_offset_us

    def call_at(self, time_us: int, callback: Callable[[], object]) -> Timer:
        self._timers_set += 1
        timer = _VirtualTimer(max(time_us, self._now_us), self._timers_set, callback)
        heapq.heappush(self._timers, timer)
        return timer

    def next_timer_us(self) -> int | None:
        """When the next timer is due; ``None`` if there is none."""
        while self._timers and self._timers[0].callback is None:
            heapq.heappop(self._timers)
        return self._timers[0].time_us if self._timers else None

    def run_next(self) -> bool:
        """Move to the next timer and run it; ``False`` if there is none."""
        time_us = self.next_timer_us()
        if time_us is None:
            return False
        timer = heapq.heappop(self._timers)
        self._now_us = time_us
        callback, timer.callback = timer.callback, None
        assert callback is not None
        callback()
        return True

    def run_until(self, time_us: int) -> None:
        """Move forward to ``time_us`` and run every timer on the way. Raises ``ValueError`` for a time that is past."""
        if time_us < self._now_us:
            raise ValueError(f"time does not go back: now {self._now_us} µs, asked for {time_us} µs")
        while (due_us := self.next_timer_us()) is not None and due_us <= time_us:
            self.run_next()
        self._now_us = time_us

    def advance(self, interval_us: int) -> None:
        """Move forward by an interval and run the timers on the way. Raises ``ValueError`` for a negative interval."""
        if interval_us < 0:
            raise ValueError(f"time does not go back: got {interval_us} µs")
        self.run_until(self._now_us + interval_us)


class _VirtualTimer:
    __slots__ = ("callback", "order", "time_us")

    def __init__(self, time_us: int, order: int, callback: Callable[[], object]) -> None:
        self.time_us, self.order = time_us, order
        self.callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        self.callback = None

    def __lt__(self, other: _VirtualTimer) -> bool:
        return (self.time_us, self.order) < (other.time_us, other.order)
