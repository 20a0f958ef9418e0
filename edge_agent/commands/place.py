"""``sly place --dry-run``: where a request would go, without sending it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from edge_agent.commands.limits import TURN_MS, add_limits

CHAT = "chat"
PICTURE_BYTES, TURN_BYTES = 64 * 2**10, 2**10
PICTURE_MS = 10_000
MORE = """\
Prints what sly explain prints of a request that was sent: every option with its cost taken apart, every excluded one with the
filter that took it out, and why the first one would win. Nothing is sent, counted or remembered.
"""


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("place", help="show where a request would go, without sending it", description=MORE)
    parser.add_argument("--dry-run", action="store_true", help="needed: requests are sent with sly ask and sly chat")
    parser.add_argument("--socket", type=Path, required=True, metavar="PATH", help="the agent's socket (STATE/agent.sock)")
    parser.add_argument("--task", required=True, help="what is wanted: detect_faces, classify, chat ... (see: sly models list)")
    parser.add_argument("--model", default="", help="this model and no other")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--size-bytes", type=int, metavar="N", help="of the picture, or of the encoded turn (default: 65536, for chat 1024)"
    )
    size.add_argument("--picture", type=Path, metavar="FILE", help="as large as this picture")
    add_limits(parser, None, "10000, for chat 600000")
    parser.add_argument("--session", default="", metavar="NAME", help="with --task chat: the session that the turn belongs to")
    parser.add_argument("--tokens", type=int, default=0, metavar="N", help="with --task chat: the longest answer, in tokens")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_place)


def _place(arguments: argparse.Namespace) -> int:
    from edge_agent.commands.decision_table import decision_table
    from edge_agent.commands.limits import limits_of
    from edge_agent.core.errors import ConfigError
    from edge_agent.gateway.local import LocalConnection

    if not arguments.dry_run:
        remedy = "sly ask sends a picture and sly chat a turn; sly place --dry-run sends nothing"
        raise ConfigError("sly place", "no --dry-run", "--dry-run", remedy)
    talks = arguments.task == CHAT
    if not talks and (arguments.session or arguments.tokens):
        raise ConfigError("--session and --tokens", f"with --task {arguments.task}", "with --task chat")
    if arguments.deadline_ms is None:
        arguments.deadline_ms = TURN_MS if talks else PICTURE_MS
    limits = limits_of(arguments)
    body = {
        "task": arguments.task,
        "model": arguments.model,
        "size_bytes": _size_bytes(arguments),
        "deadline_us": limits.deadline_us,
        "quality_permille": limits.quality_permille,
        "energy_uj": limits.energy_uj or 0,
        "trust": arguments.trust,
        "data": arguments.data,
        "session": arguments.session,
        "answer_tokens": arguments.tokens,
    }
    with LocalConnection(arguments.socket) as connection:
        report: Any = connection.call("place", body, timeout_s=10)
    if arguments.json:
        print(json.dumps(report))
    else:
        print("\n".join([decision_table(report), *([f"it would be refused: {report['refused']}"] if report["refused"] else [])]))
    return 0


def _size_bytes(arguments: argparse.Namespace) -> int:
    from edge_agent.client import read_picture

    if arguments.picture is not None:
        return len(read_picture(arguments.picture))
    default_bytes = TURN_BYTES if arguments.task == CHAT else PICTURE_BYTES
    return default_bytes if arguments.size_bytes is None else int(arguments.size_bytes)
