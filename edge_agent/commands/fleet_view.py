"""The fleet on a terminal: its boards as tables, and as single lines for a log; a rollout is drawn by ``ota_view``.

Rules: no line is wider than it is shown (``width``); what boards say is shown, not obeyed; JSON keeps what is left out here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edge_agent.commands.ota_view import WORDS, because, head_lines, rollout_lines
from edge_agent.commands.terminal import WIDTH, clipped, wrapped
from edge_agent.core.printable import on_one_line

MAX_BOARD, MAX_GROUPS, MAX_MODELS, MAX_TRUST = 20, 36, 36, 24
MIN_LAST = 16
MAX_VERDICT, MAX_CHECK = 4, 12
ENDORSED = {"": "no", "tpm": "by its TPM", "emulated": "by the root of an emulated board, which proves nothing"}
LOUD = ("contraindicated", "failed", "refused")


def charter_table(boards: Sequence[Mapping[str, Any]], width: int = WIDTH) -> str:
    """What ``sly fleet list`` shows: the registry, without asking anybody."""
    if not boards:
        return "no board is enrolled yet: see sly fleet enroll --help"
    heads = ("board", "backend", "groups", "key", "state")
    rows = [
        (each["board"], each["backend"] or "auto", ", ".join(each["groups"]) or "-", each["key"][:16], _state(each))
        for each in boards
    ]
    return "\n".join(_table(heads, rows, (MAX_BOARD, 16, MAX_GROUPS, 16), width))


def watch_table(status: Mapping[str, Any], width: int = WIDTH) -> str:
    """What ``sly fleet watch`` shows: every board in a line, every rollout below, in one line those that are done."""
    heads = ("board", "standing", "trust", "release", "update and notes")
    rows = [_watched(each) for each in status["boards"]]
    there = sum(each["standing"] == "online" and not each["revoked"] for each in status["boards"])
    first = (
        f"fleet {status['fleet']}: {there} of {len(rows)} boards online; charter {status['charter']}; broker: {status['broker']}"
    )
    lines = [clipped(on_one_line(first), width), ""]
    lines += _table(heads, rows, (MAX_BOARD, 12, MAX_TRUST, MAX_MODELS), width) if rows else ["no board is enrolled yet"]
    for rollout in status["rollouts"]:
        lines += ["", *(head_lines if rollout["state"] == "done" else rollout_lines)(rollout, width)]
    return "\n".join(lines)


def watch_line(board: Mapping[str, Any]) -> str:
    """One board on one line, for a log."""
    return on_one_line(" | ".join(cell for cell in _watched(board) if cell))


def board_page(board: Mapping[str, Any], width: int = WIDTH) -> str:
    """What ``sly fleet show`` shows of one board."""
    said = {
        "state": _state(board), "standing": board.get("standing"), "hardware": _hardware(board), "agent": board.get("agent"),
        "backend": board["backend"] or "auto", "groups": ", ".join(board["groups"]) or "none", "key": board["key"],
        "endorsed": ENDORSED[board["endorsed"]], "trust": _trust(board), "note": board.get("note"),
    }  # fmt: skip
    lines = [board["board"]]
    for name, value in said.items():
        if value:
            lines += wrapped(f"{name}: {value}", "  ", "  ", width)
    lines += _self_test_lines(board, width)
    for slots in board.get("models", ()):
        lines += wrapped(f"release: {_release(slots)}{because(slots['why'])}", "  ", "  ", width)
    for update in board.get("updates", ()):
        lines += wrapped(f"update: {_update(update)}", "  ", "  ", width)
    for word in (board.get("trust") or {}).get("said", ()):
        lines += wrapped(f"{word['verifier']} says: {word['tier']}{because('; '.join(word['reasons']))}", "  ", "  ", width)
    return "\n".join(lines)


def trust_lines(boards: Sequence[Mapping[str, Any]], width: int = WIDTH) -> str:
    """What ``sly fleet trust`` shows: each board's tiers, and what is held against it."""
    lines = []
    for board in boards:
        lines.append(clipped(f"{board['board']:<{MAX_BOARD}}  {_trust(board) or 'nobody has said anything'}", width))
        reasons: dict[str, list[str]] = {}
        for word in board["trust"]["said"]:
            for reason in word["reasons"]:
                reasons.setdefault(reason, []).append(word["verifier"])
        for reason, verifiers in reasons.items():
            lines += wrapped(f"- {reason} (says {', '.join(verifiers)})", "    ", "  ", width)
    return "\n".join(lines)


def _watched(board: Mapping[str, Any]) -> tuple[str, ...]:
    releases = ", ".join(_release(each) for each in board["models"]) or ", ".join(board["offers"]) or "-"
    runs = {each["model"]: each["running"] for each in board["models"]}
    notes = [_update(each) for each in board["updates"] if not _is_quiet(each, runs)]
    notes += [f"REVOKED: {board['revoked']}"] if board["revoked"] else []
    notes += [board["note"]] if board["note"] else []
    notes += _failing(board)
    return board["board"], "revoked" if board["revoked"] else board["standing"], _trust(board) or "-", releases, "; ".join(notes)


def _failing(board: Mapping[str, Any]) -> list[str]:
    """The checks of the self-test of the board's last boot that fail, in a line each."""
    test = board.get("self_test")
    failing = [each for each in test["checks"] if each["verdict"] == "fail"] if test and test["current"] else []
    return [f"self-test: {each['name']}: {each['what']}; {each['remedy']}" for each in failing]


def _self_test_lines(board: Mapping[str, Any], width: int) -> list[str]:
    test = board.get("self_test")
    if not test:
        return []
    when = f"of boot {test['boot_epoch']}" + ("" if test["current"] else ", an earlier one: it has not told of this one yet")
    first = wrapped(f"self-test: {test['verdict'].upper()}, {when}", "  ", "  ", width)
    return [*first, *(f"    {line}" for line in check_lines(test["checks"], width - 4))]


def check_lines(checks: Sequence[Mapping[str, Any]], width: int = WIDTH) -> list[str]:
    """Checks of a board's self-test as a small table: verdict, name, what was found, and below it what to do."""
    indent = " " * (MAX_VERDICT + MAX_CHECK + 2)
    lines = []
    for check in checks:
        head = f"{check['verdict'].upper():<{MAX_VERDICT}} {clipped(on_one_line(check['name']), MAX_CHECK):<{MAX_CHECK}} "
        what, *more = wrapped(check["what"], indent, "", width) or [indent]
        lines += [(head + what[len(indent) :]).rstrip(), *more]
        if check["remedy"]:
            lines += wrapped(f"-> {check['remedy']}", indent, "   ", width)
    return lines


def _is_quiet(update: Mapping[str, Any], runs: Mapping[str, int]) -> bool:
    """Does the column of releases say it already, or did it never begin and never will?"""
    if update["step"] == "confirmed":
        return runs.get(update["model"]) == int(update["number"])
    return bool(update["step"] == "waiting" and update["over"])


def _release(slots: Mapping[str, Any]) -> str:
    number = slots["running"] or "factory"
    beside = f" > {slots['candidate']} {slots['state']}" if slots["candidate"] else ""
    return f"{slots['model']} {number}{beside}"


def _update(update: Mapping[str, Any]) -> str:
    step = update["step"].upper() if update["step"] in LOUD else WORDS.get(update["step"], update["step"])
    percent = f" {update['permille'] // 10} %" if update["step"] == "fetching" else ""
    return f"{update['model']} {update['number']} {step}{percent}{because(update['why'])}"


def _trust(board: Mapping[str, Any]) -> str:
    tiers = (board.get("trust") or {}).get("tiers", {})
    return ", ".join(f"{tier.upper() if tier in LOUD else tier} {count}" for tier, count in tiers.items())


def _state(board: Mapping[str, Any]) -> str:
    return f"REVOKED: {board['revoked']}" if board["revoked"] else "enrolled"


def _hardware(board: Mapping[str, Any]) -> str:
    text = board.get("hardware") or ""
    return f"{text} (emulated)" if text and board.get("emulated") else text


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], most: Sequence[int], width: int) -> list[str]:
    """Columns as wide as what is in them where there is room, else up to ``most``, else less, the widest first; the last one has
    the rest of the line."""
    shown = [heads, *([on_one_line(cell) for cell in row] for row in rows)]
    needed = [max(len(row[at]) for row in shown) for at in range(len(heads))]
    widths = [min(limit, need) for limit, need in zip(most, needed, strict=False)]

    def left() -> int:
        return width - sum(widths) - 2 * len(widths)

    for at, need in enumerate(needed[:-1]):
        widths[at] += max(0, min(need - widths[at], left() - needed[-1]))
    while left() < min(needed[-1], MIN_LAST):
        widths[widths.index(max(widths))] -= 1
    lines = []
    for row in shown:
        cells = [f"{clipped(cell, column):<{column}}" for cell, column in zip(row, widths, strict=False)]
        lines.append("  ".join([*cells, clipped(row[-1], left())]).rstrip())
    return lines
