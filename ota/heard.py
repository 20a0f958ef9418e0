"""All that one board, or one operator, has heard of rollouts: a join, so that the order of hearing does not matter.

Owns ``Heard``.  Rules: of a model's rollouts and of a board's reports the newest is held, and of two that are equally new the one
with the larger encoding; a loss that a board once told of stays told, even by a board that takes its word back; every table is
bounded, also against who is enrolled and lies.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from edge_agent.core.cbor import encode
from edge_agent.core.errors import RefusedError
from edge_agent.core.values import MAX_BOARDS
from ota.orders import report_map, rollout_map
from ota.rollout import MAX_ROLLOUTS, Move, Progress, Report, Rollout, Step, Verdict, judge, move_by

Loss = tuple[int, str, Step]
"""A plan's serial, its model, and how it was lost: FAILED or RETURNED."""
MAX_LOSSES = 2 * MAX_ROLLOUTS
"""That one board is believed to have had."""


@dataclass(frozen=True, slots=True)
class _Told:
    """The newest report of a board, and the losses that it ever told of: the ``MAX_LOSSES`` newest."""

    newest: Report
    losses: tuple[Loss, ...] = ()


class Heard:
    """``changes`` counts how often something new was taken in."""

    def __init__(self) -> None:
        self.changes = 0
        self._rollouts: dict[str, tuple[Rollout, bytes]] = {}
        self._told: dict[str, _Told] = {}
        self._reports: dict[str, Report] = {}
        self._judged: dict[str, tuple[tuple[int, frozenset[str]], Verdict]] = {}

    @property
    def rollouts(self) -> dict[str, Rollout]:
        """The newest of every model, by model, sorted."""
        return {model: self._rollouts[model][0] for model in sorted(self._rollouts)}

    @property
    def reports(self) -> Mapping[str, Report]:
        """The newest of every board, with its earlier losses: what ``judge`` and ``move`` take."""
        return MappingProxyType(self._reports)

    def losses(self, board: str) -> tuple[Loss, ...]:
        """What a board ever said that it lost, sorted; the ``MAX_LOSSES`` newest."""
        return self._told[board].losses if board in self._told else ()

    def rollout(self, model: str) -> Rollout | None:
        return self._rollouts[model][0] if model in self._rollouts else None

    def signed(self, model: str) -> bytes:
        """The newest rollout of ``model`` as its operator signed it, where it was given; else nothing."""
        return self._rollouts[model][1] if model in self._rollouts else b""

    def hear_rollout(self, rollout: Rollout, signed: bytes = b"") -> bool:
        """Take in a rollout that was opened; ``False`` if one at least as new is held.

        Raises ``RefusedError`` when the table is full.
        """
        model = rollout.plan.model
        held = self.rollout(model)
        if held is not None and not _is_newer(rollout, held):
            return False
        _room(self._rollouts, model, MAX_ROLLOUTS, "models")
        self._rollouts[model] = rollout, signed
        self.changes += 1
        return True

    def hear_report(self, report: Report) -> bool:
        """Take in a report that was opened; ``False`` if it changes nothing. Raises ``RefusedError`` when the table is full."""
        board = report.board
        _room(self._told, board, MAX_BOARDS, "boards")
        held = self._told.get(board)
        joined = _joined(held, report)
        if joined == held:
            return False
        self._told[board] = joined
        self._reports[board] = _with_losses(joined)
        self.changes += 1
        return True

    def verdict(self, model: str, out: Collection[str] = ()) -> Verdict | None:
        """Of the newest rollout of ``model``; ``None`` if there is none. Judged anew when something new was heard."""
        rollout = self.rollout(model)
        if rollout is None:
            return None
        asked = self.changes, frozenset(out)
        known = self._judged.get(model)
        if known is None or known[0] != asked:
            known = self._judged[model] = asked, judge(rollout, self._reports, out)
        return known[1]

    def move(self, model: str, board: str, out: Collection[str] = ()) -> Move | None:
        """What ``board`` does now about ``model``; ``None`` if there is no rollout of it."""
        rollout, verdict = self.rollout(model), self.verdict(model, out)
        if rollout is None or verdict is None:
            return None
        report = self._reports.get(board)
        said = report.of(model, rollout.plan.serial) if report is not None else None
        return move_by(rollout, verdict, said, board, out)


def _room(table: Mapping[str, object], key: str, most: int, what: str) -> None:
    if key not in table and len(table) >= most:
        raise RefusedError(f"what is heard of {key}", f"{len(table)} {what} already", f"at most {most} {what}")


def _is_newer(one: Rollout | Report, held: Rollout | Report) -> bool:
    if one.newness != held.newness or one == held:
        return one.newness > held.newness
    return _encoded(one) > _encoded(held)


def _encoded(word: Rollout | Report) -> bytes:
    return encode(rollout_map(word) if isinstance(word, Rollout) else report_map(word))


def _joined(held: _Told | None, report: Report) -> _Told:
    if held is None:
        return _Told(report, _newest(_losses_in(report)))
    newest = report if _is_newer(report, held.newest) else held.newest
    return _Told(newest, _newest({*held.losses, *_losses_in(report)}))


def _losses_in(report: Report) -> set[Loss]:
    failed: set[Loss] = {(each.serial, each.model, Step.FAILED) for each in report.progress if each.failed}
    return failed | {(each.serial, each.model, Step.RETURNED) for each in report.progress if each.step is Step.RETURNED}


def _newest(losses: set[Loss]) -> tuple[Loss, ...]:
    """The largest of a union of sets are the largest of their largest, so forgetting the rest is still a join."""
    return tuple(sorted(losses)[-MAX_LOSSES:])


def _with_losses(told: _Told) -> Report:
    """The newest report as if it said all its board's losses."""
    report = told.newest
    progress = {(each.serial, each.model): each for each in report.progress}
    for serial, model, how in told.losses:
        said = progress.get((serial, model), Progress(model, serial, Step.WAITING))
        if how is Step.RETURNED and not said.lost:
            said = said.at(Step.RETURNED, why=said.why)
        progress[serial, model] = replace(said, failed=said.failed or how is Step.FAILED)
    if list(progress.values()) == list(report.progress):
        return report
    return replace(report, progress=tuple(progress[key] for key in sorted(progress)[-MAX_ROLLOUTS:]))
