"""``sly status``, ``sly explain`` and ``sly fleet table``: what a board knows of the fleet, and why a request went where it went.

Owns the parser of ``sly fleet``; what an operator does is in ``fleet_setup``, ``fleet_change`` and ``fleet_watch``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from edge_agent.commands import fleet_change, fleet_setup, fleet_traffic, fleet_watch
from edge_agent.commands.terminal import WIDTH, clipped

MAX_BOARD, MAX_HARDWARE = 20, 36
NUMBERS = (2, 3, 5)
"""Columns of ``sly status`` that hold figures."""
FLEET = """\
What an operator does: make a fleet and its keys, let boards in and put them out, look at all of them at once.
"""
EXAMPLES = """\
sly fleet init ~/fleet --name home --broker-host 192.168.1.10
export SLY_FLEET=~/fleet
mosquitto -c ~/fleet/broker/mosquitto.conf                  # as sly fleet broker says
sly fleet enroll kitchen --backend raspberry_pi --group indoors --serve blazeface-short
sly fleet watch
sly fleet revoke barn --reason stolen
"""
TABLE = """\
The table that the boards have agreed on: where requests of each class go that come in at each board, for how much of the coming
seconds each board is booked, and which boards hold the same table. Exit code 0: all boards that are there hold it; 1: one holds
another, or has said nothing.
"""


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    status = subparsers.add_parser("status", help="show the fleet as one board sees it")
    explain = subparsers.add_parser("explain", help="show why a request went where it went")
    explain.add_argument("request", help="the request's id, as sly ask prints it; or: last, the one placed last here")
    fleet = subparsers.add_parser(
        "fleet", help="make a fleet, enroll its boards, watch it", description=FLEET, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    below = fleet.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for room in (fleet_setup, fleet_watch, fleet_change, fleet_traffic):
        room.add(below)
    table = below.add_parser("table", help="show the agreed table, and who holds another one", description=TABLE)
    for parser, run in ((status, _status), (explain, _explain), (table, _table)):
        parser.add_argument("--socket", type=Path, required=True, metavar="PATH", help="the agent's socket (STATE/agent.sock)")
        parser.add_argument("--json", action="store_true", help="print JSON")
        parser.set_defaults(run=run)


def _status(arguments: argparse.Namespace) -> int:
    report = _asked(arguments.socket, "status")
    print(json.dumps(report) if arguments.json else _status_table(report))
    return 0


def _explain(arguments: argparse.Namespace) -> int:
    from edge_agent.commands.decision_table import decision_table

    report = _asked(arguments.socket, "explain", arguments.request)
    print(json.dumps(report) if arguments.json else decision_table(report))
    return 0


def _table(arguments: argparse.Namespace) -> int:
    from edge_agent.commands.fleet_table import fleet_table, who_differs

    report = _asked(arguments.socket, "table")
    print(json.dumps(report) if arguments.json else fleet_table(report))
    return 1 if who_differs(report) else 0


def _asked(socket: Path, verb: str, body: object = None) -> Any:
    from edge_agent.gateway.local import LocalConnection

    with LocalConnection(socket) as connection:
        return connection.call(verb, body, timeout_s=10)


def _status_table(report: dict[str, Any]) -> str:
    heads = ("board", "standing", "queue ms", "°C, in 60 s", "trust", "asked /s", "hardware", "models")
    rows = [_status_row(board) for board in report["boards"]]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    widths[0] = min(widths[0], MAX_BOARD)
    left = WIDTH - sum(widths[:-2]) - 2 * (len(widths) - 1)
    widths[-2] = min(widths[-2], MAX_HARDWARE, left // 2)
    widths[-1] = left - widths[-2]
    lines = []
    for row in (heads, *rows):
        cells = [clipped(cell, width) for cell, width in zip(row, widths, strict=True)]
        aligned = (f"{c:>{w}}" if at in NUMBERS else f"{c:<{w}}" for at, (c, w) in enumerate(zip(cells, widths, strict=True)))
        lines.append("  ".join(aligned).rstrip())
    lines.append(f"broker: {report['link']}; pending here: {report['pending']}")
    lines += [f"withdrawn: {model}: {reason}" for model, reason in report["withdrawn"].items()]
    return "\n".join(lines)


def _status_row(board: dict[str, Any]) -> tuple[str, ...]:
    heat, forecast = board["temperature_mdegc"], board["forecast_mdegc"]
    warmth = "-" if heat is None else f"{heat / 1000:.1f}"
    if forecast is not None:
        warmth += f" -> {forecast[-1] / 1000:.1f}"
    queue, demand = f"{board['queue_us'] / 1000:.1f}", f"{board['demand_mhz'] / 1000:.1f}"
    models = ", ".join(board["models"])
    return board["board"], board["standing"], queue, warmth, board["trust"], demand, board["hardware"], models
