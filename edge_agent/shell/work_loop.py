"""The work loop: events in, one decision at a time, effects out.

Rules: the ledger's transaction closes before any effect is carried out; an event that comes while a decision is under way waits
for the next one; a decision that is lost half-way ends the loop for good, for the node and the ledger may differ then, and only a
new start makes them agree.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from edge_agent.core.clock import Clock
from edge_agent.node.events import Effect, Event
from edge_agent.node.node import Node
from edge_agent.store.ledger import Ledger


class WorkLoop:
    """``fault`` is told, in a line, of a decision that was lost."""

    def __init__(
        self, node: Node, ledger: Ledger, clock: Clock, carry_out: Callable[[Effect], None], fault: Callable[[str], None]
    ) -> None:
        self._node, self._ledger, self._clock = node, ledger, clock
        self._carry_out, self._fault = carry_out, fault
        self._events: deque[Event] = deque()
        self._pumping = self._closed = False
        self._heard = asyncio.Event()
        self.broken = False
        """A decision was lost half-way."""

    def recover(self) -> None:
        """Take up what the ledger holds from before this start."""
        self._carry_out_all(self._decide(lambda: self._node.recover(self._clock.monotonic_us())))

    def feed(self, event: Event) -> None:
        """Take in an event; decide at once unless a decision is under way."""
        self._events.append(event)
        if self._pumping or self.broken or self._closed:
            return
        self._pumping = self.broken = True
        try:
            while self._events:
                self._carry_out_all(self._decide(self._handle_waiting))
            self.broken = False
        finally:
            self._pumping = False
            self._heard.set()
            if self.broken:
                self._fault(
                    "a decision could not be made durable: stopping, so that the next start takes up what the ledger holds"
                )

    async def until(self, holds: Callable[[], bool]) -> None:
        """Return when ``holds()``, which is looked at after every decision."""
        while not holds():
            self._heard.clear()
            await self._heard.wait()

    def close(self) -> None:
        """Decide nothing more."""
        self._closed = True

    def _handle_waiting(self) -> list[Effect]:
        effects: list[Effect] = []
        now_us = self._clock.monotonic_us()
        while self._events:
            effects += self._node.handle(self._events.popleft(), now_us)
        return effects

    def _decide(self, step: Callable[[], list[Effect]]) -> list[Effect]:
        with self._ledger.transaction():
            return step()

    def _carry_out_all(self, effects: list[Effect]) -> None:
        for effect in effects:
            self._carry_out(effect)
