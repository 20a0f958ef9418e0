"""Serving while nothing can be kept: another ledger, in memory, and another node on it, until the disk is good again.

Owns the ledger that the node decides on.  Rules: what a board promised it promised on its own ledger, so without that it promises
nothing: it leaves the fleet, attests to nothing, signs no receipt, and says so; engines, sockets and what is asked of them stay.
A ledger that failed is closed and read anew from the disk: what this process believed of it is not trusted.  One that is damaged,
or another process's, is no disk that failed, and stops the agent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from edge_agent.core.chat import TurnEnd
from edge_agent.core.errors import SlyError, UnavailableError
from edge_agent.core.values import MAX_REASON_CHARS, InferenceResult, Status
from edge_agent.node.events import Event
from edge_agent.node.node import Node
from edge_agent.shell.state_disk import LEDGER_NAME, LedgerInMemory, is_of_the_disk, why_not_kept
from edge_agent.shell.under_way import UnderWay
from edge_agent.store.ledger import Ledger

LOOK_S = 10.0
SOON_LOOKS = 30
"""A ledger that fails again within so many looks is given twice as many to rest as before, at most so many."""
NOTHING_KEPT = "nothing can be kept"


class Inhabitants(Protocol):
    """The agent around its ledger."""

    node: Node

    def decide_by(self, node: Node, ledger: Ledger, first: Sequence[Event]) -> None:
        """``node`` decides from now on, first of these events.

        Raises ``UnavailableError`` when its ledger fails too: the node before decides on.
        """
        ...

    def node_on(self, ledger: Ledger) -> Node:
        """A node of a boot that begins now. Raises ``SlyError``."""
        ...

    def leave_fleet(self, why: str) -> None: ...

    def return_to_fleet(self, ledger: Ledger) -> None:
        """The node is the one on ``ledger`` already."""
        ...

    def begin_anew(self, why: str) -> None:
        """End, and begin with the state folder as it is now."""
        ...


class Standby:
    """``open``, then ``watch_for_ever`` as a task, ``close``.

    ``why``: empty while what is decided is kept; ``disk``: what ailed the state folder when it was last looked at.
    """

    def __init__(self, folder: Path, agent: Inhabitants, under_way: UnderWay, say: Callable[[str], None]) -> None:
        self._folder, self._agent, self._under_way, self._say = folder, agent, under_way, say
        self._ledger: Ledger | None = None
        self._began_without = False
        self._looks = self._kept_since = self._due = 0
        """How often the disk was looked at; which of those brought the ledger back, and which may next."""
        self._rest = 1
        self.why = self.disk = self._said = ""

    def open(self) -> Ledger:
        """The ledger of the state folder, or one in memory if its disk fails.

        Raises ``SlyError`` for what no disk is to blame for.
        """
        try:
            self._ledger = Ledger(self._folder / LEDGER_NAME)
        except UnavailableError as error:
            return self.open_in_memory(error)
        self._keep_room()
        return self._ledger

    def open_in_memory(self, error: UnavailableError) -> Ledger:
        """The same when the disk fails later in the start. Raises ``error`` itself if no disk is behind it."""
        if not is_of_the_disk(error):
            raise error
        self.close()
        self._ledger, self._began_without = LedgerInMemory(), True
        self.why = f"{NOTHING_KEPT}: {error}"
        self._say(f"{self.why}; serving alone, without receipts, with the models that set-up left, until the disk is good again")
        return self._ledger

    def close(self) -> None:
        """May be called twice."""
        if self._ledger is not None:
            self._ledger.close()

    def lost(self, error: UnavailableError, events: Sequence[Event]) -> bool:
        """A decision about ``events`` could not be kept: go on without keeping any. ``False`` if not even that can be done."""
        if self.why:
            return False
        old = self._agent.node
        try:
            memory = LedgerInMemory()
        except UnavailableError as no_memory:
            self._say(str(no_memory))
            return False
        self.why = f"{NOTHING_KEPT}: {error}"
        self._say(f"{self.why}; serving goes on alone and without receipts until the disk is good again")
        failed_soon = self._kept_since and self._looks - self._kept_since < SOON_LOOKS
        self._rest = min(2 * self._rest, SOON_LOOKS) if failed_soon else 1
        self._due = self._looks + self._rest
        self._agent.leave_fleet(self.why)
        self.close()
        self._ledger = memory
        self._go_on_with(Node(replace(old.settings, attest=None), memory), memory, events)
        return True

    async def watch_for_ever(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            await self.look()

    async def look(self) -> None:
        """Ask the disk, say what has changed, and go back to what can be kept as soon as it can."""
        before, self.disk = self.disk, await asyncio.to_thread(why_not_kept, self._folder)
        self._looks += 1
        if self.disk and self.disk != before:
            rest = "" if self.why else "; the ledger goes on in the room that it has"
            self._say(f"the state folder takes nothing: {self.disk}{rest}")
        elif before and not self.disk:
            self._say(f"{self._folder} takes again what is written to it")
        if self.why and not self.disk and self._looks >= self._due:
            self._keep_again()
        elif before and not self.disk and not self.why:
            self._keep_room()

    def told(self) -> dict[str, object]:
        """For whoever asks how this board is."""
        return {"kept": not self.why, "disk": self.ails()}

    def ails(self) -> str:
        """What ails the state folder; empty while what is decided is kept and it takes what is written to it."""
        return self.why or self.disk

    def excused(self, result: InferenceResult) -> InferenceResult:
        """A good answer without a receipt says why it has none."""
        if not self.why or result.receipt or result.status is not Status.OK:
            return result
        return replace(result, reason=f"no receipt: {self.why}"[:MAX_REASON_CHARS])

    def excused_end(self, end: TurnEnd) -> TurnEnd:
        """The same of a turn."""
        return replace(end, notes=(*end.notes, f"no receipt: {self.why}")) if self.why and not end.receipt else end

    def _keep_again(self) -> None:
        if self._began_without:
            self._agent.begin_anew(f"{self._folder} takes again what is written to it")
            return
        try:
            ledger, node = self._reopened()
        except SlyError as error:
            self._say_again(f"the ledger cannot be used yet: {error}")
            return
        memory, why = self._ledger, self.why
        self._ledger, self.why = ledger, ""
        self._keep_room()
        try:
            self._go_on_with(node, ledger, [])
        except UnavailableError as error:
            ledger.close()
            self._ledger, self.why = memory, why
            self._say_again(f"the ledger cannot be used yet: {error}")
            return
        if memory is not None:
            memory.close()
        self._said, self._kept_since = "", self._looks
        self._say(f"what is decided is kept again, as boot {node.settings.boot_epoch}")
        self._agent.return_to_fleet(ledger)

    def _reopened(self) -> tuple[Ledger, Node]:
        ledger = Ledger(self._folder / LEDGER_NAME)
        try:
            return ledger, self._agent.node_on(ledger)
        except SlyError:
            ledger.close()
            raise

    def _go_on_with(self, node: Node, ledger: Ledger, lost: Sequence[Event]) -> None:
        first = self._under_way.carried_over(self._agent.node, lost)
        self._agent.decide_by(node, ledger, first)
        self._under_way.carried()

    def _say_again(self, text: str) -> None:
        if text != self._said:
            self._said = text
            self._say(text)

    def _keep_room(self) -> None:
        if self._ledger is not None and (why := self._ledger.keep_room()):
            self._say(f"the ledger has no room of its own for a full disk: {why}")
