"""What happened in a demo: every request as its client saw it, the incidents, and the promises with their verdicts."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edge_agent.core.values import InferenceResult


@dataclass(frozen=True, slots=True)
class Served:
    """One request as its client saw it; times in seconds since the story began."""

    act: str
    client: str
    asked_s: float
    answered_s: float
    result: InferenceResult
    why: Mapping[str, Any] | None = None
    """Why its ingress board chose as it did; ``None`` if that board is gone."""

    @property
    def latency_ms(self) -> float:
        return (self.answered_s - self.asked_s) * 1000


@dataclass(slots=True)
class Story:
    served: list[Served] = field(default_factory=list)
    incidents: list[tuple[float, str]] = field(default_factory=list)
    promises: list[tuple[bool, str]] = field(default_factory=list)
    began_s: float = field(default_factory=time.monotonic)

    def now_s(self) -> float:
        return time.monotonic() - self.began_s

    def begin(self) -> None:
        """Count time from now."""
        self.began_s = time.monotonic()

    def incident(self, text: str) -> None:
        self.incidents.append((self.now_s(), text))
        say(f"\r  [{self.now_s():5.2f} s] {text}")

    def promise(self, kept: bool, text: str) -> None:
        self.promises.append((kept, text))
        say(f"  {'kept  ' if kept else 'BROKEN'}  {text}")


def say(text: str) -> None:
    """A line for the person who watches."""
    print(text, file=sys.stderr, flush=True)


def show_progress(done: int, total: int, end: str = "") -> None:
    """A bar on a terminal; its last state only where there is none."""
    if sys.stderr.isatty() or end:
        filled = 30 * done // total
        print(f"\r  [{'#' * filled}{'.' * (30 - filled)}] {done}/{total}", end=end, file=sys.stderr, flush=True)
