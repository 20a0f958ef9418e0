"""Who of a fleet takes a release when, and when nobody takes it any more: the same answer on every board, from the same words.

Owns ``Plan``, ``Rollout``, ``Report`` and the judgement.  Rules:

* Pure; no clock; a board's newest report counts, whatever order they came in, so boards that have heard the same judge the same.
* The threshold counts losses, which are never taken back, against the sizes of the waves, which never change: so a stop is final
  for its plan, and nothing that is settled is unsettled by a report but a loss.
* Who has not been heard of is waited for: by all with a canary, by the ``settled_permille`` of a wave with anybody else.
* A board that is out (revoked, or in no charter) is not waited for and takes nothing; what it lost before stays lost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from hashlib import sha256

from edge_agent.core.errors import RefusedError, shown
from edge_agent.core.values import BOARD_ID, DIGEST_BYTES, MAX_BOARDS, MODEL_NAME, bounded, checked
from ota.manifest import MAX_NUMBER
from ota.slots import MAX_WHY_CHARS, State

MAX_SERIAL = 2**53
MAX_AGENT_CHARS = 64
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
    (of the canaries all); ``max_error_permille``: of the canaries, and of all boards up to the end of any wave, so many may be
    lost; ``rate_bytes_per_s``: of whoever gives it, 0 for no limit.
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
    """Of one board with one plan (``serial``): how far, what part of the bytes is here, why it failed.

    ``failed``: it did, within this plan, whatever came after; a board never takes that back (``at`` keeps it).
    """

    model: str
    serial: int
    step: Step
    permille: int = 0
    why: str = ""
    failed: bool = False

    def __post_init__(self) -> None:
        if self.step is Step.FAILED:
            object.__setattr__(self, "failed", True)
        checked(MODEL_NAME, "progress of", self.model)
        bounded("progress serial", self.serial, 1, MAX_SERIAL)
        bounded("progress permille", self.permille, 0, 1000)
        bounded("progress reason, length", len(self.why), 0, MAX_WHY_CHARS, "characters")

    @property
    def lost(self) -> bool:
        """The release was here and went again."""
        return self.failed or self.step is Step.RETURNED

    @property
    def begun(self) -> bool:
        return self.step in (Step.FETCHING, Step.TRIAL)

    @property
    def under_way(self) -> bool:
        """The release is on its way here, or is here."""
        return self.begun or self.step is Step.CONFIRMED

    def at(self, step: Step, permille: int = 0, why: str = "") -> Progress:
        """The same board with the same plan, further on; a failure stays told."""
        return replace(self, step=step, permille=permille, why=why)


@dataclass(frozen=True, slots=True)
class SlotReport:
    """A model of a board: the release that serves, the one beside it, and the state of that."""

    model: str
    running: int
    candidate: int = 0
    state: str = "empty"
    why: str = ""

    def __post_init__(self) -> None:
        checked(MODEL_NAME, "slots of", self.model)
        bounded("slots' running release", self.running, 0, MAX_NUMBER)
        bounded("slots' candidate", self.candidate, 0, MAX_NUMBER)
        if self.state not in list(State):
            raise RefusedError("slots' state", shown(self.state), ", ".join(State))
        bounded("slots' reason, length", len(self.why), 0, MAX_WHY_CHARS, "characters")


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

    def __post_init__(self) -> None:
        checked(BOARD_ID, "report of", self.board)
        bounded("report boot_epoch", self.boot_epoch, 0, MAX_SERIAL)
        bounded("report number", self.number, 0, MAX_SERIAL)
        bounded("report agent, length", len(self.agent), 0, MAX_AGENT_CHARS, "characters")
        bounded("report note, length", len(self.note), 0, MAX_WHY_CHARS, "characters")
        bounded("report's rollouts, count", len(self.progress), 0, MAX_ROLLOUTS)
        bounded("report's models, count", len(self.slots), 0, MAX_ROLLOUTS)
        if len({(each.model, each.serial) for each in self.progress}) != len(self.progress):
            raise RefusedError(f"report of {self.board}", "a rollout twice", "each once")
        if len({each.model for each in self.slots}) != len(self.slots):
            raise RefusedError(f"report of {self.board}", "a model's slots twice", "each once")

    @property
    def newness(self) -> tuple[int, int]:
        return self.boot_epoch, self.number

    def of(self, model: str, serial: int) -> Progress | None:
        """How far it is with one plan; ``None`` if it says nothing of it."""
        for each in self.progress:
            if each.serial == serial and each.model == model:
                return each
        return None


class Standing(StrEnum):
    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"
    """Too much was lost; final for this plan."""
    ABORTED = "aborted"
    """Its operator sends everybody back."""
    DONE = "done"
    """Every wave has settled; who was away takes it when it is back."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of a rollout as a whole. ``wave``: the last one that may begin, 0 the canaries; ``counts``: its boards by their step, who
    was not heard of as waiting; ``lost``: the boards that count against the threshold."""

    state: Standing
    wave: int
    why: str
    counts: Mapping[Step, int] = field(default_factory=dict)
    lost: tuple[str, ...] = ()

    @property
    def over(self) -> bool:
        """Everybody goes back to what was there before."""
        return self.state in (Standing.STOPPED, Standing.ABORTED)


@dataclass(frozen=True, slots=True)
class Tally:
    """One wave in figures, for who watches.

    ``settled`` counts who is out as well; ``lost`` who failed and who went back with the fleet, ``failed`` only the former;
    ``under_way``: who takes it or has it; ``permille``: what of the bytes is here, the mean of the boards that did not lose it.
    """

    boards: int
    confirmed: int
    settled: int
    lost: int
    failed: int
    under_way: int
    permille: int


class Motion(StrEnum):
    WAIT = "wait"
    """Its turn has not come."""
    GO = "go"
    """Take it, or go on with it."""
    STAY = "stay"
    """There is nothing to do, whatever comes."""
    BACK = "back"
    """To what was there before."""


@dataclass(frozen=True, slots=True)
class Move:
    motion: Motion
    why: str


def waves(plan: Plan) -> tuple[tuple[str, ...], ...]:
    """The boards of a plan, wave by wave, the canaries first."""
    later = range(plan.canary, len(plan.boards), plan.wave)
    return (plan.boards[: plan.canary], *(plan.boards[at : at + plan.wave] for at in later))


def judge(rollout: Rollout, reports: Mapping[str, Report], out: Collection[str] = ()) -> Verdict:
    """What becomes of a rollout, by the newest report of every board, and with the boards in ``out`` not waited for."""
    seen = _seen(rollout.plan, reports)
    wave, waited = _open_wave(rollout.plan, seen, out)
    counts = Counter(seen[board].step if board in seen else Step.WAITING for board in rollout.plan.boards)
    lost = tuple(board for board in rollout.plan.boards if board in seen and seen[board].lost)
    state, why = _standing(rollout, seen, waited)
    return Verdict(state, wave, why, counts, lost)


def move(rollout: Rollout, reports: Mapping[str, Report], board: str, out: Collection[str] = ()) -> Move:
    """What ``board`` does now. ``reports`` holds its own newest word too: who has begun ends, unless everybody goes back."""
    said = reports[board].of(rollout.plan.model, rollout.plan.serial) if board in reports else None
    return move_by(rollout, judge(rollout, reports, out), said, board, out)


def move_by(rollout: Rollout, verdict: Verdict, said: Progress | None, board: str, out: Collection[str] = ()) -> Move:
    """As ``move``, by a verdict that is known and by what ``board`` itself says of the plan.

    The reason changes with the state of the rollout, not with every board that comes forward: it is told to the fleet.
    """
    if board not in rollout.plan.boards:
        return Move(Motion.STAY, f"{board} is not among the boards of this rollout")
    if board in out:
        return Move(Motion.STAY, f"{board} is out of the fleet: revoked, or in no charter")
    if said is not None and (said.lost or said.step is Step.REFUSED):
        return Move(Motion.STAY, f"{said.step.value} here: {said.why}".removesuffix(": "))
    has_it = said is not None and said.step is Step.CONFIRMED
    begun = said is not None and said.begun
    if verdict.over:
        return Move(Motion.BACK if has_it or begun else Motion.STAY, verdict.why)
    if has_it:
        return Move(Motion.STAY, "confirmed here")
    if begun:
        return Move(Motion.GO, "it has begun")
    return _beginning(rollout, verdict, board)


def tally(rollout: Rollout, reports: Mapping[str, Report], out: Collection[str] = ()) -> tuple[Tally, ...]:
    """The figures of every wave."""
    seen = _seen(rollout.plan, reports)
    return tuple(_tally_of(wave, seen, out) for wave in waves(rollout.plan))


def order_boards(boards: Iterable[str], backends: Mapping[str, str], serial: int) -> tuple[str, ...]:
    """In which order boards take a release: one of every class of hardware (``backends``: by board) before anyone else, the
    largest class first; for the rest another order with every ``serial``, so that the same boards are not always the first."""
    shuffled = sorted(set(boards), key=lambda board: sha256(f"{serial}/{board}".encode()).digest())
    sizes = Counter(backends.get(board, "") for board in shuffled)
    first: dict[str, str] = {}
    for board in shuffled:
        first.setdefault(backends.get(board, ""), board)
    heads = [first[backend] for backend in sorted(first, key=lambda backend: (-sizes[backend], backend))]
    return (*heads, *(board for board in shuffled if board not in heads))


def share(boards: int, permille: int) -> int:
    """So many of ``boards``, rounded up, and at least one."""
    return max(1, -(-boards * permille // 1000))


_NEXT: Mapping[Action, tuple[Action, ...]] = {
    Action.RUN: (Action.PAUSE, Action.ABORT, Action.ROLLBACK),
    Action.PAUSE: (Action.RUN, Action.ABORT, Action.ROLLBACK),
    Action.ABORT: (),
    Action.ROLLBACK: (),
}


def ordered(rollout: Rollout, operator: str, action: Action, reason: str = "") -> Rollout:
    """The next word on a plan. Raises ``RefusedError`` for one that may not follow: who was sent back takes a new plan."""
    allowed = _NEXT[rollout.action]
    if action not in allowed:
        subject = f"what is wanted of the rollout of {rollout.plan.model}, after {rollout.action.value}"
        remedy = "push it again: a new plan" if not allowed else ""
        raise RefusedError(subject, action.value, ", ".join(allowed) or "nothing: it is over", remedy)
    return Rollout(rollout.plan, operator, rollout.revision + 1, action, reason)


_ORDERED_BACK = (Action.ABORT, Action.ROLLBACK)


def _seen(plan: Plan, reports: Mapping[str, Report]) -> dict[str, Progress]:
    """What the boards of the plan say of it."""
    said = {board: reports[board].of(plan.model, plan.serial) for board in plan.boards if board in reports}
    return {board: progress for board, progress in said.items() if progress is not None}


def _standing(rollout: Rollout, seen: Mapping[str, Progress], waited: str) -> tuple[Standing, str]:
    if rollout.action in _ORDERED_BACK:
        return Standing.ABORTED, f"{rollout.action.value} by {rollout.operator}: {rollout.reason}".removesuffix(": ")
    if too_many := _too_many_lost(rollout.plan, seen):
        return Standing.STOPPED, too_many
    if rollout.action is Action.PAUSE:
        return Standing.PAUSED, f"paused by {rollout.operator}: {rollout.reason}".removesuffix(": ")
    return (Standing.RUNNING, waited) if waited else (Standing.DONE, "every wave has settled")


def _too_many_lost(plan: Plan, seen: Mapping[str, Progress]) -> str:
    """Why the rollout stops, if it does: of no beginning of the plan that ends with a wave may too many be lost.

    The sizes are of the plan and not of who was heard of, so that a board that is heard of later cannot undo a stop.
    """
    lost: list[str] = []
    reached = 0
    for wave in waves(plan):
        reached += len(wave)
        lost += [board for board in wave if board in seen and seen[board].lost]
        if len(lost) * 1000 > plan.max_error_permille * reached:
            board = next((each for each in lost if seen[each].failed and seen[each].why), lost[0])
            limit = f"{len(lost)} of the first {reached} boards lost, allowed are {plan.max_error_permille} ‰"
            return f"{limit}; {board}: {seen[board].why or seen[board].step.value}"
    return ""


def _is_settled(board: str, seen: Mapping[str, Progress], out: Collection[str]) -> bool:
    said = seen.get(board)
    return board in out or (said is not None and (said.lost or said.step in (Step.CONFIRMED, Step.REFUSED)))


def _open_wave(plan: Plan, seen: Mapping[str, Progress], out: Collection[str]) -> tuple[int, str]:
    """The last wave that may begin, and what the next one waits for; nothing when all have settled."""
    every = waves(plan)
    for at, wave in enumerate(every):
        settled = sum(_is_settled(board, seen, out) for board in wave)
        if at == 0 and settled == len(wave) and not any(b in seen and seen[b].step is Step.CONFIRMED for b in wave):
            return 0, "no canary has confirmed it"
        needed_permille = plan.settled_permille if at else 1000
        if settled * 1000 < needed_permille * len(wave):
            return at, f"{'wave ' + str(at) if at else 'canaries'}: {settled} of {len(wave)} done"
    return len(every) - 1, ""


def _beginning(rollout: Rollout, verdict: Verdict, board: str) -> Move:
    """Of a board that has not begun."""
    if verdict.state is Standing.PAUSED:
        return Move(Motion.WAIT, verdict.why)
    at = rollout.plan.boards.index(board)
    own = 0 if at < rollout.plan.canary else 1 + (at - rollout.plan.canary) // rollout.plan.wave
    if own > verdict.wave:
        return Move(
            Motion.WAIT, f"its wave is {own}; {f'wave {verdict.wave} has' if verdict.wave else 'the canaries have'} not settled"
        )
    return Move(Motion.GO, f"wave {own} has begun" if own else "a canary")


def _tally_of(wave: tuple[str, ...], seen: Mapping[str, Progress], out: Collection[str]) -> Tally:
    kept = [seen[board] for board in wave if board in seen and not seen[board].lost]
    lost = [seen[board] for board in wave if board in seen and seen[board].lost]
    here_permille = sum(1000 if each.step in (Step.TRIAL, Step.CONFIRMED) else each.permille for each in kept)
    return Tally(
        boards=len(wave),
        confirmed=sum(each.step is Step.CONFIRMED for each in kept),
        settled=sum(_is_settled(board, seen, out) for board in wave),
        lost=len(lost),
        failed=sum(each.failed for each in lost),
        under_way=sum(each.under_way for each in kept),
        permille=here_permille // max(1, len(wave) - len(lost)),
    )
