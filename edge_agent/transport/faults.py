"""What can go wrong between a link and the loopback broker, as values, and the wire that makes it happen.

Rules: the values are frozen, integers only; a probability is in permille.  Loss, duplication and reordering befall
publications and their acknowledgements; a partition stops everything.  What got lost is known to be lost at that moment and
its sender's retry is set then, so a run without faults sets no retry timers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from random import Random

from edge_agent.core.clock import TimedClock, Timer
from edge_agent.core.values import bounded

MAX_DELAY_US = 600_000_000


@dataclass(frozen=True, slots=True)
class Delay:
    """One way's time: ``least_us`` plus an even draw up to ``jitter_us``; with ``tail_permille`` another ``tail_us`` on top."""

    least_us: int = 1_000
    jitter_us: int = 0
    tail_permille: int = 0
    tail_us: int = 0

    def __post_init__(self) -> None:
        for name in ("least_us", "jitter_us", "tail_us"):
            bounded(f"delay {name}", getattr(self, name), 0, MAX_DELAY_US, "µs")
        bounded("delay tail_permille", self.tail_permille, 0, 1000)

    def draw_us(self, random: Random) -> int:
        delay_us = self.least_us
        if self.jitter_us:
            delay_us += random.randrange(self.jitter_us + 1)
        if self.tail_permille and random.randrange(1000) < self.tail_permille:
            delay_us += self.tail_us
        return delay_us


@dataclass(frozen=True, slots=True)
class Faults:
    """How the network behaves from now on. What is lost of QoS 1 is sent again after ``retry_us``."""

    delay: Delay = Delay()
    loss_permille: int = 0
    duplicate_permille: int = 0
    reorder_permille: int = 0
    retry_us: int = 1_000_000

    def __post_init__(self) -> None:
        bounded("loss_permille", self.loss_permille, 0, 999)
        bounded("duplicate_permille", self.duplicate_permille, 0, 1000)
        bounded("reorder_permille", self.reorder_permille, 0, 1000)
        bounded("retry_us", self.retry_us, 1, MAX_DELAY_US, "µs")


class Way(Enum):
    TO_BROKER = "to the broker"
    FROM_BROKER = "from the broker"


@dataclass(frozen=True, slots=True)
class Partition:
    """The named links are cut off from the broker, both ways or one."""

    links: frozenset[str] = frozenset()
    ways: frozenset[Way] = frozenset(Way)


class Wire:
    """Carries callbacks between links, by their names, and the broker, on the clock and from the seed that it is given."""

    def __init__(self, clock: TimedClock, seed: int | str, faults: Faults) -> None:
        self.faults = faults
        self.epoch = 0
        """Counts the changes of the partition."""
        self._clock, self._random = clock, Random(seed)
        self._partition = Partition()
        self._arrived_us: dict[tuple[str, Way], int] = {}

    def partition(self, partition: Partition) -> None:
        self._partition = partition
        self.epoch += 1

    def cuts(self, link: str, way: Way | None = None) -> bool:
        """Whether a link is cut off, one way or (without ``way``) any."""
        ways = self._partition.ways
        return link in self._partition.links and (way in ways if way else bool(ways))

    def after(self, interval_us: int, callback: Callable[[], object]) -> Timer:
        return self._clock.call_at(self._clock.monotonic_us() + interval_us, callback)

    def carry(self, link: str, way: Way, arrive: Callable[[], object], lost: Callable[[], None] | None = None) -> None:
        """Bring something one way. ``lost`` says that it is a publication or an acknowledgement, and what then."""
        if self.cuts(link, way) or (lost is not None and self._hits(self.faults.loss_permille)):
            self.lose(lost)
            return
        copies = 2 if lost is not None and self._hits(self.faults.duplicate_permille) else 1
        for _ in range(copies):
            time_us = self._clock.monotonic_us() + self.faults.delay.draw_us(self._random)
            if lost is None or not self._hits(self.faults.reorder_permille):
                time_us = max(time_us, self._arrived_us.get((link, way), 0))
                self._arrived_us[link, way] = time_us
            self._clock.call_at(time_us, lambda: self.lose(lost) if self.cuts(link, way) else arrive())

    def lose(self, lost: Callable[[], None] | None) -> None:
        if lost is not None:
            self.after(self.faults.retry_us, lost)

    def _hits(self, permille: int) -> bool:
        return permille > 0 and self._random.randrange(1000) < permille
