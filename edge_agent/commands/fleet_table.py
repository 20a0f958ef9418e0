"""The agreed table on a terminal: where each class of requests goes, what each board is booked for, and who agrees.

Rules: at most ``WIDTH`` columns; options beyond the shared ones and the next are counted only; JSON keeps them.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from edge_agent.commands.decision_table import milliseconds
from edge_agent.commands.terminal import WIDTH, clipped

MAX_BOARD = 16
SPARE = 1
"""Options without a share that are shown: where the next request would go."""


def fleet_table(report: Mapping[str, Any]) -> str:
    """``report`` is what the agent answers to ``table``."""
    return "\n".join([_headline(report), "", *_entry_lines(report), "", *_booking_lines(report), "", *_agreement_lines(report)])


def who_differs(report: Mapping[str, Any]) -> list[str]:
    """The boards that are there and hold another table, or have not said which."""
    return [each["board"] for each in report["boards"] if each["standing"] == "online" and each["agrees"] is not True]


def _headline(report: Mapping[str, Any]) -> str:
    settled = f"settled in {report['moves']} moves (bound {report['move_bound']})"
    return f"table {report['digest'][:16]}, {report['from']} from facts {report['facts'][:16]}, {settled}"


def _entry_lines(report: Mapping[str, Any]) -> list[str]:
    if not report["entries"]:
        return ["no requests have come in anywhere yet, so nothing is planned"]
    lines = [f"{'asked at':<{MAX_BOARD}} {'/s':>7}  class; where it goes, at what cost"]
    for entry in report["entries"]:
        lines.append(f"{clipped(entry['ingress'], MAX_BOARD):<{MAX_BOARD}} {entry['rate_mhz'] / 1000:>7.2f}  {entry['class']}")
        lines += _indented("; ".join(_ways(entry["options"])) or "nothing may serve it")
    return lines


def _ways(options: Sequence[Mapping[str, Any]]) -> list[str]:
    shared = [option for option in options if option["share_permille"]]
    spare = [option for option in options if not option["share_permille"]]
    ways = [f"{_named(each)} {each['share_permille'] / 10:.0f} % ({_cost(each)})" for each in shared]
    ways += [f"else {_named(each)} ({_cost(each)})" for each in spare[:SPARE]]
    left = len(spare) - SPARE
    return [*ways, *([f"and {left} more"] if left > 0 else [])]


def _cost(option: Mapping[str, Any]) -> str:
    return f"{milliseconds(option['cost_us'])} ms"


def _named(option: Mapping[str, Any]) -> str:
    return f"{option['board']}/{option['model']}"


def _booking_lines(report: Mapping[str, Any]) -> list[str]:
    horizon_us = report["horizon_us"]
    lines = [f"booked, of the next {horizon_us / 1_000_000:g} s, by where it is asked"]
    for booking in report["bookings"]:
        parts = sorted(booking["by_ingress"].items(), key=lambda each: (-each[1], each[0]))
        told = ", ".join(f"{board} {_percent(work_us, horizon_us)}" for board, work_us in parts if work_us)
        whole = _percent(booking["total_us"], horizon_us)
        lines += _indented(f"{clipped(booking['board'], MAX_BOARD):<{MAX_BOARD}} {whole:>7}{': ' if told else ''}{told}", "  ")
    return lines


def _percent(part_us: int, whole_us: int) -> str:
    return f"{100 * part_us / whole_us:.1f} %"


def _agreement_lines(report: Mapping[str, Any]) -> list[str]:
    boards = report["boards"]
    agree = [each["board"] for each in boards if each["agrees"] and each["standing"] == "online"]
    away = [f"{each['board']} ({each['standing']})" for each in boards if each["standing"] != "online"]
    lines = [f"hold this table: {', '.join(agree)}"]
    lines += [f"not there: {', '.join(away)}"] if away else []
    differ = set(who_differs(report))
    lines += [_difference(each) for each in boards if each["board"] in differ]
    return [line for text in lines for line in textwrap.wrap(text, WIDTH, subsequent_indent="  ")]


def _difference(board: Mapping[str, Any]) -> str:
    """What is known of a board that is there and does not hold this table."""
    ago_us = board["said_ago_us"]
    if ago_us is None:
        return f"DIFFERS: {board['board']}: has not said yet which table it holds"
    since = f", for {board['since_us'] / 1_000_000:.1f} s" if board.get("since_us") is not None else ""
    said = f"it said so {ago_us / 1_000_000:.1f} s ago"
    return f"DIFFERS: {board['board']}: {board['why']}{since}; {said}, table {board['digest'][:16]}"


def _indented(text: str, indent: str = " " * (MAX_BOARD + 10)) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
