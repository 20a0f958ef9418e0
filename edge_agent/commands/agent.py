"""``sly agent`` runs a board's daemon; ``sly identity`` shows the key by which the fleet knows it; ``sly settings`` explains."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edge_agent.core.config import AgentConfig

WHO = """\
The lines by which other boards know this one: its key for their [fleet.members], and what vouches for that key, a TPM 2.0 or the
root of an emulated board, for their [fleet.endorsers]. Keys are made at the first start, or here.
"""


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    agent = subparsers.add_parser("agent", help="run this board's agent")
    agent.add_argument("--config", type=Path, required=True, metavar="FILE", help="the agent's TOML file")
    agent.add_argument("--check", action="store_true", help="only judge the configuration, the models and the broker")
    agent.set_defaults(run=_agent)
    identity = subparsers.add_parser(
        "identity", help="show this board's lines for [fleet.members] and [fleet.endorsers]", description=WHO
    )
    identity.add_argument("--config", type=Path, required=True, metavar="FILE", help="the agent's TOML file")
    identity.set_defaults(run=_identity)
    about = "print a configuration file to begin with: every setting, explained"
    more = "Fill in [board] id and [state] folder, and take the # from what you change: sly settings > kitchen.toml"
    settings = subparsers.add_parser("settings", help=about, description=more)
    settings.set_defaults(run=_settings)


def _agent(arguments: argparse.Namespace) -> int:
    import asyncio

    from edge_agent.agent import serve
    from edge_agent.configured import check, read_config
    from edge_agent.shell.endorsers import vouching_key

    config = read_config(arguments.config)
    if arguments.check:
        asyncio.run(check(config))
        asyncio.run(vouching_key(config, print))
        print(f"{arguments.config}: fine")
        return 0
    return asyncio.run(serve(config))


def _settings(arguments: argparse.Namespace) -> int:
    from edge_agent.core.config import template

    print(template(), end="")
    return 0


def _identity(arguments: argparse.Namespace) -> int:
    from edge_agent.configured import read_config, signer_of

    config = read_config(arguments.config)
    print(f'{config.board.id} = "{signer_of(config).public_key.hex()}"', flush=True)
    if config.attest.on and config.attest.key != "software":
        _say_what_vouches(config)
    return 0


def _say_what_vouches(config: AgentConfig) -> None:
    import asyncio

    from edge_agent.shell.endorsers import vouching_key

    found = asyncio.run(vouching_key(config, lambda text: print(text, file=sys.stderr)))
    if found:
        kind, key = found
        print(f'# for [fleet.endorsers], {kind.value}:\n{config.board.id} = "{key.hex()}"')
