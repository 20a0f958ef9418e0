"""``sly fleet group``, ``revoke``, ``rotate-keys``, ``renew`` and ``publish``: what an operator changes in a fleet that runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from edge_agent.commands.fleet_folder import brought, opened, remind, say, told, with_folder

BROKER, ROLES = "broker", ("root", "targets", "snapshot", "timestamp", "broker")
REVOKE = """\
Put a board out of the fleet for good: the charter says so, its certificates are taken back, and a signed word has every board
trust it no more. To let it in again, give it new keys: sly fleet enroll BOARD --again.
"""
ROTATE = """\
New keys for a role of the signed metadata, or a new certificate for the broker. Root keys that lie offline are named by
--root-key, as many as the threshold; old root keys are left where they are, to be destroyed.
"""


def add(below: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    group = below.add_parser("group", help="put a board into groups, or take it out", description="Groups are what is pushed to.")
    verbs = group.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for verb in ("add", "remove"):
        each = verbs.add_parser(verb, help=f"{verb} groups of a board", description=f"{verb.capitalize()} groups of a board.")
        each.add_argument("board", help="the board's id")
        each.add_argument("group", nargs="+", help="names of groups")
        with_folder(each)
        each.set_defaults(run=_group, verb=verb)
    revoke = below.add_parser("revoke", help="put a board out of the fleet", description=REVOKE)
    revoke.add_argument("board", help="the board's id")
    revoke.add_argument("--reason", required=True, help="for whoever asks later")
    with_folder(revoke)
    revoke.set_defaults(run=_revoke)
    rotate = below.add_parser("rotate-keys", help="new keys for a role, or a new certificate for the broker", description=ROTATE)
    rotate.add_argument("role", choices=ROLES, metavar="ROLE", help=", ".join(ROLES))
    rotate.add_argument("--root-key", action="append", type=Path, default=[], metavar="FILE", help="a root key; repeatable")
    rotate.add_argument("--new-keys", type=Path, metavar="PATH", help="where to write new root keys: a medium that goes offline")
    rotate.add_argument("--host", default="", help="of the broker: another name or address from now on")
    rotate.add_argument("--also", action="append", default=[], metavar="HOST", help="of the broker: its other names; repeatable")
    with_folder(rotate)
    rotate.set_defaults(run=_rotate)
    renew = below.add_parser(
        "renew",
        help="sign the fleet's metadata for another while",
        description="To be run before the timestamp ends, as by cron.",
    )
    publish = below.add_parser(
        "publish", help="bring the broker what it lacks", description="Nothing new is signed: it is what is in the folder."
    )
    for parser, run in ((renew, _renew), (publish, _publish)):
        parser.add_argument(
            "--over", action="store_true", help="also if the broker keeps something later, from another copy of DIR"
        )
        with_folder(parser)
        parser.set_defaults(run=run)


def _group(arguments: argparse.Namespace) -> int:
    from edge_agent.steward.enrolling import change_groups

    folder = opened(arguments)
    change = {arguments.verb: arguments.group}
    charter = folder.put_charter(change_groups(folder.charter, arguments.board, **change))
    groups = list(charter.boards[arguments.board].groups)
    report = {"board": arguments.board, "groups": groups, "charter": charter.serial} | brought(folder)
    return told(arguments, report, f"{arguments.board}: {', '.join(groups) or 'in no group'}")


def _revoke(arguments: argparse.Namespace) -> int:
    from edge_agent.attest.words import Action
    from edge_agent.steward.enrolling import check_reason, revoke

    folder = opened(arguments)
    reason = check_reason(arguments.reason)
    charter = revoke(folder, arguments.board, reason)
    word = folder.say_of(arguments.board, Action.REVOKE, reason)
    reloaded = folder.reload_broker()
    report = {"board": arguments.board, "reason": reason, "charter": charter.serial, "word": word.serial, "reloaded": reloaded}
    report |= brought(folder)
    if not reloaded:
        say(f"the broker does not run here: bring it {folder.broker_folder}/ (acl, crl.pem), and kill -HUP it")
    return told(arguments, report, f"{arguments.board} is revoked: {reason}")


def _rotate(arguments: argparse.Namespace) -> int:
    from edge_agent.core.errors import ConfigError

    folder, role = opened(arguments), arguments.role
    if role != BROKER and (arguments.host or arguments.also):
        raise ConfigError("sly fleet rotate-keys", f"--host or --also with {role}", "them with broker")
    if role == BROKER:
        folder.issue_broker(arguments.host, arguments.also)
        folder.write_broker()
        made, reloaded = [folder.broker_folder / "broker.key"], folder.reload_broker()
        if not reloaded:
            say(f"the broker does not run here: bring it {folder.broker_folder}/ and start it again")
        report = {"role": role, "keys": list(map(str, made)), "reloaded": reloaded, "host": folder.settings.host}
        return told(arguments, report, f"{role}: a new certificate for {', '.join(folder.settings.names)}")
    if role != "root" and arguments.new_keys:
        raise ConfigError("sly fleet rotate-keys", f"--new-keys with {role}", "it with root", "other keys stay in the folder")
    made = folder.repository.rotate(role, arguments.root_key, arguments.new_keys)
    report = {"role": role, "keys": list(map(str, made))} | brought(folder)
    return told(arguments, report, f"{role}: new keys in {', '.join(map(str, made))}")


def _renew(arguments: argparse.Namespace) -> int:
    folder = opened(arguments)
    folder.repository.renew()
    report = {"expires_s": folder.repository.expires_s()} | brought(folder, arguments.over, must=True)
    remind(folder)
    return told(arguments, report, "signed for another while, and published")


def _publish(arguments: argparse.Namespace) -> int:
    folder = opened(arguments)
    report = brought(folder, arguments.over, must=True)
    remind(folder)
    return told(arguments, report, f"published: {report['messages']} messages" if report["messages"] else "the broker has it all")
