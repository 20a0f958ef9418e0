"""``sly fleet init``, ``enroll`` and ``broker``: a fleet's keys, its boards and its broker."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from edge_agent.commands.fleet_folder import brought, opened, say, told, with_folder

if TYPE_CHECKING:
    from edge_agent.steward.folder import OperatorFolder

INIT = """\
Make a fleet in DIR: TUF keys (the root's belong offline), a certificate authority, a Mosquitto configuration with TLS and an
access list, the operator's key. DIR is worth as much as the fleet: keep it on an encrypted disk, and a copy elsewhere.
"""
ENROLL = """\
Make a board's identity key, its client certificate and its configuration, and put it into the charter. What lies in the board's
folder then goes as it is into its state folder (flash.sh does that); after that the folder here may be deleted.
"""
BROKER = "Print how to start the fleet's Mosquitto; with --at, its configuration for a machine where the files lie elsewhere."


def add(below: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    init = below.add_parser("init", help="make a fleet: its keys, its CA, its broker's configuration", description=INIT)
    init.add_argument("folder", type=Path, metavar="DIR", help="an empty or new folder")
    init.add_argument("--name", default="home", help="the fleet's name, a part of every topic (default: home)")
    init.add_argument(
        "--broker-host", required=True, metavar="HOST", help="the name or address under which boards reach the broker"
    )
    init.add_argument("--port", type=int, default=8883, help="its port (default: 8883)")
    init.add_argument(
        "--also", action="append", default=[], metavar="HOST", help="another name or address of the broker; repeatable"
    )
    init.add_argument("--operator", default="operator", help="the operator's name (default: operator)")
    init.add_argument("--root-keys", type=int, default=3, metavar="N", help="root keys to make (default: 3)")
    init.add_argument("--threshold", type=int, default=2, metavar="N", help="how many of them must sign a new root (default: 2)")
    init.add_argument(
        "--timestamp-days", type=int, default=7, metavar="N", help="boards take no news older than this (default: 7)"
    )
    init.add_argument("--json", action="store_true", help="print JSON")
    init.set_defaults(run=_init)
    _add_enroll(below)
    broker = below.add_parser("broker", help="print how to start the fleet's Mosquitto", description=BROKER)
    broker.add_argument(
        "--at", type=Path, metavar="PATH", help="where its files lie on its machine: prints the configuration for that"
    )
    about_kind = "whose access list to print: mosquitto writes its own with each change, emqx gets it so (docs/cluster.md)"
    broker.add_argument("--for", dest="kind", choices=("mosquitto", "emqx"), default="mosquitto", help=about_kind)
    with_folder(broker)
    broker.set_defaults(run=_broker)


def _add_enroll(below: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    enroll = below.add_parser("enroll", help="make a board's keys and configuration, and let it in", description=ENROLL)
    enroll.add_argument("board", help="the board's id")
    enroll.add_argument(
        "--backend", default="auto", help="what it stands on: jetson, coral, raspberry_pi, jalapeno (default: auto)"
    )
    enroll.add_argument("--profile", default="", help="a roofline profile, by name")
    enroll.add_argument("--group", action="append", default=[], metavar="NAME", help="a group that it is in; repeatable")
    enroll.add_argument("--serve", action="append", default=[], metavar="MODEL", help="a model that it hosts; repeatable")
    enroll.add_argument("--models", default="", metavar="PATH", help="where the models lie on the board")
    enroll.add_argument("--state", type=Path, metavar="PATH", help="its state folder, on the board (default: /var/lib/sly/BOARD)")
    enroll.add_argument("--out", type=Path, metavar="PATH", help="where to write what it needs (default: DIR/boards/BOARD)")
    about_key = "its Ed25519 public key in hex, if it made its own: sly identity prints it there"
    enroll.add_argument("--public-key", default="", metavar="HEX", help=about_key)
    about_endorser = "the key by which its hardware vouches for it: sly identity prints it there"
    enroll.add_argument("--endorser", default="", metavar="HEX", help=about_endorser)
    enroll.add_argument("--again", action="store_true", help="new keys for a board that is enrolled; the old ones are taken back")
    with_folder(enroll)
    enroll.set_defaults(run=_enroll)


def _init(arguments: argparse.Namespace) -> int:
    from edge_agent.steward.folder import FleetSettings, OperatorFolder

    names = (arguments.broker_host, *arguments.also)
    settings = FleetSettings(
        arguments.name, arguments.operator, arguments.broker_host, arguments.port, tuple(dict.fromkeys(names))
    )
    folder = OperatorFolder.create(
        arguments.folder, settings, root_keys=arguments.root_keys, threshold=arguments.threshold,
        timestamp_days=arguments.timestamp_days,
    )  # fmt: skip
    report = {
        "fleet": settings.name,
        "folder": str(folder.folder),
        "operator": {settings.operator: folder.signer.public_key.hex()},
        "broker": {"host": settings.host, "port": settings.port, "configuration": str(folder.broker_folder / "mosquitto.conf")},
        "root_keys": [str(path) for path in sorted((folder.folder / "repository" / "keys").glob("root-*.pem"))],
    }
    say(f"take the root's keys out of {folder.folder / 'repository' / 'keys'} and keep them offline, apart from each other")
    return told(arguments, report, f"fleet {settings.name} in {folder.folder}; next:\n{_steps(folder.folder)}")


def _steps(folder: Path) -> str:
    return (
        f"  sly fleet broker --fleet {folder}                # how to start its broker\n"
        f"  sly fleet enroll BOARD --fleet {folder}          # a board's keys and configuration"
    )


def _enroll(arguments: argparse.Namespace) -> int:
    from edge_agent.steward.enrolling import STATE, Enrolment, enroll

    folder = opened(arguments)
    wanted = Enrolment(
        arguments.board, arguments.backend, tuple(arguments.group), arguments.state or STATE / arguments.board,
        _hexadecimal("--public-key", arguments.public_key), _hexadecimal("--endorser", arguments.endorser),
        tuple(arguments.serve), arguments.models, arguments.profile,
    )  # fmt: skip
    out = (arguments.out or folder.board_folder(wanted.board)).absolute()
    charter = enroll(folder, wanted, out, arguments.again)
    enrolled = charter.boards[wanted.board]
    report = {
        "board": wanted.board, "folder": str(out), "state": str(wanted.state), "key": enrolled.key.hex(),
        "backend": enrolled.backend, "groups": list(enrolled.groups), "charter": charter.serial,
        "reloaded": folder.reload_broker() if arguments.again else False,
    }  # fmt: skip
    report |= brought(folder)
    kind = enrolled.backend or "KIND"
    flash = f"  ./flash.sh --board {kind} --enrolled {out} --image BASE.img --out {wanted.board}.img   # or --device, --ssh"
    by_hand = f"  or copy {out}/* to {wanted.state}/ on the board"
    return told(arguments, report, f"{wanted.board} is enrolled; next:\n{flash}\n{by_hand}")


def _broker(arguments: argparse.Namespace) -> int:
    folder = opened(arguments)
    if arguments.kind == "emqx":
        return _emqx(arguments, folder)
    if arguments.at is not None:
        text = folder.configuration(arguments.at)
        return told(arguments, {"configuration": text}, text.rstrip())
    folder.write_broker()
    path, address = folder.broker_folder / "mosquitto.conf", folder.address
    report = {"command": ["mosquitto", "-c", str(path)], "reload": "kill -HUP", "host": address.host, "port": address.port}
    lines = [
        f"mosquitto -c {path}",
        f"# on another machine: copy {folder.broker_folder}/ there, and write its mosquitto.conf by: sly fleet broker --at PATH",
        "# after a revocation it must read its lists again: kill -HUP of its process (here sly fleet revoke does that)",
    ]
    return told(arguments, report, "\n".join(lines))


def _emqx(arguments: argparse.Namespace, folder: OperatorFolder) -> int:
    from edge_agent.steward.emqx import acl_conf

    charter = folder.charter
    text = acl_conf(charter.fleet, charter.operators, [board for board, each in charter.boards.items() if each.revoked])
    return told(arguments, {"acl": text}, text.rstrip())


def _hexadecimal(option: str, text: str) -> bytes:
    from edge_agent.core.errors import ConfigError

    try:
        return bytes.fromhex(text)
    except ValueError as error:
        raise ConfigError(option, text, "hexadecimal digits, as sly identity prints them") from error
