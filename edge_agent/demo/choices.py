"""What the boards say of their own choices: which option was taken how often and why, and whether all hold the same table.

Rules: everything here is asked of running agents through their sockets, as ``sly explain`` and ``sly fleet table`` ask; a board
that was killed took its reasons with it, and what is missing is counted.
"""

from __future__ import annotations

import textwrap
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edge_agent.gateway.local import LocalConnection
from edge_agent.local_fleet import LocalFleet

Why = Mapping[str, Any]
"""``why`` in a report of ``explain``."""
WIDTH = 130
AGREE_LIMIT_S = 20.0
POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Choice:
    """An option, and how often it was chosen for which main reason, against the best option of another board."""

    option: str
    reasons: Counter[str]

    @property
    def times(self) -> int:
        return self.reasons.total()

    @property
    def why(self) -> str:
        return ", ".join(f"{reason} {times}x" for reason, times in self.reasons.most_common())


@dataclass(frozen=True, slots=True)
class Agreed:
    """What table each board holds. ``told``: each has heard each other say, since the beginning, that it holds the same."""

    digests: Mapping[str, str]
    classes: int
    after_s: float
    told: bool

    @property
    def holds(self) -> bool:
        return self.told and len(set(self.digests.values())) == 1

    def __str__(self) -> str:
        if not self.holds:
            return ", ".join(f"{board} {digest[:8]}" for board, digest in self.digests.items())
        return f"{next(iter(self.digests.values()))[:16]}, {self.classes} request classes, after {self.after_s:.1f} s"


def choices(whys: Iterable[Why]) -> list[Choice]:
    """Most frequent first."""
    counted: dict[str, Counter[str]] = {}
    for why in whys:
        counted.setdefault(why["chosen"] or "none", Counter())[why["main"]] += 1
    return sorted((Choice(option, reasons) for option, reasons in counted.items()), key=lambda each: (-each.times, each.option))


def choices_table(found: Sequence[Choice], answers: int) -> str:
    """``answers``: how many there were, explained or not."""
    name_width = max([6, *(len(each.option) for each in found)])
    lines = ["", f"{'option':<{name_width}} {'chosen':>7}  why there, against the best option of another board"]
    for each in found:
        indent = " " * (name_width + 10)
        head = f"{each.option:<{name_width}} {each.times:>6}x  "
        lines += textwrap.wrap(each.why, WIDTH, initial_indent=head, subsequent_indent=indent)
    lost = answers - sum(each.times for each in found)
    return "\n".join([*lines, *([f"{lost} of {answers} answers cannot be explained: who chose is gone"] if lost else [])])


def choices_json(found: Iterable[Choice]) -> list[dict[str, object]]:
    return [{"option": each.option, "times": each.times, "why": dict(each.reasons.most_common())} for each in found]


def agreement(fleet: LocalFleet, boards: Sequence[str], since_s: float, limit_s: float = AGREE_LIMIT_S) -> Agreed:
    """Ask every board for its table until all hold the same one, with a request class in it, or ``limit_s`` is over.

    What boards said to each other before ``since_s`` (monotonic) counts for nothing: a table may be left from before an outage.
    """
    began_s = time.monotonic()
    connections = {board: LocalConnection(fleet.socket_of(board)) for board in boards}
    try:
        while True:
            tables: dict[str, Any] = {board: connection.call("table", timeout_s=10) for board, connection in connections.items()}
            now_s = time.monotonic()
            after_s, digests = now_s - began_s, {board: table["digest"] for board, table in tables.items()}
            told = all(_agree(table["boards"], boards, now_s - since_s) for table in tables.values())
            found = Agreed(digests, len(tables[boards[0]]["entries"]), after_s, told)
            if (found.holds and found.classes) or after_s > limit_s:
                return found
            time.sleep(POLL_S)
    finally:
        for connection in connections.values():
            connection.close()


def _agree(words: Sequence[Mapping[str, Any]], boards: Sequence[str], within_s: float) -> bool:
    """Do the words that a board has heard say that all of ``boards`` agree, and are they fresh?"""
    own, *others = words
    fresh = {each["board"] for each in others if each["agrees"] and each["said_ago_us"] <= within_s * 1e6}
    return {own["board"], *fresh} >= set(boards)
