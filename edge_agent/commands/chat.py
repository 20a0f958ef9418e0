"""``sly chat`` and ``sly sessions``: talk with a language model from the terminal; what talks a board keeps."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from edge_agent.commands.limits import TURN_MS, add_limits
from edge_agent.commands.proof_file import add_receipt

MORE = """\
Without TEXT, a question is read from a terminal again and again, or once from a pipe. Answers go to stdout as they are
made; what they took goes to stderr: tokens a second, how much of the prompt was held already, the size of the session's
KV cache and where it lay. Ctrl-C stops an answer; Ctrl-C or Ctrl-D at the prompt ends the talk.
"""


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    _add_chat(subparsers)
    parser = subparsers.add_parser("sessions", help="the talks that a board keeps", description="The talks that a board keeps.")
    below = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    listing = below.add_parser("list", help="show every session, with its tokens, KV bytes and tier")
    listing.add_argument("--json", action="store_true", help="print JSON")
    listing.set_defaults(run=_list)
    drop = below.add_parser("drop", help="forget a session, its KV and its text")
    drop.add_argument("name", metavar="NAME", help="the session's name, as sly sessions list shows it")
    drop.set_defaults(run=_drop)
    for command in (listing, drop):
        command.add_argument("--socket", type=Path, required=True, metavar="PATH", help="the agent's socket (STATE/agent.sock)")


def _add_chat(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("chat", help="talk with a language model", description=MORE)
    parser.add_argument("text", nargs="*", metavar="TEXT", help="ask this one question and end")
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--socket", type=Path, metavar="PATH", help="the socket of an agent on this machine (STATE/agent.sock)")
    way.add_argument("--url", metavar="URL", help="the HTTP door of a board, e.g. http://kitchen.lan:8080")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="with --url: a file that holds the board's token")
    parser.add_argument(
        "--session", default="", metavar="NAME", help="keep the talk on the board under NAME, and take it up again"
    )
    parser.add_argument("--model", default="", metavar="NAME", help="this language model (default: the board's first)")
    parser.add_argument("--system", default="", metavar="TEXT", help="what the model is told before a new talk")
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N", help="the longest answer (default: 256)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T",
        help="0 for the likeliest words, the same each time (the default), up to 2 for the wildest",
    )  # fmt: skip
    add_limits(parser, TURN_MS)
    add_receipt(parser, "who answered (with --socket)")
    parser.add_argument("--json", action="store_true", help="print each answer, and what it took, as one line of JSON")
    parser.set_defaults(run=_chat)


def _chat(arguments: argparse.Namespace) -> int:
    from edge_agent.commands.conversation import talk

    return talk(arguments)


def _list(arguments: argparse.Namespace) -> int:
    from edge_agent.commands.conversation import for_people, kept_sessions

    sessions = kept_sessions(arguments.socket)
    if arguments.json:
        print(json.dumps([each.as_dict() for each in sessions]))
        return 0
    print(f"{'session':<32} {'tokens':>8} {'KV':>10}  {'tier':<5} {'last used':>12}")
    for each in sessions:
        ago = f"{each.idle_s} s ago"
        print(f"{each.name:<32} {each.tokens:>8} {for_people(each.kv_bytes):>10}  {each.tier:<5} {ago:>12}")
    return 0


def _drop(arguments: argparse.Namespace) -> int:
    from edge_agent.gateway.local import LocalConnection

    with LocalConnection(arguments.socket) as connection:
        connection.call("drop", arguments.name, timeout_s=60)
    return 0
