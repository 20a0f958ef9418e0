"""``sly self-test``: what a board finds when it looks at itself, without an agent: what a person at the board types first.

Rules: nothing is made or changed on the board, so that it may run beside an agent, and by anybody who may read the files; exit
code 1 if a check fails.  Models are checked as files (there, whole, loadable), the broker by one connection.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from board_support.board import Board, BoardSettings
    from edge_agent.attest.self_test import Check
    from edge_agent.core.config import AgentConfig

ABOUT = """\
Checks the runtime in its sandbox, the models, the board, clock, disk, keys, certificate, broker and user, beside an agent or
without one, and says what to do. Exit code 1 if a check fails."""
SOCKET_LIMIT_S = 2.0


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("self-test", help="check this board, and say what to do", description=ABOUT)
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="the agent's TOML file")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    import asyncio
    from dataclasses import asdict

    from edge_agent.attest.self_test import Verdict, worst
    from edge_agent.commands.fleet_view import check_lines
    from edge_agent.commands.terminal import columns
    from edge_agent.configured import read_config
    from edge_agent.shell.examination import in_order

    config = read_config(arguments.config)
    found = in_order(asyncio.run(_found(config)))
    verdict, agent_runs = worst(found), _agent_runs(config)
    told = [asdict(each) for each in found]
    if arguments.json:
        report = {"board": config.board.id, "verdict": verdict.value, "agent_runs": agent_runs, "checks": told}
        print(json.dumps(report, indent=2))
    else:
        beside = "beside the agent that runs here" if agent_runs else "no agent answers here"
        print(f"{config.board.id}: {verdict.name} ({beside})")
        print("\n".join(check_lines(told, columns(sys.stdout))))
    return 1 if verdict is Verdict.FAIL else 0


async def _found(config: AgentConfig) -> list[Check]:
    import asyncio

    from edge_agent.configured import engine_settings
    from edge_agent.core.clock import SystemClock
    from edge_agent.shell.examination import answer_checks, disk_check, machine_checks
    from edge_agent.shell.known_answer import ask_known_answer
    from edge_agent.shell.looking import takes_a_write

    board = _board(config)
    delegate = await asyncio.to_thread(board.delegate)
    asked = await ask_known_answer(engine_settings(config), delegate)
    return [
        *answer_checks(asked),
        await _models(config, board),
        *machine_checks(config, board, SystemClock()),
        disk_check(config, takes_a_write(config.state.folder) if config.state.folder.is_dir() else ""),
        await _broker(config),
    ]


def _board(config: AgentConfig) -> Board:
    """The configured one, here or not; without a device root, whose key only an agent makes."""
    from board_support.board import BoardSettings
    from board_support.registry import AUTO, board_classes, open_board
    from edge_agent.core.errors import UnavailableError

    settings = BoardSettings(profile=config.board.profile)
    kinds = {kind.backend: kind for kind in board_classes()}
    if config.board.backend in kinds:
        return kinds[config.board.backend](settings)
    try:
        return open_board(config.board.backend, settings)
    except UnavailableError as error:
        if config.board.backend != AUTO:
            raise
        return _none_here(settings, error.reason)


def _none_here(settings: BoardSettings, reason: str) -> Board:
    from board_support.board import Board as AnyBoard
    from board_support.board import BoardInfo, Sensors, Unavailable
    from board_support.roofline import Profile, load_profile

    class NoBoard(AnyBoard):
        """None of the kinds that are known is here; the rest of the machine can be looked at all the same."""

        backend = "auto"

        @property
        def profile(self) -> Profile:
            return load_profile("raspberry_pi_5")

        def probe(self) -> BoardInfo | Unavailable:
            return Unavailable(self.backend, (reason,))

        def read_sensors(self, now_us: int) -> Sensors:
            return Sensors()

    return NoBoard(settings)


async def _models(config: AgentConfig, board: Board) -> Check:
    """Each model that is to be served: its files are whole, and a picture model loads."""
    from edge_agent.shell.checks import models

    sound, wrong = [], {}
    for name in config.models.serve:
        if why := await _why_not(config, board, name):
            wrong[name] = why
        else:
            sound.append(name)
    return models(config.models.serve, sound, wrong)


async def _why_not(config: AgentConfig, board: Board, name: str) -> str:
    import asyncio
    from dataclasses import replace

    from edge_agent.configured import engine_settings
    from edge_agent.core.errors import SlyError
    from edge_agent.hosting import check_there, language_models, model_files, models_folder
    from edge_agent.runtime.sandbox import Sandbox

    alone = replace(config, models=replace(config.models, serve=(name,)))
    try:
        check_there(config, name)
        for language in language_models(alone).values():
            for entry in language.entries():
                await asyncio.to_thread(_must_be, models_folder(config) / entry.filename, entry.sha256)
        for card, path in model_files(alone).values():
            await asyncio.to_thread(_must_be, path, card.source.sha256)
            with path.open("rb") as file:
                digest = bytes.fromhex(card.source.sha256)
                sandbox = await Sandbox.start(name, file.fileno(), digest, engine_settings(config), board.delegate(), card)
            await sandbox.close()
    except SlyError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename or name}: {error.strerror or error}"
    return ""


def _must_be(path: Path, digest: str) -> None:
    import hashlib

    from edge_agent.core.errors import RefusedError

    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != digest:
        raise RefusedError(f"model file {path}", f"bytes of SHA-256 {found[:16]}", digest[:16])


async def _broker(config: AgentConfig) -> Check:
    import os

    from edge_agent.configured import broker_address
    from edge_agent.core.errors import SlyError
    from edge_agent.shell import checks
    from edge_agent.transport.mqtt import check as check_link

    if not config.broker.host:
        return checks.broker("", False, "")
    try:
        address = broker_address(config)
        await check_link(address, f"sly-{config.board.id}-self-test-{os.urandom(4).hex()}")
    except SlyError as error:
        return checks.broker(config.broker.host, False, str(error))
    return checks.broker(str(address), True, "")


def _agent_runs(config: AgentConfig) -> bool:
    """Whether an agent answers on the socket of the state folder."""
    import socket

    from edge_agent.shell.door import SOCKET_NAME

    try:
        with socket.socket(socket.AF_UNIX) as asking:
            asking.settimeout(SOCKET_LIMIT_S)
            asking.connect(str(config.state.folder / SOCKET_NAME))
    except OSError:
        return False
    return True
