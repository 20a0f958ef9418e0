"""Who of a fleet takes a release when, and when nobody takes it any more: the same answer on every board, from the same words.

Owns ``Plan``, ``Rollout``, ``Report`` and the judgement.  Rules: pure; no clock; a board's newest report counts, whatever order
they came in, so boards that have heard the same judge the same; nothing that is settled is unsettled by a report but a failure.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from edge_agent.core.errors import RefusedError
from edge_agent.core.values import BOARD_ID, DIGEST_BYTES, MAX_BOARDS, MODEL_NAME, bounded, checked
from ota.manifest import MAX_NUMBER
from ota.slots import MAX_WHY_CHARS

MAX_SERIAL = 2**53
MAX_REVISION = 2**31
MAX_ROLLOUTS = 64
"""Models that a board tells of."""


class Action(StrEnum):
    RUN = "run"
    PAUSE = "pause"
    """Who has begun ends; nobody begins."""
    ABORT = "abort"
    """Everybody goes back to what was there before."""
    ROLLBACK = "rollback"
    """As abort, of a rollout that was done: to the release before, which boards keep."""


class Step(StrEnum):
    """How far one board is; the order of their worth in a judgement is that of this list."""

    WAITING = "waiting"
    FETCHING = "fetching"
    TRIAL = "trial"
    CONFIRMED = "confirmed"
    RETURNED = "returned"
    """Went back because the fleet does."""
    FAILED = "failed"
    """Rolled back by itself: the release was bad here."""
    REFUSED = "refused"
    """Never took it: it is not for this board, or cannot be here."""


@dataclass(frozen=True, slots=True)
class Plan:
    """``serial``: the microseconds since 1970 at which it was made; of two plans for a model the larger counts.

    ``manifest``: SHA-256 of the release's manifest; ``boards``: the whole group, in the order in which they take it, canaries
    first.  ``canary``, ``wave``: how many boards; ``settled_permille``: of a wave so many must be done before the next begins
    (of the canaries all); ``max_error_permille``: of the boards that have begun, so many may fail; ``rate_bytes_per_s``: of
    whoever gives it, 0 for no limit.
    """

    serial: int
    model: str
    number: int
    manifest: bytes
    boards: tuple[str, ...]
    canary: int
    wave: int
    max_error_permille: int = 20
    settled_permille: int = 900
    rate_bytes_per_s: int = 0

    def __post_init__(self) -> None:
        bounded("rollout serial", self.serial, 1, MAX_SERIAL)
        checked(MODEL_NAME, "rollout of", self.model)
        bounded("rollout's release", self.number, 1, MAX_NUMBER)
        bounded("rollout's manifest digest, length", len(self.manifest), DIGEST_BYTES, DIGEST_BYTES, "bytes")
        bounded("rollout's boards, count", len(self.boards), 1, MAX_BOARDS)
        for board in self.boards:
            checked(BOARD_ID, "rollout's board", board)
        if len(set(self.boards)) != len(self.boards):
            raise RefusedError("rollout's boards", "a board twice", "each once")
        bounded("rollout's canaries", self.canary, 1, len(self.boards))
        bounded("rollout's wave", self.wave, 1, len(self.boards))
        bounded("rollout's max_error_permille", self.max_error_permille, 0, 1000)
        bounded("rollout's settled_permille", self.settled_permille, 1, 1000)
        bounded("rollout's rate", self.rate_bytes_per_s, 0, 2**40, "bytes/s")


@dataclass(frozen=True, slots=True)
class Rollout:
    """A plan and what its operator wants of it now; of one plan the larger ``revision`` counts."""

    plan: Plan
    operator: str
    revision: int = 1
    action: Action = Action.RUN
    reason: str = ""

    def __post_init__(self) -> None:
        checked(BOARD_ID, "rollout's operator", self.operator)
        bounded("rollout's revision", self.revision, 1, MAX_REVISION)
        bounded("rollout's reason, length", len(self.reason), 0, MAX_WHY_CHARS, "characters")

    @property
    def newness(self) -> tuple[int, int]:
        return self.plan.serial, self.revision


@dataclass(frozen=True, slots=True)
class Progress:
    """Of one board with one plan (``serial``): how far, what part of the bytes is here, why it failed."""

    model: str
    serial: int
    step: Step
    permille: int = 0
    why: str = ""

    def __post_init__(self) -> None:
        checked(MODEL_NAME, "progress of", self.model)
        bounded("progress serial", self.serial, 1, MAX_SERIAL)
        bounded("progress permille", self.permille, 0, 1000)
        bounded("progress reason, length", len(self.why), 0, MAX_WHY_CHARS, "characters")


@dataclass(frozen=True, slots=True)
class SlotReport:
    """A model of a board: the release that serves, the one beside it, and the state of that."""

    model: str
    running: int
    candidate: int = 0
    state: str = "empty"
    why: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """What a board says of its updates; ``boot_epoch`` and ``number`` order the reports of one board."""

    board: str
    boot_epoch: int
    number: int
    agent: str = ""
    progress: tuple[Progress, ...] = ()
    slots: tuple[SlotReport, ...] = ()
    note: str = ""
    """What ails the updates of this board as a whole: metadata refused, a full disk; empty when nothing does."""

    @property
    def newness(self) -> tuple[int, int]:
        return self.boot_epoch, self.number

    def of(self, model: str, serial: int) -> Progress | None:
        """How far it is with one plan; ``None`` if it says nothing of it."""
        return next((each for each in self.progress if (each.model, each.serial) == (model, serial)), None)
