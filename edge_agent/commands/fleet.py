"""``sly status`` and ``sly explain``: what a board knows of the fleet, and why a request went where it went."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    status = subparsers.add_parser("status", help="show the fleet as one board sees it")
    explain = subparsers.add_parser("explain", help="show why a request went where it went")
    explain.add_argument("request", help="the request's id, as sly ask prints it")
    for parser, run in ((status, _status), (explain, _explain)):
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


def _asked(socket: Path, verb: str, body: object = None) -> Any:
    from edge_agent.gateway.local import LocalConnection

    with LocalConnection(socket) as connection:
        return connection.call(verb, body, timeout_s=10)


def _status_table(report: dict[str, Any]) -> str:
    lines = [f"{'board':<16} {'standing':<10} {'queue ms':>9} {'°C':>6}  {'hardware':<40} models"]
    for board in report["boards"]:
        heat = board["temperature_mdegc"]
        lines.append(
            f"{board['board']:<16} {board['standing']:<10} {board['queue_us'] / 1000:>9.1f} "
            f"{'-' if heat is None else f'{heat / 1000:.1f}':>6}  {board['hardware']:<40} {', '.join(board['models'])}"
        )
    lines.append(f"broker: {report['link']}; pending here: {report['pending']}")
    lines += [f"withdrawn: {model}: {reason}" for model, reason in report["withdrawn"].items()]
    return "\n".join(lines)
