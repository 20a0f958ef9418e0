"""The agent's own release, carried out by the agent that it takes over from, or that it is.

Owns ``AgentTurns``: the slots in the ledger and the launcher's record, kept in step.  Rules:

* Of a confirmation and of a roll back the ledger is told first, of the way back to an older release the launcher's record; where
  the power failed between the two, the next start makes them agree.
* What the launcher says of who is confirmed is so: it starts that agent.  What the ledger gave up is not tried on.
* A move that the table has not is an ``UnavailableError`` here: the updates go on without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

from edge_agent.core.config import OtaSection
from edge_agent.core.errors import UnavailableError
from ota.agent_slots import TRIAL_S, held
from ota.launcher import State as Beside
from ota.manifest import AGENT, Release, encode_release
from ota.slots import FACTORY, Held, IllegalMoveError, ModelSlots, State

SUBJECT = "agent's own release"


class AgentHouse(Protocol):
    """What this needs of ``ota.agent_slots``."""

    @property
    def running(self) -> Held: ...

    @property
    def on_trial(self) -> bool: ...

    @property
    def record(self) -> Any: ...

    async def install(self, release: Release, wheels: Mapping[str, Path]) -> None: ...

    def recover(self) -> None: ...

    def try_(self, boots: int, trial_s: int) -> None: ...

    def give_up(self) -> None: ...

    def go_back(self, why: str) -> None: ...

    def confirm(self) -> None: ...

    def roll_back(self, why: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Agreed:
    """``slots`` as the ledger is to have them; ``running``: the release that this agent is of; ``why`` the one on trial did not
    stay, if it did not; ``leave``: why this agent, which is on trial, is not to be."""

    slots: ModelSlots
    running: int = FACTORY
    why: str = ""
    leave: str = ""


class AgentTurns:
    """``house``: ``None`` for an agent that no launcher started. Every method but ``recover`` raises ``SlyError`` for what cannot
    be done; nothing has changed then."""

    def __init__(self, house: AgentHouse | None, config: OtaSection) -> None:
        self._house, self._config = house, config

    def recover(self) -> None:
        """What an agent before this one had begun is given up."""
        if self._house is not None:
            self._house.recover()

    def agree(self, slots: ModelSlots) -> Agreed:
        """At a start, when the starts within a trial were counted."""
        if self._house is None:
            return Agreed(slots, why="this agent was not started by ota.launcher, which could go back")
        with _legal():
            return self._as_tried(slots) if self._house.on_trial else self._as_confirmed(slots)

    def _as_tried(self, slots: ModelSlots) -> Agreed:
        house = self._there()
        if slots.confirmed == house.running:
            house.confirm()
        elif slots.state is not State.TRIAL or slots.candidate != house.running:
            return Agreed(slots, house.running.number, leave=slots.why or "the ledger knows of no trial of it")
        return Agreed(slots, house.running.number)

    def _as_confirmed(self, slots: ModelSlots) -> Agreed:
        house = self._there()
        if house.record.state is Beside.TRIAL:
            house.roll_back("it could not be started")
        record = house.record
        confirmed = held(record.confirmed)
        if slots.confirmed != confirmed:
            slots = _following(slots, confirmed, held(record.previous) if record.previous else None)
        if record.state is Beside.READY and slots.state is not State.TRIAL:
            house.give_up()
        was_left = record.state is Beside.ROLLED_BACK and slots.candidate == held(record.candidate)
        return Agreed(slots, house.running.number, record.why if was_left else "")

    async def install(self, release: Release, wheels: Mapping[str, Path]) -> None:
        """Into the slot beside this agent; nothing is built anew that lies there whole."""
        house = self._there()
        wanted, beside = Held(release.number, sha256(encode_release(release)).digest()), house.record
        if beside.state is Beside.READY and held(beside.candidate) == wanted:
            return
        with _legal():
            await house.install(release, wheels)

    def turn(self) -> None:
        """The next start takes what was installed. It has the time that it needs to be confirmed, and as much again."""
        with _legal():
            self._there().try_(self._config.trial_boots, max(TRIAL_S, 2 * self._config.confirm_s))

    def go_back(self) -> None:
        """The next start takes the agent that was confirmed before."""
        with _legal():
            self._there().go_back("the fleet goes back")

    def settle(self) -> None:
        """This agent, which was on trial, stays."""
        with _legal():
            if self._there().on_trial:
                self._there().confirm()

    def turn_back(self, why: str) -> bool:
        """What was on trial, or would be, is not: must this agent end, for it is that?"""
        if self._house is None:
            return False
        was_on_trial, state = self._house.on_trial, self._house.record.state
        with _legal():
            if state is Beside.TRIAL:
                self._house.roll_back(why)
            elif state is Beside.READY:
                self._house.give_up()
        return was_on_trial

    def _there(self) -> AgentHouse:
        if self._house is None:
            raise UnavailableError(
                SUBJECT, "this agent runs in no A/B environment", "start it by ota.launcher: docs/self-update.md"
            )
        return self._house


@contextmanager
def _legal() -> Iterator[None]:
    try:
        yield
    except IllegalMoveError as error:
        raise UnavailableError(SUBJECT, str(error)) from error


def _following(slots: ModelSlots, confirmed: Held, previous: Held | None) -> ModelSlots:
    """The slots with another confirmed release; its floor is never lower."""
    floor = max(slots.floor, confirmed.number)
    if slots.candidate == confirmed:
        return ModelSlots(AGENT, confirmed, previous, floor=floor)
    return replace(slots, confirmed=confirmed, previous=previous, floor=floor)
