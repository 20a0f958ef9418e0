"""What operators and boards say of rollouts, as signed messages.

Owns the bytes of ``Rollout`` and ``Report``.  Rules: no I/O; a rollout is believed from an operator and a report from its own
board, each by a key that the fleet knows; a value has one encoding, so what is at its default is left out and may not be said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from edge_agent.core.cbor import decode, encode, fields, list_of
from edge_agent.core.cose import Signer, sign1, verify1
from edge_agent.core.errors import RefusedError, shown
from edge_agent.core.values import MAX_BOARDS
from ota.rollout import MAX_ROLLOUTS, Action, Plan, Progress, Report, Rollout, SlotReport, Step

ROLLOUT_AAD = b"sly/1/rollout"
REPORT_AAD = b"sly/1/report"
MAX_ROLLOUT_BYTES = 64 * 2**10
"""A plan of ``MAX_BOARDS`` with the longest names takes 36 KiB."""
MAX_REPORT_BYTES = 160 * 2**10
"""``MAX_ROLLOUTS`` rollouts and as many models with the longest names and reasons take 140 KiB."""

_ROLLOUT = {1: ("plan", dict), 2: ("operator", str), 3: ("revision", int), 4: ("action", str)}
_ROLLOUT_OPTIONAL = {5: ("reason", str)}
_PLAN = {
    1: ("serial", int), 2: ("model", str), 3: ("number", int), 4: ("manifest", bytes), 5: ("boards", list), 6: ("canary", int),
    7: ("wave", int), 8: ("max_error_permille", int), 9: ("settled_permille", int), 10: ("rate_bytes_per_s", int),
}  # fmt: skip
_REPORT = {1: ("board", str), 2: ("boot_epoch", int), 3: ("number", int)}
_REPORT_OPTIONAL = {4: ("agent", str), 5: ("progress", list), 6: ("slots", list), 7: ("note", str)}
_PROGRESS = {1: ("model", str), 2: ("serial", int), 3: ("step", str)}
_PROGRESS_OPTIONAL = {4: ("permille", int), 5: ("why", str), 6: ("failed", bool)}
_SLOTS = {1: ("model", str), 2: ("running", int)}
_SLOTS_OPTIONAL = {3: ("candidate", int), 4: ("state", str), 5: ("why", str)}

FindKey = Callable[[bytes], bytes | None]


def sign_rollout(rollout: Rollout, signer: Signer) -> bytes:
    return sign1(encode(rollout_map(rollout)), signer, ROLLOUT_AAD)


def open_rollout(message: bytes, find_key: FindKey) -> Rollout:
    """The rollout in a signed message; ``find_key`` knows operators, not boards.

    Raises ``RefusedError`` unless it is well-formed and signed by its own operator.
    """
    signed = verify1(message, find_key, ROLLOUT_AAD, MAX_ROLLOUT_BYTES)
    entry = fields(decode(signed.payload, MAX_ROLLOUT_BYTES, subject="rollout"), "rollout", _ROLLOUT, _ROLLOUT_OPTIONAL)
    _own("rollout", "operator", entry["operator"], signed.kid)
    plan = fields(entry["plan"], "rollout's plan", _PLAN)
    boards = tuple(list_of(plan["boards"], "rollout's boards", str, MAX_BOARDS))
    if entry["action"] not in list(Action):
        raise RefusedError("rollout's action", shown(entry["action"]), ", ".join(Action))
    rollout = Rollout(**{**entry, "plan": Plan(**{**plan, "boards": boards}), "action": Action(entry["action"])})
    _one_form("rollout", signed.payload, rollout_map(rollout))
    return rollout


def sign_report(report: Report, signer: Signer) -> bytes:
    return sign1(encode(report_map(report)), signer, REPORT_AAD)


def open_report(message: bytes, find_key: FindKey) -> Report:
    """The report in a signed message; ``find_key`` knows the boards of the fleet.

    Raises ``RefusedError`` unless it is well-formed and signed by its own board.
    """
    signed = verify1(message, find_key, REPORT_AAD, MAX_REPORT_BYTES)
    entry = fields(decode(signed.payload, MAX_REPORT_BYTES, subject="report"), "report", _REPORT, _REPORT_OPTIONAL)
    _own("report", "board", entry["board"], signed.kid)
    progress = list_of(entry.get("progress", []), "report's rollouts", dict, MAX_ROLLOUTS)
    slots = list_of(entry.get("slots", []), "report's slots", dict, MAX_ROLLOUTS)
    said = {"progress": tuple(map(_progress, progress)), "slots": tuple(map(_slots, slots))}
    report = Report(**{**entry, **said})
    _one_form("report", signed.payload, report_map(report))
    return report


def rollout_map(rollout: Rollout) -> dict[int, object]:
    """What a rollout is encoded as."""
    plan = rollout.plan
    known: dict[int, object] = {
        1: {key: getattr(plan, name) for key, (name, _) in _PLAN.items()},
        2: rollout.operator,
        3: rollout.revision,
        4: rollout.action.value,
    }
    return known | ({5: rollout.reason} if rollout.reason else {})


def report_map(report: Report) -> dict[int, object]:
    """What a report is encoded as."""
    known: dict[int, object] = {1: report.board, 2: report.boot_epoch, 3: report.number}
    progress = [_told(each, _PROGRESS, _PROGRESS_OPTIONAL) for each in report.progress]
    slots = [_told(each, _SLOTS, _SLOTS_OPTIONAL, state="empty") for each in report.slots]
    said = {4: report.agent, 5: progress, 6: slots, 7: report.note}
    return known | {key: value for key, value in said.items() if value}


def _told(
    value: Progress | SlotReport,
    required: Mapping[int, tuple[str, type]],
    optional: Mapping[int, tuple[str, type]],
    state: str = "",
) -> dict[int, object]:
    """A value as a map, without what is at its default: zero, false, no text, or ``state``."""
    known = {key: _plain(getattr(value, name)) for key, (name, _) in required.items()}
    said = {key: getattr(value, name) for key, (name, _) in optional.items()}
    return known | {key: each for key, each in said.items() if each and each != state}


def _plain(value: object) -> object:
    return value.value if isinstance(value, Step) else value


def _progress(value: object) -> Progress:
    entry = fields(value, "report's rollout", _PROGRESS, _PROGRESS_OPTIONAL)
    if entry["step"] not in list(Step):
        raise RefusedError("report's step", shown(entry["step"]), ", ".join(Step))
    return Progress(**{**entry, "step": Step(entry["step"])})


def _slots(value: object) -> SlotReport:
    return SlotReport(**fields(value, "report's slots", _SLOTS, _SLOTS_OPTIONAL))


def _own(subject: str, role: str, name: Any, kid: bytes) -> None:
    if kid != name.encode("utf-8", "replace"):
        raise RefusedError(subject, f"{role} {shown(name)} signed by {shown(kid)}", f"the {role}'s own signature")


def _one_form(subject: str, payload: bytes, known: dict[int, object]) -> None:
    if encode(known) != payload:
        raise RefusedError(subject, "a default that is spelled out", "nothing, where there is nothing to say")
