"""A rollout on a terminal: bars that move while it goes on, one screen when it is over, the past as a table.

Rules: no line is wider than it is shown (``width``); waves that stand alike share a line where there are many; who went back is
said to have gone back; what boards say is shown, not obeyed; where stderr is no terminal each change is one line.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, TextIO

from edge_agent.commands.terminal import WIDTH, clipped, columns, counted, wrapped
from edge_agent.core.printable import on_one_line

MAX_SHOWN = 20
"""Lines on boards that are not well."""
MAX_NAMED = 8
"""Boards that are named one by one in a line."""
MAX_WAVES = 6
"""That have a line each."""
BAR_CHARS = 30
UP = "\x1b[{}A\x1b[J"
"""ECMA-48: so many lines up, then everything below erased."""
QUIET = ("waiting", "confirmed")
GONE = ("stopped", "offline")
WORDS = {"returned": "went back"}
"""What a step is called, where that is not its name."""


class Screen:
    """Shows a rollout on ``stream`` as it goes on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._live = stream, stream.isatty()
        self._lines = 0
        self._last = ""

    def show(self, status: Mapping[str, Any]) -> None:
        if not self._live:
            line = _line(status)
            if line != self._last:
                print(line, file=self._stream, flush=True)
            self._last = line
            return
        lines = [*rollout_lines(status, columns(self._stream)), _given(status)]
        up = UP.format(self._lines) if self._lines else ""
        print(up + "\n".join(lines), file=self._stream, flush=True)
        self._lines = len(lines)

    def end(self, interrupted: bool = False) -> None:
        """Leave what was drawn last behind; what is said next does not begin after the terminal's ``^C``."""
        if interrupted and self._live:
            print(file=self._stream, flush=True)
        self._lines = 0


def rollout_lines(rollout: Mapping[str, Any], width: int = WIDTH) -> list[str]:
    """A rollout: how it stands and why, a bar for each wave that has begun, and who is waited for and not there."""
    lines = head_lines(rollout, width)
    for name, wave in _folded(rollout):
        lines.append(clipped(f"  {name:10} {_wave(wave, rollout['over'])}", width))
    return [*lines, *wrapped(_absent(rollout), "  ", "  ", width)]


def head_lines(rollout: Mapping[str, Any], width: int = WIDTH) -> list[str]:
    """A rollout as a whole."""
    return wrapped(f"rollout of {rollout['model']} {rollout['number']}: {rollout['state']}; {rollout['why']}", "", "  ", width)


def outcome(status: Mapping[str, Any], width: int = WIDTH) -> str:
    """One screen: how a rollout stands, which release serves on how many boards, and every board that is not well."""
    lines = rollout_lines(status, width)
    serves = Counter(each["serves"] for each in status["boards"] if each["heard"])
    said = ", ".join(f"release {number or 'factory'} on {count}" for number, count in sorted(serves.items()))
    unheard = sum(not each["heard"] for each in status["boards"])
    lines.append(clipped(f"  serving: {said or 'nobody has said'}{f'; {unheard} not heard of' if unheard else ''}", width))
    if status.get("given_bytes"):
        lines.append(_given(status))
    odd: dict[str, list[str]] = {}
    for each in status["boards"]:
        if each["step"] not in QUIET:
            odd.setdefault(_said(each, status), []).append(each["board"])
    for text in list(odd)[:MAX_SHOWN]:
        lines += wrapped(f"{_some(odd[text])}: {text}", "  ", "    ", width)
    if len(odd) > MAX_SHOWN:
        more = counted(sum(map(len, list(odd.values())[MAX_SHOWN:])), "board")
        lines.append(f"  and {more} more: --json has all")
    return "\n".join(lines)


def history_table(entries: Sequence[Mapping[str, Any]], width: int = WIDTH, model: str = "") -> str:
    """What was rolled out, only of ``model`` if that is named, a line each."""
    if not entries:
        return f"nothing{' of ' * bool(model)}{on_one_line(model)} was rolled out from this folder yet"
    return "\n".join(clipped(_entry(each), width) for each in entries)


def because(why: str) -> str:
    return f": {why}" if why else ""


def _entry(entry: Mapping[str, Any]) -> str:
    when = datetime.datetime.fromtimestamp(entry["serial"] / 1e6).strftime("%Y-%m-%d %H:%M")
    ordered = f"{entry['action']}{because(entry['reason'])}; nobody has looked on since"
    how = f"{entry['state']}; {entry['why']}" if entry["state"] else ordered
    name = f"{entry['model']} {entry['number']}"
    return f"{when}  {name:24}  {counted(entry['boards'], 'board'):>10}  {how}"


def _said(board: Mapping[str, Any], status: Mapping[str, Any]) -> str:
    """How it is with one board, without the reason that the whole rollout has."""
    percent = f" {board['permille'] // 10} %" if board["step"] == "fetching" else ""
    why = board["why"] if board["why"] != status["why"] else ""
    return f"{WORDS.get(board['step'], board['step'])}{percent}{because(why)}"


def _folded(rollout: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Every wave by its name; where there are more than ``MAX_WAVES``, neighbours that stand alike are one."""
    waves = [{**wave, "at": at, "begun": at <= rollout["wave"]} for at, wave in enumerate(rollout["waves"])]
    if len(waves) <= MAX_WAVES:
        return [(_name(at, at), wave) for at, wave in enumerate(waves)]
    runs = [list(run) for _, run in groupby(waves, lambda wave: _alike(wave))]
    return [(_name(run[0]["at"], run[-1]["at"]), _summed(run)) for run in runs]


def _alike(wave: Mapping[str, Any]) -> object:
    """Waves for which this is the same stand alike: not begun, or confirmed, or back as a whole; others, and the canaries, are
    like no other."""
    count = len(wave["boards"])
    whole = wave["confirmed"] == count or wave["lost"] == count
    if wave["at"] and (whole or not _touched(wave)):
        return wave["begun"], wave["lost"] == 0, wave["under_way"] == 0
    return wave["at"]


def _touched(wave: Mapping[str, Any]) -> bool:
    return bool(wave["begun"] or wave["lost"] or wave["under_way"])


def _summed(waves: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    boards = [board for wave in waves for board in wave["boards"]]
    here = sum(wave["permille"] * len(wave["boards"]) for wave in waves) // len(boards)
    figures = {key: sum(wave[key] for wave in waves) for key in ("confirmed", "settled", "lost", "failed", "under_way")}
    return {**figures, "boards": boards, "permille": here, "begun": waves[0]["begun"]}


def _name(first: int, last: int) -> str:
    if not last:
        return "canaries"
    return f"wave {first}" if first == last else f"waves {first}-{last}"


def _wave(wave: Mapping[str, Any], over: bool) -> str:
    count, failed, back = len(wave["boards"]), wave["failed"], wave["lost"]
    trouble = f", {failed} FAILED" if failed else ""
    if over:
        had = back + wave["under_way"]
        return f"{_bar(1000 * back // had)} {back} of {had} back{trouble}" if had else f"not begun, {counted(count, 'board')}"
    if not _touched(wave):
        return f"not begun, {counted(count, 'board')}"
    trouble += f", {back - failed} went back" if back > failed else ""
    return f"{_bar(wave['permille'])} {wave['permille'] // 10:3d} % here, {wave['confirmed']} of {count} confirmed{trouble}"


def _bar(permille: int) -> str:
    full = BAR_CHARS * permille // 1000
    return f"[{'#' * full}{'-' * (BAR_CHARS - full)}]"


def _awaited(rollout: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The boards for which it waits: of waves that have begun who is not done, or, when it is over, who is not back."""
    if rollout["over"]:
        return [each for each in rollout["boards"] if each["step"] in ("fetching", "trial", "confirmed") and not each["failed"]]
    begun = {board for wave in rollout["waves"][: rollout["wave"] + 1] for board in wave["boards"]}
    return [each for each in rollout["boards"] if each["board"] in begun and each["step"] in ("waiting", "fetching", "trial")]


def _absent(rollout: Mapping[str, Any]) -> str:
    """Who is waited for and is not there; empty if nobody is."""
    absent = [f"{each['board']} ({each['standing']})" for each in _awaited(rollout) if _is_away(each)]
    what = "takes it when it is here" if rollout["state"] == "done" else "waited for"
    return f"{what}: {_some(absent)}" if absent else ""


def _is_away(board: Mapping[str, Any]) -> bool:
    return board["standing"] in GONE or not (board["heard"] or board["standing"] in ("online", "revoked"))


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def _given(status: Mapping[str, Any]) -> str:
    return f"  given from here: {status['given_bytes'] / 1e6:.2f} MB"


def _line(status: Mapping[str, Any]) -> str:
    counts = ", ".join(f"{count} {WORDS.get(step, step)}" for step, count in status["counts"].items())
    absent = _absent(status)
    return f"{status['model']} {status['number']}: {status['state']}; {counts}; {status['why']}{f'; {absent}' if absent else ''}"
