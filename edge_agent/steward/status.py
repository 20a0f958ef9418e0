"""What is known of the fleet, as plain values for tables and for JSON. Reads, never changes.

Rules: what a board did not say is absent (``None``), not guessed; what comes first in a list is what a person should see first.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

from edge_agent.attest.keys import kind_of_key
from edge_agent.steward.authority import days_left
from edge_agent.steward.folder import OperatorFolder
from edge_agent.steward.hearing import timestamp_version
from edge_agent.steward.session import OperatorSession
from ota.charter import Charter
from ota.rollout import Progress, Report, Rollout, Step, judge, tally, waves

NOT_HEARD, REVOKED = "not heard of", "revoked"
SOON_DAYS = 60
"""A certificate that ends within so many days is spoken of."""


def charter_status(charter: Charter) -> list[dict[str, Any]]:
    """Every board of the charter, by its id."""
    return [
        {
            "board": board,
            "backend": each.backend,
            "groups": list(each.groups),
            "key": each.key.hex(),
            "endorsed": kind_of_key(each.endorser).value if each.endorser else "",
            "revoked": each.revoked,
        }
        for board, each in sorted(charter.boards.items())
    ]


def fleet_status(session: OperatorSession) -> dict[str, Any]:
    """All boards as they were heard, every rollout as it stands."""
    charter = session.charter
    rollouts = [rollout_status(session, rollout) for rollout in session.heard.rollouts.values()]
    over = {each["model"] for each in rollouts if each["over"]}
    return {
        "fleet": charter.fleet,
        "charter": charter.serial,
        "broker": session.down or "connected",
        "metadata": timestamp_version(session.metadata),
        "boards": [board_status(session, each, over) for each in charter_status(charter)],
        "rollouts": rollouts,
        "refused": list(session.refused),
    }


def board_status(session: OperatorSession, enrolled: Mapping[str, Any], over: Collection[str] = ()) -> dict[str, Any]:
    """One board: what the charter has of it (``charter_status``) and what was heard; ``over``: models whose rollout everybody
    gives back."""
    board = enrolled["board"]
    record = next((each for each in session.fleet.all_records() if each.board == board), None)
    presence = session.fleet.presence(board)
    report = session.heard.reports.get(board)
    return {
        **enrolled,
        "standing": _standing(session, board),
        "boot_epoch": presence.boot_epoch if presence else None,
        "hardware": record.hardware if record else None,
        "emulated": record.emulated if record else None,
        "queue_us": record.queue_us if record else None,
        "temperature_mdegc": record.temperature_mdegc if record else None,
        "offers": [offer.model for offer in record.offers] if record else [],
        "trust": trust_of(session, board),
        "self_test": _self_test(session, board),
        "agent": report.agent if report else None,
        "models": _slots(report),
        "updates": _updates(session, board, report, over),
        "note": report.note if report else "",
    }


def _self_test(session: OperatorSession, board: str) -> dict[str, Any] | None:
    """What the board found when it looked at itself; ``current``: in the boot in which it was heard of last."""
    test, presence = session.self_tests.get(board), session.fleet.presence(board)
    if test is None:
        return None
    return {
        "verdict": test.verdict.value,
        "boot_epoch": test.boot_epoch,
        "current": presence is None or presence.boot_epoch <= test.boot_epoch,
        "agent": test.agent,
        "checks": [asdict(each) for each in test.checks],
    }


def rollout_status(session: OperatorSession, rollout: Rollout) -> dict[str, Any]:
    """A rollout as everybody's reports have it: as a whole, wave by wave, and every board in the order of the plan."""
    plan, out = rollout.plan, _out(session.charter)
    verdict = judge(rollout, session.heard.reports, out)
    figures = tally(rollout, session.heard.reports, out)
    return {
        "model": plan.model,
        "number": plan.number,
        "serial": plan.serial,
        "operator": rollout.operator,
        "action": rollout.action.value,
        "state": verdict.state.value,
        "wave": verdict.wave,
        "over": verdict.over,
        "why": verdict.why,
        "counts": {step.value: count for step, count in sorted(verdict.counts.items())},
        "lost": list(verdict.lost),
        "waves": [asdict(each) | {"boards": list(boards)} for boards, each in zip(waves(plan), figures, strict=True)],
        "boards": [_taker(session, rollout, board, board in out) for board in plan.boards],
    }


def _taker(session: OperatorSession, rollout: Rollout, board: str, is_out: bool) -> dict[str, Any]:
    """How far one board of a rollout is, and which release of the model serves there."""
    plan, report = rollout.plan, session.heard.reports.get(board)
    said = report.of(plan.model, plan.serial) if report else None
    slots = next((each for each in report.slots if each.model == plan.model), None) if report else None
    return {
        "board": board,
        "standing": REVOKED if is_out else _standing(session, board),
        **_progress(said),
        "failed": bool(said and said.failed),
        "serves": slots.running if slots else 0,
        "heard": report is not None,
    }


def trust_of(session: OperatorSession, board: str) -> dict[str, Any]:
    """What verifiers say of a board: how many say which tier, and who says what why."""
    said = [each for (_, about), each in sorted(session.appraisals.items()) if about == board]
    tiers = Counter(each.tier for each in said)
    return {
        "tiers": {tier.name.lower(): tiers[tier] for tier in sorted(tiers)},
        "said": [{"verifier": e.verifier, "tier": e.tier.name.lower(), "reasons": list(e.reasons)} for e in said],
    }


def reminders(folder: OperatorFolder) -> list[str]:
    """What of this folder ends soon, in words; empty while nothing does."""
    now_s, said = int(time.time()), []
    for role, end_s in folder.repository.expires_s().items():
        left_days = (end_s - now_s) // 86_400
        if left_days < (2 if role == "timestamp" else SOON_DAYS):
            command = "sly fleet rotate-keys root" if role == "root" else "sly fleet renew"
            said.append(f"the signed {role} {_ends(left_days)}; run: {command}")
    for what, pem in (("broker's", folder.broker_certificate), ("operator's", folder.client_certificate)):
        if (left_days := days_left(pem, now_s)) < SOON_DAYS:
            said.append(
                f"the {what} certificate {_ends(left_days)}; run: sly fleet rotate-keys {what.removesuffix(chr(39) + 's')}"
            )
    return said


def _ends(left_days: int) -> str:
    return f"ends in {left_days} days" if left_days >= 0 else f"ended {-left_days} days ago"


def _standing(session: OperatorSession, board: str) -> str:
    presence = session.fleet.presence(board)
    return presence.standing.value if presence else NOT_HEARD


def _out(charter: Charter) -> frozenset[str]:
    return frozenset(board for board, each in charter.boards.items() if each.revoked)


def _slots(report: Report | None) -> list[dict[str, Any]]:
    return [
        {"model": each.model, "running": each.running, "candidate": each.candidate, "state": each.state, "why": each.why}
        for each in sorted(report.slots if report else (), key=lambda each: each.model)
    ]


def _updates(session: OperatorSession, board: str, report: Report | None, over: Collection[str]) -> list[dict[str, Any]]:
    """How far it is with every rollout that it is part of; what it did not say is waiting."""
    found = []
    for rollout in session.heard.rollouts.values():
        plan = rollout.plan
        if board in plan.boards:
            said = report.of(plan.model, plan.serial) if report else None
            found.append({"model": plan.model, "number": plan.number, "over": plan.model in over, **_progress(said)})
    return found


def _progress(said: Progress | None) -> dict[str, Any]:
    if said is None:
        return {"step": Step.WAITING.value, "permille": 0, "why": ""}
    return {"step": said.step.value, "permille": said.permille, "why": said.why}
