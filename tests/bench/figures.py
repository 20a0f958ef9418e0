"""What a benchmark hands back, and the table that is printed.

Rules: a figure says what it is, its unit and, if there is one, its goal; nothing here measures.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

Progress = Callable[[str], None]
Benchmark = Callable[[Progress], Iterator["Figure"]]


@dataclass(frozen=True, slots=True)
class Figure:
    """``goal`` is the most that is allowed; ``None`` for a figure that only informs."""

    what: str
    value: float
    unit: str
    goal: float | None = None

    @property
    def met(self) -> bool | None:
        return None if self.goal is None else self.value <= self.goal

    def as_json(self) -> dict[str, object]:
        return {**asdict(self), "met": self.met}


def p50(samples: Iterable[float]) -> float:
    return statistics.median(samples)


def p95(samples: Sequence[float]) -> float:
    """The smallest sample that 95 % of them do not exceed."""
    ordered = sorted(samples)
    return ordered[-(-95 * len(ordered) // 100) - 1]


def number(value: float) -> str:
    """Three significant digits or all of the whole part, whichever is more."""
    if value == int(value):
        return f"{int(value):,}"
    digits = 3 if abs(value) < 10 else 1 if abs(value) < 1000 else 0
    return f"{value:,.{digits}f}"


def table(figures: Sequence[Figure]) -> str:
    verdicts = {None: "", True: "yes", False: "NO"}
    rows = [("what", "figure", "unit", "goal", "met?")]
    rows += [
        (each.what, number(each.value), each.unit, "" if each.goal is None else f"<= {number(each.goal)}", verdicts[each.met])
        for each in figures
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"{what:<{widths[0]}}  {value:>{widths[1]}}  {unit:<{widths[2]}}  {goal:>{widths[3]}}  {met}".rstrip()
        for what, value, unit, goal, met in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def progress(text: str) -> None:
    """One line on stderr that the next one replaces on a terminal; an empty one only clears it."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)
