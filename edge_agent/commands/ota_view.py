"""A rollout on a terminal: bars that move while it goes on, one screen when it is over, the past as a table.

Rules: at most ``WIDTH`` columns; what boards say is shown, not obeyed; where stderr is no terminal each change is one line.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from edge_agent.commands.fleet_view import rollout_lines
from edge_agent.commands.terminal import WIDTH, clipped, wrapped

MAX_SHOWN = 20
"""Boards that are named one by one."""
UP = "\x1b[{}A\x1b[J"
"""ECMA-48: so many lines up, then everything below erased."""
QUIET = ("waiting", "confirmed")


class Screen:
    """Shows a rollout on ``stream`` as it goes on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._live = stream, stream.isatty()
        self._lines = 0
        self._last = ""

    def show(self, status: Mapping[str, Any]) -> None:
        lines = [*rollout_lines(status), _given(status)]
        if not self._live:
            line = _line(status)
            if line != self._last:
                print(line, file=self._stream, flush=True)
            self._last = line
            return
        up = UP.format(self._lines) if self._lines else ""
        print(up + "\n".join(lines), file=self._stream, flush=True)
        self._lines = len(lines)

    def end(self) -> None:
        """Leave what was drawn last behind."""
        self._lines = 0


def outcome(status: Mapping[str, Any]) -> str:
    """One screen: how a rollout stands, which release serves on how many boards, and every board that is not well."""
    lines = rollout_lines(status)
    serves = Counter(each["serves"] for each in status["boards"] if each["heard"])
    said = ", ".join(f"release {number or 'factory'} on {count}" for number, count in sorted(serves.items()))
    unheard = sum(not each["heard"] for each in status["boards"])
    lines.append(f"  serving: {said or 'nobody has said'}{f'; {unheard} not heard of' if unheard else ''}")
    if status.get("given_bytes"):
        lines.append(_given(status))
    odd = [each for each in status["boards"] if each["step"] not in QUIET]
    for each in odd[:MAX_SHOWN]:
        step = f"{each['step']} {each['permille'] // 10} %" if each["step"] == "fetching" else each["step"]
        lines += wrapped(f"{each['board']}: {step}{': ' * bool(each['why'])}{each['why']}", "  ", "    ")
    if len(odd) > MAX_SHOWN:
        lines.append(f"  and {len(odd) - MAX_SHOWN} more: --json has all")
    return "\n".join(lines)


def history_table(entries: Sequence[Mapping[str, Any]]) -> str:
    """What was rolled out, a line each."""
    if not entries:
        return "nothing was rolled out from this folder yet"
    return "\n".join(clipped(_entry(each), WIDTH) for each in entries)


def _entry(entry: Mapping[str, Any]) -> str:
    when = datetime.datetime.fromtimestamp(entry["serial"] / 1e6).strftime("%Y-%m-%d %H:%M")
    how = entry["state"] or "not looked at since"
    reason = f" ({entry['reason']})" if entry["reason"] else ""
    name = f"{entry['model']} {entry['number']}"
    return f"{when}  {name:28}  {entry['boards']:4} boards  {entry['action']}{reason}: {how}; {entry['why']}".rstrip("; ")


def _given(status: Mapping[str, Any]) -> str:
    return f"  given from here: {status['given_bytes'] / 1e6:.2f} MB"


def _line(status: Mapping[str, Any]) -> str:
    counts = ", ".join(f"{count} {step}" for step, count in status["counts"].items())
    return f"{status['model']} {status['number']}: {status['state']}; {counts}; {status['why']}"
