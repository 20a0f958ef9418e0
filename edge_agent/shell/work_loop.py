"""The work loop: events in, one decision at a time, effects out.

Rules: the ledger's transaction closes before any effect is carried out; an event that comes while a decision is under way waits
for the next one; a decision that is lost half-way is the last of its node, for the node and the ledger may differ then: another
node, on another ledger, takes over, or the loop ends for good and only a new start makes them agree.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from edge_agent.core.clock import Clock
from edge_agent.core.errors import UnavailableError
from edge_agent.node.events import Effect, Event
from edge_agent.node.node import Node
from edge_agent.store.ledger import Ledger

Lost = Callable[[UnavailableError, Sequence[Event]], bool]
"""Told of a decision that the ledger's disk did not keep, and of what it was about; ``True`` if another node took over."""


class WorkLoop:
    """``fault`` is told, in a line, of a decision that was lost and that nothing makes good."""

    def __init__(
        self, node: Node, ledger: Ledger, clock: Clock, carry_out: Callable[[Effect], None], fault: Callable[[str], None],
        lost: Lost = lambda error, events: False,
    ) -> None:  # fmt: skip
        self._node, self._ledger, self._clock = node, ledger, clock
        self._carry_out, self._fault, self._lost = carry_out, fault, lost
        self._events: deque[Event] = deque()
        self._deciding: list[Event] = []
        self._pumping = self._closed = False
        self._heard = asyncio.Event()
        self.broken = False
        """A decision was lost half-way."""

    def recover(self) -> None:
        """Take up what the ledger holds from before this start."""
        self._pump(lambda: self._node.recover(self._clock.monotonic_us()))

    def feed(self, event: Event) -> None:
        """Take in an event; decide at once unless a decision is under way."""
        self._events.append(event)
        if not self._pumping and not self.broken and not self._closed:
            self._pump(self._handle_waiting)

    def take_over(self, node: Node, ledger: Ledger, first: Iterable[Event]) -> None:
        """``node``, on ``ledger``, decides from now on: of ``first`` first.

        Raises ``UnavailableError`` if that is not kept: all is as before then.
        """
        before, waiting, was_pumping = (self._node, self._ledger), self._events, self._pumping
        self._node, self._ledger, self._events, self._pumping = node, ledger, deque(first), True
        try:
            self._carry_out_all(self._decide(self._handle_waiting))
            waiting = deque([*waiting, *self._events])
        except UnavailableError:
            self._node, self._ledger = before
            raise
        finally:
            self._events, self._pumping = waiting, was_pumping
        if self._events and not was_pumping:
            self._pump(self._handle_waiting)

    async def until(self, holds: Callable[[], bool]) -> None:
        """Return when ``holds()``, which is looked at after every decision."""
        while not holds():
            self._heard.clear()
            await self._heard.wait()

    def close(self) -> None:
        """Decide nothing more."""
        self._closed = True

    def _pump(self, step: Callable[[], list[Effect]]) -> None:
        self._pumping = self.broken = True
        try:
            self._decide_and_act(step)
            while self._events:
                self._decide_and_act(self._handle_waiting)
            self.broken = False
        finally:
            self._pumping = False
            self._heard.set()
            if self.broken:
                self._fault(
                    "a decision could not be made durable: stopping, so that the next start takes up what the ledger holds"
                )

    def _decide_and_act(self, step: Callable[[], list[Effect]]) -> None:
        self._deciding.clear()
        try:
            effects = self._decide(step)
        except UnavailableError as error:
            lost = [*self._deciding, *self._events]
            self._events.clear()
            if not self._lost(error, lost):
                raise
            return
        self._carry_out_all(effects)

    def _handle_waiting(self) -> list[Effect]:
        effects: list[Effect] = []
        now_us = self._clock.monotonic_us()
        while self._events:
            event = self._events.popleft()
            self._deciding.append(event)
            effects += self._node.handle(event, now_us)
        return effects

    def _decide(self, step: Callable[[], list[Effect]]) -> list[Effect]:
        with self._ledger.transaction():
            return step()

    def _carry_out_all(self, effects: list[Effect]) -> None:
        for effect in effects:
            self._carry_out(effect)
