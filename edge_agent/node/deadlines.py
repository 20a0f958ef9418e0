"""What becomes due, and when, among thousands of things that mostly never do.

Rules: a key has one time, the last that was set; asking costs what is due, not what waits; keys that are due together come
in the order of their times, then of their names.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush

SPARE_ENTRIES = 64


class Deadlines:
    def __init__(self) -> None:
        self._times_us: dict[str, int] = {}
        self._heap: list[tuple[int, str]] = []

    def __len__(self) -> int:
        return len(self._times_us)

    def set(self, key: str, time_us: int) -> None:
        self._times_us[key] = time_us
        heappush(self._heap, (time_us, key))
        if len(self._heap) > 2 * len(self._times_us) + SPARE_ENTRIES:
            self._heap = [(time_us, key) for key, time_us in self._times_us.items()]
            heapify(self._heap)

    def discard(self, key: str) -> None:
        self._times_us.pop(key, None)

    def take_due(self, now_us: int) -> list[str]:
        """The keys whose time has come, which are forgotten with this."""
        due = []
        while self._heap and self._heap[0][0] <= now_us:
            time_us, key = heappop(self._heap)
            if self._times_us.get(key) == time_us:
                del self._times_us[key]
                due.append(key)
        return due
