"""The releases of one model that are loaded, as a table: what serves, and what is loaded beside it.

=======  ==========  ==========  =======  =========  =======
state    brought     handed      settled  back       discarded
=======  ==========  ==========  =======  =========  =======
ALONE    BESIDE      illegal     illegal  illegal    illegal
BESIDE   illegal     TRIAL       illegal  illegal    ALONE
TRIAL    illegal     illegal     ALONE    ALONE      illegal
=======  ==========  ==========  =======  =========  =======

Rules: pure; an illegal move raises ``RuntimeError`` and changes nothing.  In a trial new jobs go to the new release, and the old
one stands behind it; ``settled`` leaves the new one alone, ``back`` the old one.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

R = TypeVar("R")


class PairState(StrEnum):
    ALONE = "alone"
    BESIDE = "beside"
    TRIAL = "trial"


@dataclass(frozen=True, slots=True)
class Pair(Generic[R]):
    """``old``: the confirmed release, ``None`` where none could be loaded; ``new``: the one that was brought beside it."""

    old: R | None = None
    new: R | None = None
    state: PairState = PairState.ALONE

    @property
    def serving(self) -> R | None:
        """Where new jobs go."""
        return self.new if self.state is PairState.TRIAL else self.old

    @property
    def held(self) -> tuple[R, ...]:
        return tuple(each for each in (self.old, self.new) if each is not None)

    def brought(self, new: R) -> Pair[R]:
        self.must_be(PairState.ALONE, "bring a release")
        return Pair(self.old, new, PairState.BESIDE)

    def handed(self) -> Pair[R]:
        self.must_be(PairState.BESIDE, "hand over")
        return Pair(self.old, self.new, PairState.TRIAL)

    def settled(self) -> Pair[R]:
        self.must_be(PairState.TRIAL, "settle")
        return Pair(self.new)

    def back(self) -> Pair[R]:
        self.must_be(PairState.TRIAL, "hand back")
        return Pair(self.old)

    def discarded(self) -> Pair[R]:
        self.must_be(PairState.BESIDE, "discard a release")
        return Pair(self.old)

    def must_be(self, state: PairState, to: str) -> None:
        if self.state is not state:
            raise RuntimeError(f"to {to}, a model must be {state.value}, and it is {self.state.value}")
