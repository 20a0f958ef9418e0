"""``sly trust``: how far each board is trusted and why; and what an operator says of one.

Rules: showing asks a board; clearing and revoking sign with the operator's key and leave the word on the broker, so that boards
that are away hear it later; only ``sly trust key`` makes a key, and a word is about a board of the fleet: a slip of the fingers
revokes nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edge_agent.attest.words import OperatorWord
    from edge_agent.core.config import AgentConfig
    from edge_agent.core.cose import Signer

OPERATOR = "operator"
ABOUT = """\
How far each board is trusted, by its evidence and those who appraised it: its trustworthiness vector (AR4SI), what is held
against it, and how old its evidence is. Exit code 1 if a board that is there is contraindicated.
"""
EXAMPLES = """\
sly trust --socket /var/lib/sly/kitchen/agent.sock
sly trust key --key operator.key                                    # once; the line goes into every board's [fleet.operators]
sly trust revoke barn --config kitchen.toml --key operator.key --reason "stolen"
sly trust clear barn --config kitchen.toml --key operator.key --reason "new card, models fetched again"
"""
KEPT = "The word is signed and stays on the broker: boards that are away hear it when they come back."


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    trust = subparsers.add_parser(
        "trust", help="show how far each board is trusted, and why", description=ABOUT, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    trust.add_argument("--socket", type=Path, metavar="PATH", help="the agent's socket (STATE/agent.sock)")
    trust.add_argument("--json", action="store_true", help="print JSON")
    trust.set_defaults(run=_show)
    below = trust.add_subparsers(title="what an operator does", metavar="COMMAND")
    about_key = "show an operator's line for [fleet.operators], making the key if need be"
    key = below.add_parser("key", help=about_key, description=f"{about_key[0].upper()}{about_key[1:]}.")
    key.set_defaults(run=_key)
    clear = below.add_parser(
        "clear", help="forget what is held against a board: new evidence counts", description=f"Nothing else ends a FAIL. {KEPT}"
    )
    revoke = below.add_parser("revoke", help="trust a board no more, whatever it shows", description=KEPT)
    for parser in (clear, revoke):
        parser.add_argument("board", help="the board's id")
        parser.add_argument(
            "--config", type=Path, required=True, metavar="FILE", help="a file that names the broker and the fleet"
        )
        parser.add_argument("--reason", default="", help="for whoever asks later")
        parser.set_defaults(run=_say)
    clear.set_defaults(action="clear")
    revoke.set_defaults(action="revoke")
    for parser in (key, clear, revoke):
        parser.add_argument("--key", type=Path, required=True, metavar="FILE", help="the operator's secret key, mode 0600")
        parser.add_argument("--name", default=OPERATOR, help=f"the operator's name in [fleet.operators] (default: {OPERATOR})")


def _show(arguments: argparse.Namespace) -> int:
    from edge_agent.client import Client
    from edge_agent.commands.trust_table import contraindicated, trust_table
    from edge_agent.core.errors import ConfigError

    if arguments.socket is None:
        raise ConfigError("sly trust", "no --socket", "the path of an agent's socket (STATE/agent.sock)", "see: sly trust --help")
    with Client(arguments.socket) as client:
        report = client.trust()
    print(json.dumps(report) if arguments.json else trust_table(report))
    return 1 if contraindicated(report) else 0


def _key(arguments: argparse.Namespace) -> int:
    from edge_agent.store.identity import load_or_make_seed

    print(f'{arguments.name} = "{_signer(arguments, load_or_make_seed).public_key.hex()}"')
    return 0


def _say(arguments: argparse.Namespace) -> int:
    import asyncio

    from edge_agent.attest.words import Action, OperatorWord, sign_word
    from edge_agent.broker_client import tell_over_broker
    from edge_agent.configured import read_config
    from edge_agent.core.clock import SystemClock
    from edge_agent.store.identity import load_seed
    from edge_agent.transport.link import Message
    from edge_agent.transport.topics import Topics

    config, signer = read_config(arguments.config), _signer(arguments, load_seed)
    word = OperatorWord(arguments.name, arguments.board, SystemClock().wall_us(), Action(arguments.action), arguments.reason)
    _must_be_a_member(word.board, config)
    _must_be_known(word, signer, config.fleet.operators.get(arguments.name, ""))
    message = Message(Topics(config.fleet.name).word(word.board), sign_word(word, signer), retain=True)
    asyncio.run(tell_over_broker(config, message))
    print(f"{word.board}: {word.action.value}, said to the fleet {config.fleet.name} by {word.operator} as {word.serial}")
    return 0


def _must_be_a_member(board: str, config: AgentConfig) -> None:
    from edge_agent.core.errors import ConfigError

    members = {config.board.id, *config.fleet.members}
    if board not in members:
        allowed = f"a board of [fleet.members]: {', '.join(sorted(members))}"
        raise ConfigError("sly trust, board", board, allowed)


def _must_be_known(word: OperatorWord, signer: Signer, key: str) -> None:
    from edge_agent.core.errors import ConfigError

    if key != signer.public_key.hex():
        line = f'{word.operator} = "{signer.public_key.hex()}"'
        got = "another key" if key else "no such operator"
        raise ConfigError(f"[fleet.operators] {word.operator}", got, line, "the boards believe only operators that they know")


def _signer(arguments: argparse.Namespace, seed: Callable[[Path], bytes]) -> Signer:
    from edge_agent.core.cose import Signer
    from edge_agent.core.values import BOARD_ID, checked

    return Signer(checked(BOARD_ID, "--name", arguments.name).encode(), seed(arguments.key))
