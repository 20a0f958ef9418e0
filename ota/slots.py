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
EMPTY       ``go_back``        EMPTY               ``previous``, which becomes the confirmed one
=========== ================== =================== ==========================================================

Rules: pure; an illegal move raises and changes nothing; there is always one runnable release, at the least the factory's (release
0, what set-up brought); the security floor of a model never goes down.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

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

    @property
    def running(self) -> Held:
        """What serves by these records."""
        return self.candidate if self.candidate is not None and self.state is State.TRIAL else self.confirmed
