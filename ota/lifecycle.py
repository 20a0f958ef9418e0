"""One model on this board: from a rollout that begins here to a release that is confirmed, or to the one before.

Owns ``Lifecycle``.  Rules: sans-I/O; what is durable is durable before the effect that follows from it leaves; one thing is
under way at a time, and its answer is awaited, but not for ever; the records say what runs after any power cut; whoever has begun
a trial ends it, whether or not there is a link, and only then heeds a newer plan; what cannot be for this board is refused with
one reason, before a byte of it is fetched where that can be known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from edge_agent.core.errors import RefusedError
from models.installed import Installed
from models.language_card import LanguageCard
from models.released import card_of
from ota import slots as moves
from ota.events import (
    Bring,
    BringAgent,
    BringBack,
    Brought,
    Effect,
    Note,
    Probe,
    Probed,
    Ran,
    Settle,
    Stand,
    Turn,
    TurnBack,
    Turned,
)
from ota.health import Health, Trial
from ota.manifest import AGENT, Kind, Release, ReleasedFile, manifest_path
from ota.records import Records
from ota.rollout import Motion, Move, Plan, Progress, Step
from ota.slots import MAX_WHY_CHARS, Held, ModelSlots, State

STAND_EVERY_US = 1_000_000
ANSWER_LIMIT_US = 1_800_000_000
"""An agent is built in minutes on a slow card. What gave no answer for half an hour gives none."""
BACK_AGAIN_US = 60_000_000
"""A way back that failed is tried again no sooner."""
FETCH_STEP_PERMILLE = 50
"""What was fetched is told in such steps, so that a fleet that fetches does not fill its broker with reports."""


class Doing(StrEnum):
    """What was asked of the shell and is awaited."""

    NOTHING = "nothing"
    BRINGING = "bringing"
    PROBING = "probing"
    TURNING = "turning"
    TRYING = "trying"
    """It serves; nothing is awaited but inferences."""
    GOING_BACK = "going back"


_ASKED = (Doing.BRINGING, Doing.PROBING, Doing.TURNING, Doing.GOING_BACK)


@dataclass(frozen=True, slots=True)
class Here:
    """What a board is, as far as releases ask: its class (backend), the agent's version, the library that runs language models,
    and how a trial goes."""

    board: str
    backend: str
    agent: str
    runtime: str = ""
    trial_inferences: int = 5
    trial_us: int = 60_000_000
    confirm_us: int = 300_000_000
    """A new agent is confirmed after so long with a link."""


@dataclass(frozen=True, slots=True)
class Shelf:
    """What is here and what may be had: targets by path (size, digest); manifests by digest; whether an artefact is held, how
    much of it is (per mille), and why it never will be."""

    targets: Mapping[str, tuple[int, bytes]]
    release: Callable[[bytes], Release | None]
    holds: Callable[[bytes], bool]
    permille: Callable[[bytes], int]
    why_never: Callable[[bytes], str]


@dataclass(frozen=True, slots=True)
class Need:
    """An artefact that is to be fetched; ``file``: of a release, else one whole piece of ``size_bytes``."""

    digest: bytes
    size_bytes: int
    file: ReleasedFile | None = None
    seeds: tuple[bytes, ...] = ()
    model: str = ""


class Lifecycle:
    """``slots``: as the records have them; ``progress``: with the newest plan that this board took part in."""

    def __init__(self, here: Here, model: str, records: Records, slots: ModelSlots, progress: Progress | None = None) -> None:
        self.here, self.model, self._records = here, model, records
        self.slots, self.progress = slots, progress
        self.doing = Doing.NOTHING
        self.needs: tuple[Need, ...] = ()
        self._trial: Trial | None = None
        self._golden: Mapping[str, frozenset[bytes]] = {}
        self._stands = False
        """A golden input was given in the place of a request, and its answer is awaited."""
        self._back_why, self._back_due_us = "", 0
        self._since_us = self._stood_us = self._asked_us = 0
        self._is_another_agent = False
        """This agent was started, within its own trial, as the one that it goes on from."""
        if slots.state is State.ROLLED_BACK and progress is not None and progress.step is Step.TRIAL:
            self._step(Step.FAILED, why=slots.why)  # by the count of starts, before anything could be told

    # what is to be done

    def go_on(self, plan: Plan | None, move: Move | None, shelf: Shelf, now_us: int) -> Iterator[Effect]:
        """What the newest plan, and how far this board is with it, have made due."""
        self.needs = ()
        if self._waits_too_long(now_us):
            yield from self._stop_waiting(now_us)
            return
        if self.doing is Doing.GOING_BACK:
            return
        self._heed(plan)
        takes_part = plan is not None and self.progress is not None and self.progress.serial == plan.serial
        if self.slots.state is State.TRIAL:
            yield from self._go_on_trying(move if takes_part else None, shelf, now_us)
        elif plan is None or move is None or not takes_part:
            return
        elif move.motion is Motion.BACK:
            yield from self._go_back(plan, move.why, shelf, now_us)
        elif move.motion is Motion.GO:
            yield from self._take(plan, shelf, now_us)
        elif move.motion is Motion.WAIT:
            self._step(Step.WAITING, why=move.why)

    def _heed(self, plan: Plan | None) -> None:
        """What is fetched for another plan is given up; a trial ends first."""
        candidate = Held(plan.number, plan.manifest) if plan is not None else None
        is_new = plan is not None and (self.progress is None or self.progress.serial < plan.serial)
        if self.slots.state is State.STAGING and (is_new or self.slots.candidate != candidate):
            self._save(moves.give_up(self.slots))
        if plan is not None and is_new and self.slots.state is not State.TRIAL:
            self.progress = Progress(self.model, plan.serial, Step.WAITING)

    def _waits_too_long(self, now_us: int) -> bool:
        waits = self.doing in _ASKED or (self.doing is Doing.TRYING and self._stands)
        return waits and now_us - self._asked_us >= ANSWER_LIMIT_US

    def _stop_waiting(self, now_us: int) -> Iterator[Effect]:
        """An answer has not come by now."""
        why = f"no answer within {ANSWER_LIMIT_US // 1_000_000} s while {self.doing.value}"
        if self.doing is Doing.GOING_BACK:
            yield from self._not_back(why, now_us)
        else:
            yield from self._end_badly(why)

    def _take(self, plan: Plan, shelf: Shelf, now_us: int) -> Iterator[Effect]:
        if self.slots.confirmed.number == plan.number and self.slots.confirmed.manifest == plan.manifest:
            self._step(Step.CONFIRMED)
            return
        listed = shelf.targets.get(manifest_path(self.model, plan.number))
        if listed is None:
            self._step(Step.WAITING, why=f"release {plan.number} is not in the signed metadata that came here")
            return
        size_bytes, digest = listed
        if digest != plan.manifest:
            return self._refuse(f"the plan names manifest {plan.manifest.hex()[:16]}…, signed is {digest.hex()[:16]}…")
        release = shelf.release(digest)
        if why := shelf.why_never(digest):
            return self._refuse(why)
        if release is None:
            self.needs = (Need(digest, size_bytes),)
            self._step(Step.FETCHING)
            return
        if self.slots.state is not State.STAGING and not self._stage(plan, release):
            return
        yield from self._fetch(release, shelf, now_us)

    def _stage(self, plan: Plan, release: Release) -> bool:
        """Begin with a release, unless it is not for this board."""
        if why := why_not_here(self.here, self.model, plan.number, release):
            self._refuse(why)
            return False
        try:
            self._save(moves.stage(self.slots, Held(plan.number, plan.manifest)))
        except RefusedError as error:
            self._refuse(str(error))
            return False
        return True

    def _fetch(self, release: Release, shelf: Shelf, now_us: int) -> Iterator[Effect]:
        files = files_here(self.here, release)
        for file in files:
            if why := shelf.why_never(file.digest):
                return self._refuse(f"{file.name} cannot be had: {why}")
        missing = [file for file in files if not shelf.holds(file.digest)]
        if missing:
            seeds = self._seeds(shelf)
            self.needs = tuple(Need(file.digest, file.size_bytes, file, seeds, self.model) for file in missing)
            whole = sum(file.size_bytes for file in files)
            here = whole - sum(file.size_bytes * (1000 - shelf.permille(file.digest)) // 1000 for file in missing)
            self._step(Step.FETCHING, 1000 * here // whole // FETCH_STEP_PERMILLE * FETCH_STEP_PERMILLE)
            return
        self._save(moves.try_(self.slots))
        self._step(Step.TRIAL)
        yield from self._bring(release, now_us)

    def _seeds(self, shelf: Shelf) -> tuple[bytes, ...]:
        """What of other releases of this model may be the same."""
        releases = [shelf.release(each.manifest) for each in (self.slots.confirmed, self.slots.previous) if each and each.number]
        return tuple(file.digest for release in releases if release is not None for file in release.files)

    # the trial

    def _go_on_trying(self, move: Move | None, shelf: Shelf, now_us: int) -> Iterator[Effect]:
        candidate = self.slots.candidate
        assert candidate is not None
        if move is not None and move.motion is Motion.BACK:
            yield from self._end_badly(move.why, returned=True)
        elif self.doing is Doing.NOTHING:
            yield from self._try_again(candidate, shelf, now_us)
        elif self.doing is Doing.TRYING:
            yield from self._look_at_trial(now_us)

    def _try_again(self, candidate: Held, shelf: Shelf, now_us: int) -> Iterator[Effect]:
        """After a start within the trial. Of the agent, which may be the one on trial itself, once it is known that it is not."""
        if self.model == AGENT and not self._is_another_agent:
            return
        self._is_another_agent = False
        release = shelf.release(candidate.manifest)
        if release is None or not _all_here(self.here, release, shelf):
            yield from self._end_badly("its files are not here any more")
        else:
            yield from self._bring(release, now_us)

    def _bring(self, release: Release, now_us: int) -> Iterator[Effect]:
        self._await(Doing.BRINGING, now_us)
        if release.kind is Kind.AGENT:
            yield BringAgent(release)
            return
        try:
            installed = installed_of(self.here, release)
        except RefusedError as error:
            yield from self._end_badly(str(error))
            return
        golden = getattr(installed.card, "golden", {})
        self._golden = {library: frozenset({bytes.fromhex(digest)}) for library, digest in golden.items()}
        self._trial = None
        yield Bring(installed)

    def brought(self, event: Brought, now_us: int) -> Iterator[Effect]:
        if self.doing is Doing.GOING_BACK:
            yield from self._brought_back(event, now_us)
        elif self.doing is not Doing.BRINGING or not self._is_candidate(event.number):
            yield Note(f"release {event.number} of {self.model} was brought, which nobody asked for: left alone")
        elif event.why:
            yield from self._end_badly(event.why)
        elif self.model == AGENT:
            self._await(Doing.TURNING, now_us)
            yield Turn(self.model, event.number)
        else:
            self._await(Doing.PROBING, now_us)
            yield Probe(self.model, event.number)

    def probed(self, event: Probed, now_us: int) -> Iterator[Effect]:
        if self.doing is Doing.TRYING:
            if self._trial is not None and self._stands and self._is_candidate(event.number):
                self._stands = False
                self._trial = self._trial.heard_golden(event.golden, event.why)
                yield from self._look_at_trial(now_us)
            return
        if self.doing is not Doing.PROBING or not self._is_candidate(event.number):
            return
        expected = self._golden.get(event.library, frozenset())
        self._trial = Trial(self.here.trial_inferences, expected).heard_golden(event.golden, event.why)
        if self._trial.verdict is Health.BAD:
            yield from self._end_badly(self._trial.why)
        else:
            self._await(Doing.TURNING, now_us)
            yield Turn(self.model, event.number)

    def turned(self, event: Turned, now_us: int) -> Iterator[Effect]:
        if self.doing is Doing.GOING_BACK:
            yield from self._turned_back(event, now_us)
        elif self.doing is Doing.TURNING and self._is_candidate(event.number):
            if event.why:
                yield from self._end_badly(event.why)
            elif self.model != AGENT:  # which shows by its start, in another process, that it came up
                self.doing, self._stands, self._since_us, self._stood_us = Doing.TRYING, False, now_us, now_us

    def ran(self, event: Ran, now_us: int) -> Iterator[Effect]:
        """A real inference of the release on trial."""
        if self.doing is Doing.TRYING and self._trial is not None and self._is_candidate(event.number):
            self._trial = self._trial.ran(event.why)
            yield from self._look_at_trial(now_us)

    def _look_at_trial(self, now_us: int) -> Iterator[Effect]:
        candidate = self.slots.candidate
        if self._trial is None or candidate is None:
            return
        if self._trial.verdict is Health.BAD:
            yield from self._end_badly(self._trial.why)
        elif self._trial.verdict is Health.SOUND:
            yield from self.confirm()
        elif not self._stands and now_us - self._since_us >= self.here.trial_us and now_us - self._stood_us >= STAND_EVERY_US:
            self._stands, self._stood_us, self._asked_us = True, now_us, now_us
            yield Stand(self.model, candidate.number)

    def confirm(self) -> Iterator[Effect]:
        candidate = self.slots.candidate
        assert candidate is not None
        self._save(moves.confirm(self.slots))
        self.doing, self._trial = Doing.NOTHING, None
        self._step(Step.CONFIRMED, 1000)
        yield Note(f"release {candidate.number} of {self.model} is confirmed")
        yield Settle(self.model)

    def _end_badly(self, why: str, *, returned: bool = False) -> Iterator[Effect]:
        """Back to the confirmed release: durable first."""
        candidate = self.slots.candidate
        assert candidate is not None
        self._save(moves.roll_back(self.slots, why))
        self.doing, self._trial = Doing.NOTHING, None
        self._step(Step.RETURNED if returned else Step.FAILED, why=why)
        yield Note(f"release {candidate.number} of {self.model} is rolled back: {why}")
        yield TurnBack(self.model, why)

    # back, after it was confirmed

    def _go_back(self, plan: Plan, why: str, shelf: Shelf, now_us: int) -> Iterator[Effect]:
        if self.slots.state is State.STAGING:
            self._save(moves.give_up(self.slots))
        if self.slots.confirmed != Held(plan.number, plan.manifest):
            self._step(Step.RETURNED, why=why)
        elif now_us >= self._back_due_us:
            yield from self._leave_confirmed(why, shelf, now_us)

    def _leave_confirmed(self, why: str, shelf: Shelf, now_us: int) -> Iterator[Effect]:
        previous = self.slots.previous
        release = shelf.release(previous.manifest) if previous is not None and previous.number else None
        stands_by = previous is not None and (not previous.number or self.model == AGENT)
        if not stands_by and (release is None or not _all_here(self.here, release, shelf)):
            before = f"release {previous.number}" if previous else "the release before"
            self._refuse(f"{before}, to go back to, is not here any more")
            return
        try:
            bring = Bring(installed_of(self.here, release)) if release and self.model != AGENT else BringBack(self.model)
        except RefusedError as error:
            self._refuse(f"the release to go back to cannot be used: {error}")
            return
        self._await(Doing.GOING_BACK, now_us)
        self._back_why = why
        yield bring

    def _brought_back(self, event: Brought, now_us: int) -> Iterator[Effect]:
        if event.why:
            yield from self._not_back(event.why, now_us)
        else:
            yield Turn(self.model, event.number)

    def _not_back(self, why: str, now_us: int) -> Iterator[Effect]:
        self.doing, self._back_due_us = Doing.NOTHING, now_us + BACK_AGAIN_US
        self._step(Step.CONFIRMED, 1000, f"the way back failed: {why}")
        yield Note(f"{self.model} cannot go back: {why}; it is tried again in {BACK_AGAIN_US // 1_000_000} s")

    def _turned_back(self, event: Turned, now_us: int) -> Iterator[Effect]:
        if event.why:
            yield from self._not_back(event.why, now_us)
            return
        self.doing = Doing.NOTHING
        self._save(moves.go_back(self.slots))
        self._step(Step.RETURNED, why=self._back_why)
        yield Note(f"{self.model} is back at release {self.slots.confirmed.number}: {self._back_why}")
        yield Settle(self.model)

    # the agent itself, which starts anew between Turn and what follows

    def agent_started(self, running: int, now_us: int, why: str = "") -> Iterator[Effect]:
        """Which release of the agent runs after a start within its trial; ``why`` the one on trial was left, if it was. Without a
        reason it was never begun, for the power failed before; starts within a trial are counted."""
        if self.slots.state is not State.TRIAL or self.slots.candidate is None:
            return
        if running == self.slots.candidate.number:
            self.doing, self._since_us = Doing.TRYING, now_us
        elif why:
            yield from self._end_badly(why)
        else:
            self._is_another_agent = True

    def agent_well(self, now_us: int, linked: bool) -> Iterator[Effect]:
        """Is the new agent well for long enough?"""
        if self.model != AGENT or self.doing is not Doing.TRYING or self.slots.state is not State.TRIAL:
            return
        if not linked:
            self._since_us = now_us
        elif now_us - self._since_us >= self.here.confirm_us:
            yield from self.confirm()

    # the records

    def _save(self, slots: ModelSlots) -> None:
        self._records.save(slots)
        self.slots = slots

    def _step(self, step: Step, permille: int = 0, why: str = "") -> None:
        if self.progress is not None:
            self.progress = self.progress.at(step, permille, why[:MAX_WHY_CHARS])

    def _refuse(self, why: str) -> None:
        if self.slots.state is State.STAGING:
            self._save(moves.give_up(self.slots))
        self._step(Step.REFUSED, why=why)

    def _await(self, doing: Doing, now_us: int) -> None:
        self.doing, self._asked_us = doing, now_us

    def _is_candidate(self, number: int) -> bool:
        return self.slots.candidate is not None and self.slots.candidate.number == number


def why_not_here(here: Here, model: str, number: int, release: Release) -> str:
    """Why a signed release is none for this board and this plan; empty if it is."""
    if (release.model, release.number) != (model, number):
        return f"a release of another model: {release.model} {release.number}, asked for {model} {number}"
    if release.classes and here.backend not in release.classes:
        return f"it is for {', '.join(release.classes)}; this board is {here.backend}"
    if _version(here.agent) < _version(release.min_agent):
        return f"it needs agent {release.min_agent} or later; this is {here.agent}: push the agent first"
    if release.kind is Kind.AGENT:
        return ""
    try:
        installed_of(here, release)
    except RefusedError as error:
        return str(error)
    return ""


def files_here(here: Here, release: Release) -> tuple[ReleasedFile, ...]:
    """The files of a release that a board has a use for: of a language model those for its own library.

    Raises ``RefusedError`` for a card that cannot be read.
    """
    if release.kind is not Kind.LANGUAGE or not here.runtime:
        return release.files
    card = card_of(True, release.card)
    assert isinstance(card, LanguageCard)
    others = {entry.filename for runtime, entry in card.files.items() if runtime != here.runtime}
    return tuple(file for file in release.files if file.name not in others)


def _all_here(here: Here, release: Release, shelf: Shelf) -> bool:
    try:
        return all(shelf.holds(file.digest) for file in files_here(here, release))
    except RefusedError:
        return False


def installed_of(here: Here, release: Release) -> Installed:
    """What a host needs of a release. Raises ``RefusedError`` for a card that cannot be read, or is another model's."""
    card = card_of(release.kind is Kind.LANGUAGE, release.card)
    if card.name != release.model:
        raise RefusedError(f"card of release {release.number}", card.name, release.model, "build the release anew")
    return Installed(release.model, release.number, card, {file.name: file.digest for file in files_here(here, release)})


def _version(text: str) -> tuple[int, ...]:
    numbers = [part for part in text.split("+")[0].split(".") if part.isdigit()]
    return (*map(int, numbers), *(0,) * (4 - len(numbers)))
