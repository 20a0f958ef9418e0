"""Rollouts and reports for tests: plans to begin with, and Hypothesis strategies of plans, honest boards and boards that lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hypothesis import strategies as st

from ota.rollout import Action, Plan, Progress, Report, Rollout, Step

MODEL = "blazeface"
SERIAL = 1_790_000_000_000_000
MANIFEST = bytes(range(32))


def names(count: int) -> tuple[str, ...]:
    return tuple(f"b{i:02d}" for i in range(count))


def a_plan(boards: int = 50, **changes: Any) -> Plan:
    """Of 50 boards: 5 canaries, then waves of 15; 2 % may be lost, 90 % of a wave must have settled."""
    values: dict[str, Any] = {"canary": 5, "wave": 15, "max_error_permille": 20, "settled_permille": 900, **changes}
    return Plan(SERIAL, MODEL, 7, MANIFEST, names(boards), **values)


def a_rollout(boards: int = 50, action: Action = Action.RUN, revision: int = 1, **changes: Any) -> Rollout:
    return Rollout(a_plan(boards, **changes), "ann", revision, action)


def a_report(board: str, step: Step, number: int = 1, **changes: Any) -> Report:
    return Report(board, 1, number, progress=(Progress(MODEL, SERIAL, step, **changes),))


def reports(steps: Mapping[str, Step]) -> dict[str, Report]:
    return {board: a_report(board, step) for board, step in steps.items()}


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    boards = draw(st.integers(1, 12))
    return a_plan(
        boards,
        canary=draw(st.integers(1, boards)),
        wave=draw(st.integers(1, boards)),
        max_error_permille=draw(st.sampled_from((0, 20, 99, 100, 101, 250, 333, 334, 500, 999, 1000))),
        settled_permille=draw(st.sampled_from((1, 500, 666, 667, 900, 1000))),
    )


ONWARD: Mapping[Step | None, tuple[Step, ...]] = {
    None: (Step.WAITING, Step.FETCHING, Step.REFUSED),
    Step.WAITING: (Step.FETCHING, Step.REFUSED),
    Step.FETCHING: (Step.FETCHING, Step.TRIAL, Step.FAILED, Step.RETURNED, Step.REFUSED),
    Step.TRIAL: (Step.TRIAL, Step.CONFIRMED, Step.FAILED, Step.RETURNED),
    Step.CONFIRMED: (Step.CONFIRMED, Step.FAILED, Step.RETURNED),
    Step.FAILED: (Step.FAILED, Step.RETURNED),
    Step.RETURNED: (Step.RETURNED,),
    Step.REFUSED: (Step.REFUSED,),
}
"""What an honest board says next of one plan."""


@st.composite
def honest_lives(draw: st.DrawFn, board: str) -> list[Report]:
    """All that a board ever says of the plan, in its order; it may have said nothing yet."""
    life: list[Report] = []
    said: Progress | None = None
    for number in range(draw(st.integers(0, 6))):
        step = draw(st.sampled_from(ONWARD[said.step if said else None]))
        said = said.at(step, draw(st.integers(0, 1000))) if said else Progress(MODEL, SERIAL, step)
        life.append(Report(board, number // 3, number, progress=(said,)))
    return life


progress = st.builds(
    Progress, st.sampled_from((MODEL, "other")), st.sampled_from((SERIAL, SERIAL - 1)), st.sampled_from(Step),
    st.integers(0, 1000), st.sampled_from(("", "golden digest differs")), st.booleans(),
)  # fmt: skip


@st.composite
def any_reports(draw: st.DrawFn, boards: Sequence[str]) -> Report:
    """Whatever one of ``boards``, or a stranger, may sign, also two words with one number."""
    said = draw(st.lists(progress, max_size=2, unique_by=lambda each: (each.model, each.serial)))
    board = draw(st.sampled_from((*boards, "stranger")))
    return Report(board, draw(st.integers(0, 2)), draw(st.integers(0, 2)), progress=tuple(said))
