"""``sly ota``: models, and the agent itself, pushed to groups of boards; a rollout lives in the fleet and goes on by itself.

Rules: what a push needs is on disk and signed before the broker is asked; progress goes to stderr, the outcome to stdout; Ctrl-C
ends the looking on, not the rollout.  Exit code 0: every wave has settled; 1: it was stopped or sent back.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_agent.commands import pack_agent
from edge_agent.commands.amounts import byte_count, part, permille
from edge_agent.commands.fleet_folder import opened, say, told, with_folder
from edge_agent.commands.terminal import columns, counted

if TYPE_CHECKING:
    from edge_agent.steward.folder import OperatorFolder
    from edge_agent.steward.session import OperatorSession
    from ota.release import Built

PUSH = """\
Sign a model into the fleet's repository and roll it out: first to the canaries, then wave by wave. Each board fetches what it
lacks, tries the new model beside the old one, and keeps it or goes back; when too many fail, everybody goes back. Run it again to
look on, or to give again what boards lack.
"""
EXAMPLES = """\
sly ota push mobilenet-vww --to shop --canary 10% --wave 25% --max-error 2%
sly ota push better.tflite --name mobilenet-vww --to all
sly ota pack-agent wheels && sly ota push wheels --to all
"""
VERBS = {
    "pause": ("begin with no more boards", "Boards that have begun end what they do; nobody else begins."),
    "resume": ("go on with a rollout", "Go on with a rollout that is paused, and give boards what they lack."),
    "abort": ("stop a rollout, and send everybody back", "Every board goes back to the release that it had before."),
    "rollback": ("send everybody back after a rollout", "As abort, of a rollout that was done: boards keep the release before."),
}


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    ota = subparsers.add_parser("ota", help="push models and the agent to boards", description="Updates over the air.")
    below = ota.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_push(below)
    status = below.add_parser("status", help="show how rollouts stand", description="As the boards told it.")
    status.add_argument("model", nargs="?", default="", help="of this model only")
    with_folder(status)
    status.set_defaults(run=_status)
    for verb, (short, long) in VERBS.items():
        parser = below.add_parser(verb, help=short, description=long)
        parser.add_argument("model", help="the model whose rollout it is")
        parser.add_argument("--reason", default="", help="for whoever asks later")
        parser.add_argument("--detach", action="store_true", help="do not wait for what comes of it")
        with_folder(parser)
        parser.set_defaults(run=_order, verb=verb)
    past = below.add_parser("history", help="list what was rolled out from this folder", description="The newest first.")
    past.add_argument("model", nargs="?", default="", help="of this model only")
    with_folder(past)
    past.set_defaults(run=_history)
    pack_agent.add(below)


def _add_push(below: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    push = below.add_parser(
        "push", help="roll a model, or the agent, out", description=PUSH, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    push.add_argument("model", help="a model of the models folder, a .tflite or .card.toml file, or a folder of pack-agent")
    push.add_argument("--to", default="all", metavar="GROUP", help="the boards that get it (default: all)")
    push.add_argument("--canary", type=part, default=100, metavar="10%", help="the share that goes first (default: 10%%)")
    push.add_argument("--wave", type=part, default=250, metavar="25%", help="the share of each wave after (default: 25%%)")
    push.add_argument("--max-error", type=permille, default=20, metavar="2%", help="stop above this share (default: 2%%)")
    push.add_argument(
        "--settled", type=part, default=900, metavar="90%", help="of a wave, before the next begins (default: 90%%)"
    )
    push.add_argument("--max-rate", type=byte_count, default=0, metavar="2MB", help="bytes a second (default: no limit)")
    push.add_argument("--name", default="", help="the model that a file is of (default: the file's name)")
    push.add_argument("--card", type=Path, default=None, metavar="TOML", help="the card of a model that no catalog knows")
    push.add_argument("--class", action="append", default=[], dest="classes", metavar="BACKEND", help="for these boards only")
    push.add_argument("--models", type=Path, default=None, metavar="PATH", help="the models folder")
    push.add_argument("--untested", action="store_true", help="do not run it here first")
    push.add_argument("--detach", action="store_true", help="tell the fleet and end; somebody must give the bytes later")
    with_folder(push)
    push.set_defaults(run=_push)


def _push(arguments: argparse.Namespace) -> int:
    from edge_agent.core.errors import ConfigError
    from edge_agent.steward.pushing import Wanted, planned, release_into, takers

    folder = opened(arguments)
    for option, value in (("--name", arguments.name), ("--card", arguments.card)):
        if value and not arguments.model.endswith(".tflite"):
            raise ConfigError("sly ota push", f"{option} with {arguments.model}", "it with a .tflite file", "leave it out")
    takers(folder, arguments.to, arguments.classes)
    built = _built(arguments, folder)
    for note in built.notes:
        say(note)
    release = release_into(folder, built.release, built.files)
    wanted = Wanted(arguments.to, arguments.canary, arguments.wave, arguments.max_error, arguments.settled, arguments.max_rate)
    plan = planned(folder, release, wanted)
    say(
        f"release {release.number} of {release.model}, {_mb(release.size_bytes)}, signed; to {counted(len(plan.boards), 'board')}"
    )
    return _looked_on(folder, arguments, release.model, lambda session: _begin(folder, session, plan))


async def _begin(folder: OperatorFolder, session: OperatorSession, plan: Any) -> None:
    from edge_agent.steward.pushing import begin

    await folder.publish(session)
    await begin(folder, session, plan)


def _built(arguments: argparse.Namespace, folder: OperatorFolder) -> Built:
    from edge_agent.progress import Bar
    from ota.release import release_of_model

    with Bar() as bar:
        if Path(arguments.model).is_dir():
            return _agent(Path(arguments.model), arguments.classes)
        name = arguments.name or Path(arguments.model).stem
        releases = folder.repository.releases(name)
        before = folder.repository.release(name, releases[-1]).card if releases else ""
        return release_of_model(
            arguments.model, 1, name=arguments.name, folder=arguments.models, card_path=arguments.card, before=before,
            classes=arguments.classes, golden=not arguments.untested,
            progress=lambda done, whole: bar.show("reading the model", done, whole),
        )  # fmt: skip


def _agent(wheels: Path, classes: list[str]) -> Built:
    """A release of the agent itself, of the wheels that ``sly ota pack-agent`` made."""
    from ota.manifest import AGENT, Kind
    from ota.release import Built, build_release
    from ota.wheelhouse import wheelhouse_files

    files = wheelhouse_files(wheels)
    return Built(build_release(AGENT, 1, "", files, Kind.AGENT, classes), files)


def _order(arguments: argparse.Namespace) -> int:
    from edge_agent.steward.enrolling import check_reason
    from edge_agent.steward.pushing import order
    from ota.rollout import Action
    from ota.slots import MAX_WHY_CHARS

    action = {"pause": Action.PAUSE, "resume": Action.RUN, "abort": Action.ABORT, "rollback": Action.ROLLBACK}[arguments.verb]
    folder, reason = opened(arguments), check_reason(arguments.reason, MAX_WHY_CHARS)

    async def ordered(session: OperatorSession) -> None:
        await order(folder, session, arguments.model, action, reason)

    arguments.detach |= arguments.verb == "pause"
    code = _looked_on(folder, arguments, arguments.model, ordered)
    return 0 if arguments.verb in ("abort", "rollback") else code


def _looked_on(folder: OperatorFolder, arguments: argparse.Namespace, model: str, first: Any) -> int:
    """Do ``first`` in a session, then look on until the rollout has come to an end; its outcome."""
    import asyncio

    from edge_agent.commands.ota_view import Screen, outcome

    screen = Screen(sys.stderr)
    try:
        status = asyncio.run(_attended(folder, model, first, screen, arguments.detach))
    except KeyboardInterrupt:
        screen.end(interrupted=True)
        say(f"the rollout goes on in the fleet; look on again with: sly ota resume {model}")
        raise
    screen.end()
    told(arguments, status, outcome(status, columns(sys.stdout)))
    return 1 if status["over"] else 0


async def _attended(folder: OperatorFolder, model: str, first: Any, screen: Any, detach: bool) -> Mapping[str, Any]:
    from edge_agent.steward.pushing import attend
    from edge_agent.steward.status import rollout_status
    from edge_agent.transport.topics import Kind

    async with folder.session(kinds=(Kind.OTA_META, Kind.WORD, Kind.ONLINE, Kind.ROLLOUT, Kind.REPORT)) as session:
        await first(session)
        rollout = session.heard.rollout(model)
        if detach and rollout is not None:
            return {**rollout_status(session, rollout), "given_bytes": 0}
        return await attend(folder, session, model, screen.show)


def _status(arguments: argparse.Namespace) -> int:
    import asyncio

    from edge_agent.commands.ota_view import outcome

    rollouts = asyncio.run(_heard(opened(arguments), arguments.model))
    text = "\n\n".join(outcome(each, columns(sys.stdout)) for each in rollouts) or "no rollout is known to the broker"
    return told(arguments, {"rollouts": rollouts}, text)


async def _heard(folder: OperatorFolder, model: str) -> list[dict[str, Any]]:
    from edge_agent.steward.journal import Journal
    from edge_agent.steward.pushing import known_rollout
    from edge_agent.steward.status import rollout_status

    journal, seen = Journal(folder.folder), []
    async with folder.session() as session:
        for rollout in [known_rollout(session, model)] if model else session.heard.rollouts.values():
            seen.append(rollout_status(session, rollout))
            journal.saw(rollout, seen[-1])
    return seen


def _history(arguments: argparse.Namespace) -> int:
    from edge_agent.commands.ota_view import history_table
    from edge_agent.steward.journal import Journal

    entries = Journal(opened(arguments).folder).entries(arguments.model)
    return told(arguments, entries, history_table(entries, columns(sys.stdout), arguments.model))


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB"
