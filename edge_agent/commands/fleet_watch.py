"""``sly fleet list``, ``show``, ``watch`` and ``trust``: the fleet as its operator sees it.

Rules: what the charter says needs no broker; the table is drawn again when something was heard, at most ``REDRAW_S`` apart; where
stdout is no terminal each change is a line; Ctrl-C ends it with exit code 0.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from edge_agent.commands.fleet_folder import brought, opened, remind, say, told, with_folder
from edge_agent.commands.terminal import columns

if TYPE_CHECKING:
    from edge_agent.steward.folder import OperatorFolder
    from edge_agent.steward.session import OperatorSession

REDRAW_S = 0.25
CLEAR = "\x1b[H\x1b[2J"
"""ECMA-48: the cursor to its home, then everything erased."""
TRUST = "How far verifiers trust each board, and why. Exit code 1 if anybody holds a board of the charter for contraindicated."
CLEAR_ABOUT = "What was held against a board until now is forgotten; new evidence counts. Nothing else ends a FAIL."


def add(below: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    listed = below.add_parser("list", help="list the boards of the charter", description="Without asking anybody.")
    with_folder(listed)
    listed.set_defaults(run=_list)
    show = below.add_parser("show", help="show one board", description="What the charter has of it, and what it says of itself.")
    show.add_argument("board", help="the board's id")
    with_folder(show)
    show.set_defaults(run=_show)
    watch = below.add_parser("watch", help="watch boards and rollouts, live", description="Ctrl-C ends it.")
    watch.add_argument("--once", action="store_true", help="print it once and end")
    with_folder(watch)
    watch.set_defaults(run=_watch)
    trust = below.add_parser("trust", help="show how far each board is trusted, or clear one", description=TRUST)
    with_folder(trust)
    trust.set_defaults(run=_trust)
    verbs = trust.add_subparsers(title="commands", metavar="COMMAND")
    clear = verbs.add_parser("clear", help="forget what is held against a board", description=CLEAR_ABOUT)
    clear.add_argument("board", help="the board's id")
    clear.add_argument("--reason", default="", help="for whoever asks later")
    with_folder(clear)
    clear.set_defaults(run=_clear)


def _list(arguments: argparse.Namespace) -> int:
    from edge_agent.commands.fleet_view import charter_table
    from edge_agent.steward.status import charter_status

    folder = opened(arguments)
    charter = folder.charter
    boards = charter_status(charter)
    remind(folder)
    report = {"fleet": charter.fleet, "charter": charter.serial, "boards": boards}
    return told(arguments, report, charter_table(boards, columns(sys.stdout)))


def _show(arguments: argparse.Namespace) -> int:
    import asyncio

    from edge_agent.commands.fleet_view import board_page
    from edge_agent.core.errors import SlyError
    from edge_agent.steward.enrolling import known
    from edge_agent.steward.status import charter_status

    folder = opened(arguments)
    known(folder.charter, arguments.board)
    try:
        boards = asyncio.run(_heard(folder))["boards"]
    except SlyError as error:
        say(f"only what the charter says: {error}")
        boards = charter_status(folder.charter)
    board = next(each for each in boards if each["board"] == arguments.board)
    return told(arguments, board, board_page(board, columns(sys.stdout)))


def _watch(arguments: argparse.Namespace) -> int:
    import asyncio

    from edge_agent.commands.fleet_view import watch_table

    folder = opened(arguments)
    if arguments.once:
        status = asyncio.run(_heard(folder))
        return told(arguments, status, watch_table(status, columns(sys.stdout)))
    asyncio.run(_watch_until_told(folder, arguments.json))
    return 0


def _trust(arguments: argparse.Namespace) -> int:
    import asyncio

    from edge_agent.commands.fleet_view import trust_lines

    folder = opened(arguments)
    boards = asyncio.run(_heard(folder))["boards"]
    told(arguments, {"fleet": folder.settings.name, "boards": boards}, trust_lines(boards, columns(sys.stdout)))
    return 1 if any("contraindicated" in each["trust"]["tiers"] and not each["revoked"] for each in boards) else 0


def _clear(arguments: argparse.Namespace) -> int:
    from edge_agent.attest.words import Action
    from edge_agent.core.errors import RefusedError
    from edge_agent.steward.enrolling import check_reason, known

    folder = opened(arguments)
    board, reason = arguments.board, check_reason(arguments.reason)
    if revoked := known(folder.charter, board).revoked:
        raise RefusedError(f"board {board}", f"revoked: {revoked}", "a board of the fleet", "let it in: sly fleet enroll --again")
    word = folder.say_of(board, Action.CLEAR, reason)
    report = {"board": board, "word": word.serial} | brought(folder)
    return told(arguments, report, f"{board} is cleared: new evidence counts")


async def _heard(folder: OperatorFolder) -> dict[str, Any]:
    from edge_agent.steward.status import fleet_status

    async with _session(folder) as session:
        return fleet_status(session)


async def _watch_until_told(folder: OperatorFolder, as_json: bool) -> None:
    """Until SIGINT or SIGTERM. Raises ``SlyError`` if the broker is not there when it begins; later that is shown."""
    import asyncio

    loop, ending = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ending.set)
    async with _session(folder) as session:
        watching, told_to_end = asyncio.create_task(_watch_session(session, as_json)), asyncio.create_task(ending.wait())
        await asyncio.wait((watching, told_to_end), return_when=asyncio.FIRST_COMPLETED)
        told_to_end.cancel()
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching


async def _watch_session(session: OperatorSession, as_json: bool) -> None:
    import asyncio

    from edge_agent.steward.status import fleet_status

    shown: dict[str, Any] = {}
    seen = 0
    while True:
        status = fleet_status(session)
        if status != shown:
            _draw(status, shown, as_json)
            shown = status
        seen = await session.news(seen)
        await asyncio.sleep(REDRAW_S)


def _session(folder: OperatorFolder) -> OperatorSession:
    from edge_agent.steward.session import HEARD
    from edge_agent.transport.topics import Kind

    return folder.session(kinds=(*HEARD, Kind.APPRAISAL))


def _draw(status: dict[str, Any], shown: dict[str, Any], as_json: bool) -> None:
    from edge_agent.commands.fleet_view import watch_line, watch_table
    from edge_agent.commands.ota_view import rollout_lines

    if as_json:
        print(json.dumps(status), flush=True)
    elif sys.stdout.isatty():
        print(f"{CLEAR}{watch_table(status, columns(sys.stdout))}", flush=True)
    else:
        before = {each["board"]: each for each in shown.get("boards", ())}
        for board in status["boards"]:
            if not before or watch_line(board) != watch_line(before.get(board["board"], board | {"standing": ""})):
                print(watch_line(board), flush=True)
        for rollout in status["rollouts"]:
            if rollout not in shown.get("rollouts", ()):
                print("\n".join(rollout_lines(rollout)), flush=True)
