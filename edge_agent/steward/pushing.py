"""A release on its way to a group of boards: planned, told to the fleet, attended as long as somebody looks on.

Owns ``Wanted`` and the steps of a push.  Rules: what was decided is on disk and signed before the broker hears of it; a release
that is in the repository already is pushed as it is, under its number; of a model one rollout goes on at a time; the fleet goes
on with it when nobody attends, as long as boards can give each other what they lack.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.gossip.presence import Standing as Presence
from edge_agent.steward.folder import OperatorFolder
from edge_agent.steward.journal import Journal
from edge_agent.steward.publisher import Publisher
from edge_agent.steward.session import OperatorSession
from edge_agent.steward.status import rollout_status
from edge_agent.transport.link import Message
from ota.charter import CHARTER_PATH
from ota.manifest import Kind, Release, manifest_path
from ota.measured_wheels import references_of_wheels
from ota.orders import sign_rollout
from ota.rollout import Action, Plan, Rollout, Standing, judge, order_boards, ordered, share

GO_BACK_LIMIT_S = 120.0
"""For boards that go back to tell so, before an attendant ends."""
Show = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Who gets a release and how fast: shares in per mille, ``rate_bytes_per_s`` 0 for no limit."""

    group: str = "all"
    canary_permille: int = 100
    wave_permille: int = 250
    max_error_permille: int = 20
    settled_permille: int = 900
    rate_bytes_per_s: int = 0


def release_into(folder: OperatorFolder, release: Release, files: Mapping[str, Path]) -> Release:
    """Sign a release into the repository, with what it is recognized by; the newest one again if that has the same content.

    Its number is that of the repository.
    """
    repository = folder.repository
    numbers = repository.releases(release.model)
    if numbers:
        newest = repository.release(release.model, numbers[-1])
        if replace(newest, number=release.number) == release:
            return newest
    release = replace(release, number=repository.next_number(release.model))
    repository.add_release(release, files)
    repository.commit()
    if release.kind is Kind.AGENT:
        charter, found = folder.charter, references_of_wheels(files)
        known = charter.references
        known = replace(known, code=known.code | found.code, libraries=known.libraries | found.libraries)
        folder.put_charter(replace(charter, references=known))
    return release


def takers(folder: OperatorFolder, group: str, classes: Collection[str]) -> list[str]:
    """The boards of a group that are of one of these classes, all if there are none; a board that finds its own class is asked.

    Raises ``RefusedError`` when that is no board.
    """
    charter = folder.charter
    members = charter.group(group)
    boards = [board for board in members if not classes or charter.boards[board].backend in (*classes, "", "auto")]
    if not boards:
        groups = sorted({name for each in charter.boards.values() if not each.revoked for name in each.groups})
        what = f"{len(members)} boards, none of class {', '.join(classes)}" if members else "no board"
        raise RefusedError(f"group {group}", what, f"one of: all{''.join(f', {each}' for each in groups)}")
    return boards


def planned(folder: OperatorFolder, release: Release, wanted: Wanted) -> Plan:
    """The plan of a push. Raises ``RefusedError`` when no board of the group can take the release."""
    boards = takers(folder, wanted.group, release.classes)
    backends = {board: each.backend for board, each in folder.charter.boards.items()}
    serial = time.time_ns() // 1000
    digest = folder.repository.digest(manifest_path(release.model, release.number))
    count = len(boards)
    return Plan(
        serial, release.model, release.number, digest, order_boards(boards, backends, serial),
        canary=share(count, wanted.canary_permille), wave=share(count, wanted.wave_permille),
        max_error_permille=wanted.max_error_permille, settled_permille=wanted.settled_permille,
        rate_bytes_per_s=wanted.rate_bytes_per_s,
    )  # fmt: skip


async def begin(folder: OperatorFolder, session: OperatorSession, plan: Plan) -> Rollout:
    """Tell the fleet of a plan; of the same release to the same boards that is under way, or done, nothing new is told.

    Raises ``RefusedError`` while another rollout of the model goes on.
    """
    held = session.heard.rollout(plan.model)
    if held is not None:
        verdict = judge(held, session.heard.reports)
        same = (held.plan.number, set(held.plan.boards)) == (plan.number, set(plan.boards))
        if same and not verdict.over:
            return held
        if not same and verdict.state in (Standing.RUNNING, Standing.PAUSED):
            got = f"release {held.plan.number} is under way: {verdict.state.value}, {verdict.why}"
            raise RefusedError(f"rollout of {plan.model}", got, "one at a time", f"wait for it, or: sly ota abort {plan.model}")
    rollout = Rollout(plan, folder.settings.operator)
    await tell(folder, session, rollout)
    return rollout


async def order(folder: OperatorFolder, session: OperatorSession, model: str, action: Action, reason: str = "") -> Rollout:
    """Tell the fleet what is wanted of a rollout now. Raises ``RefusedError`` where there is none, or that may not follow."""
    held = known_rollout(session, model)
    if action is held.action:
        return held
    rollout = ordered(held, folder.settings.operator, action, reason)
    await tell(folder, session, rollout)
    return rollout


def known_rollout(session: OperatorSession, model: str) -> Rollout:
    """Raises ``RefusedError`` naming the models that there are rollouts of."""
    held = session.heard.rollout(model)
    if held is None:
        known = ", ".join(sorted(session.heard.rollouts)) or "none: no rollout is known to the broker"
        raise RefusedError("rollout of a model", model, known, "see: sly ota status")
    return held


async def tell(folder: OperatorFolder, session: OperatorSession, rollout: Rollout) -> None:
    """Put a rollout on the broker, and believe it here at once."""
    signed = sign_rollout(rollout, folder.signer)
    Journal(folder.folder).note(rollout)
    await session.say(Message(session.topics.rollout(rollout.plan.model), signed, retain=True))
    session.heard.hear_rollout(rollout, signed)


async def attend(folder: OperatorFolder, session: OperatorSession, model: str, show: Show) -> Mapping[str, Any]:
    """Give what boards lack and ``show`` how the rollout stands, until it is done, or everybody is back; how it stands then."""
    rollout = session.heard.rollout(model)
    if rollout is None:
        raise UnavailableError(f"rollout of {model}", "the broker keeps none")
    repository, plan = folder.repository, rollout.plan
    publisher = Publisher(session, repository, plan.rate_bytes_per_s)
    status = rollout_status(session, rollout)
    seen, limit_s = 0, math.inf
    try:
        async with publisher:
            publisher.hold_whole(repository.digest(CHARTER_PATH))
            publisher.hold(repository.release(plan.model, plan.number), plan.manifest)
            while True:
                rollout = session.heard.rollout(model) or rollout
                status = {**rollout_status(session, rollout), "given_bytes": publisher.given_bytes}
                show(status)
                if status["over"]:
                    limit_s = min(limit_s, time.monotonic() + GO_BACK_LIMIT_S)
                if _has_ended(session, rollout, status) or time.monotonic() > limit_s:
                    return status
                seen = await _news(session, seen)
    finally:
        Journal(folder.folder).saw(rollout, status)


def _has_ended(session: OperatorSession, rollout: Rollout, status: Mapping[str, Any]) -> bool:
    if status["over"]:
        return not back_is_awaited(session, rollout)
    return bool(status["state"] == Standing.DONE)


async def _news(session: OperatorSession, seen: int) -> int:
    """What came in within a second or so."""
    try:
        async with asyncio.timeout(1.0):
            return await session.news(seen)
    except TimeoutError:
        return session.events


def back_is_awaited(session: OperatorSession, rollout: Rollout) -> bool:
    """Does any board that did not say goodbye, and is not known to be gone, still have what everybody gives back?"""
    for board in rollout.plan.boards:
        report, presence = session.heard.reports.get(board), session.fleet.presence(board)
        progress = report.of(rollout.plan.model, rollout.plan.serial) if report else None
        is_gone = presence is not None and presence.standing is not Presence.ONLINE
        if progress is not None and progress.under_way and not is_gone:
            return True
    return False
