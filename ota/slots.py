"""The life of a model on one board, as a table: what runs, what is tried, and what it goes back to.

=========== ================== =================== ==========================================================
from        event              to                  what runs then
=========== ================== =================== ==========================================================
EMPTY       ``stage``          STAGING             the confirmed release
STAGING     ``try_``           TRIAL               the new one, with the confirmed one loaded beside it
STAGING     ``give_up``        EMPTY               the confirmed release
TRIAL       ``confirm``        CONFIRMED (EMPTY)   the new one; the one before is kept as ``previous``
TRIAL       ``roll_back``      ROLLED_BACK         the confirmed release
TRIAL       ``boot``           TRIAL, ROLLED_BACK  counts a start; too many roll back
ROLLED_BACK ``stage``          STAGING             the confirmed release
EMPTY,      ``go_back``        EMPTY               ``previous``, which becomes the confirmed one
ROLLED_BACK
any         ``fall_back``      same                for a confirmed release whose bytes are lost: ``previous``, at the last the
                                                   factory's, becomes the confirmed one
=========== ================== =================== ==========================================================

Rules: pure; an illegal move raises and changes nothing; there is always one runnable release, at the least the factory's (release
0, what set-up brought); the security floor of a model never goes down: it rises when a release is confirmed, and going back,
which only the fleet's operators order and only to what is held here, leaves it where it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from edge_agent.core.errors import RefusedError
from edge_agent.core.values import DIGEST_BYTES, MODEL_NAME, bounded, checked
from ota.manifest import MAX_NUMBER

MAX_WHY_CHARS = 240
FACTORY = 0


class State(StrEnum):
    """Of the slot beside the confirmed one."""

    EMPTY = "empty"
    STAGING = "staging"
    TRIAL = "trial"
    ROLLED_BACK = "rolled_back"


@dataclass(frozen=True, slots=True)
class Held:
    """A release that is here: its number and SHA-256 of its manifest. Number 0, no digest: the factory's."""

    number: int = FACTORY
    manifest: bytes = b""

    def __post_init__(self) -> None:
        bounded("held release", self.number, 0, MAX_NUMBER)
        length = DIGEST_BYTES if self.number else 0
        bounded("digest of a held manifest, length", len(self.manifest), length, length, "bytes")


@dataclass(frozen=True, slots=True)
class ModelSlots:
    """``candidate`` is the release in the slot beside ``confirmed``, ``None`` while that is empty; ``boots``: starts within this
    trial; ``floor``: no release below this number is taken again; ``why``: what rolled the candidate back."""

    model: str
    confirmed: Held = Held()
    previous: Held | None = None
    candidate: Held | None = None
    state: State = State.EMPTY
    boots: int = 0
    floor: int = 0
    why: str = ""

    def __post_init__(self) -> None:
        checked(MODEL_NAME, "slots of", self.model)
        bounded("security floor", self.floor, 0, MAX_NUMBER)
        bounded("boots within a trial", self.boots, 0, 10_000)
        bounded("reason, length", len(self.why), 0, MAX_WHY_CHARS, "characters")
        if (self.candidate is None) != (self.state is State.EMPTY):
            raise ValueError(f"{self.model}: {self.state.value} with candidate {self.candidate}")
        if self.candidate is not None and self.candidate.number == FACTORY:
            raise ValueError(f"{self.model}: the factory's release as a candidate")

    @property
    def running(self) -> Held:
        """What serves by these records."""
        return self.candidate if self.candidate is not None and self.state is State.TRIAL else self.confirmed

    @property
    def held(self) -> tuple[Held, ...]:
        """The releases whose bytes must stay here, the confirmed one first; the factory's lies elsewhere and always stays."""
        beside = None if self.state is State.ROLLED_BACK else self.candidate
        return tuple(each for each in (self.confirmed, beside, self.previous) if each is not None and each.number != FACTORY)


class IllegalMoveError(RuntimeError):
    """The table knows no such move: the caller's bug, and nothing changed."""


_FROM = {
    "stage": (State.EMPTY, State.ROLLED_BACK),
    "try_": (State.STAGING,),
    "give_up": (State.STAGING,),
    "confirm": (State.TRIAL,),
    "roll_back": (State.TRIAL,),
    "boot": (State.TRIAL,),
    "go_back": (State.EMPTY, State.ROLLED_BACK),
}


def stage(slots: ModelSlots, release: Held) -> ModelSlots:
    """Begin to bring ``release`` here.

    Raises ``RefusedError`` for one below the floor, and for another manifest under the number of the confirmed one;
    ``IllegalMoveError`` for the confirmed one itself.
    """
    _checked(slots, "stage")
    subject = f"release {release.number} of {slots.model}"
    if release.number < max(slots.floor, FACTORY + 1):
        remedy = "an older release comes back by a rollback of the fleet, or anew under a larger number"
        raise RefusedError(subject, "an older release", f"release {max(slots.floor, FACTORY + 1)} or later", remedy)
    if release == slots.confirmed:
        raise IllegalMoveError(f"{subject} is the confirmed one already")
    if release.number == slots.confirmed.number:
        raise RefusedError(
            subject, f"manifest {release.manifest.hex()}", f"manifest {slots.confirmed.manifest.hex()}, confirmed here"
        )
    return replace(slots, candidate=release, state=State.STAGING, boots=0, why="")


def try_(slots: ModelSlots) -> ModelSlots:
    """All of the candidate is here and verified: let it show what it can."""
    _checked(slots, "try_")
    return replace(slots, state=State.TRIAL, boots=0)


def give_up(slots: ModelSlots) -> ModelSlots:
    """The candidate will not come after all."""
    _checked(slots, "give_up")
    return replace(slots, candidate=None, state=State.EMPTY)


def confirm(slots: ModelSlots) -> ModelSlots:
    """The trial went well: no release below this one is taken from now on."""
    new = _checked(slots, "confirm")
    floor = max(slots.floor, new.number)
    return ModelSlots(slots.model, confirmed=new, previous=slots.confirmed, floor=floor)


def roll_back(slots: ModelSlots, why: str) -> ModelSlots:
    """The trial went badly; ``why`` is cut to ``MAX_WHY_CHARS``."""
    _checked(slots, "roll_back")
    return replace(slots, state=State.ROLLED_BACK, boots=0, why=why[:MAX_WHY_CHARS])


def boot(slots: ModelSlots, max_boots: int) -> ModelSlots:
    """The agent starts within a trial; the ``max_boots``-th such start (1 or more) finds the candidate rolled back.

    To be durable before the candidate is loaded: what takes the board down with it counts all the same.
    """
    _checked(slots, "boot")
    if slots.boots + 1 >= max_boots:
        return roll_back(slots, f"start {slots.boots + 1} of {max_boots} allowed without being confirmed")
    return replace(slots, boots=slots.boots + 1)


def go_back(slots: ModelSlots) -> ModelSlots:
    """The fleet's operators want what was there before. Raises ``IllegalMoveError`` where that is not held."""
    _checked(slots, "go_back")
    if slots.previous is None:
        raise IllegalMoveError(f"{slots.model}: there is no release before {slots.confirmed.number} to go back to")
    return ModelSlots(slots.model, confirmed=slots.previous, floor=slots.floor)


def fall_back(slots: ModelSlots) -> ModelSlots:
    """The bytes of the confirmed release are lost. Raises ``IllegalMoveError`` for the factory's: there is nothing below it."""
    if slots.confirmed.number == FACTORY:
        raise IllegalMoveError(f"{slots.model}: nothing lies below the factory's release")
    return replace(slots, confirmed=slots.previous or Held(), previous=None)


def _checked(slots: ModelSlots, move: str) -> Held:
    """What lies in the slot beside the confirmed one (the confirmed one where that is empty), if ``move`` is allowed there."""
    if slots.state not in _FROM[move]:
        allowed = ", ".join(_FROM[move])
        raise IllegalMoveError(f"{slots.model}: {move} while {slots.state.value}; only while {allowed}")
    return slots.candidate or slots.confirmed
