"""How long to wait before the next attempt to connect.

Full jitter: a wait is drawn evenly from nothing up to a ceiling, and the ceiling doubles with every failure up to a cap
(M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015), so that a fleet does not return in step.  Rule:
only a connection that lasted resets the ceiling; one that is torn down at once (two boards with one client id taking each
other's session) keeps it growing.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from edge_agent.core.values import bounded

MAX_BACKOFF_US = 3_600_000_000


@dataclass(frozen=True, slots=True)
class BackoffLimits:
    """The first ceiling, the last one, and how long a connection must have lasted to count as sound."""

    base_us: int = 500_000
    cap_us: int = 30_000_000
    sound_us: int = 10_000_000

    def __post_init__(self) -> None:
        bounded("back-off base_us", self.base_us, 1, MAX_BACKOFF_US, "µs")
        bounded("back-off cap_us", self.cap_us, self.base_us, MAX_BACKOFF_US, "µs")
        bounded("back-off sound_us", self.sound_us, 0, MAX_BACKOFF_US, "µs")


class Backoff:
    """Counts failures in a row. The same seed gives the same waits."""

    def __init__(self, limits: BackoffLimits, seed: int | str | None = None) -> None:
        self.limits = limits
        self._random = Random(seed)
        self._failures = 0

    @property
    def ceiling_us(self) -> int:
        """The longest wait that the next failure may draw."""
        return min(self.limits.cap_us, self.limits.base_us << min(self._failures, 32))

    def after(self, lasted_us: int) -> int:
        """The wait in µs after a connection that lasted ``lasted_us`` (0 if it never came up)."""
        if lasted_us >= self.limits.sound_us > 0:
            self._failures = 0
        wait_us = self._random.randrange(self.ceiling_us + 1)
        self._failures += 1
        return wait_us
