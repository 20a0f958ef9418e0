"""What this board owes to others: published in order, forgotten when the broker has taken it.

Rules: the ledger is the mailbox; only a window of it is in flight at a time, so that a long absence costs no memory.  A
reconnect starts the window anew: a message that was in flight may arrive twice, and its receiver drops it by its id.
"""

from __future__ import annotations

from collections.abc import Iterator

from edge_agent.node.events import Publish
from edge_agent.store.ledger import Ledger, Owed
from edge_agent.transport.link import Message

WINDOW_MESSAGES = 32


class Mailbox:
    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._in_flight: set[int] = set()
        self._last_ticket = 0
        self._more = True

    def answer(self, key: str, owed: Owed) -> None:
        """The request of this key has its answer: remember it, and owe it."""
        self._ledger.answer(key, owed.payload, owed)
        self._more = True

    def restart(self) -> None:
        """A new connection: whatever the last one did not confirm goes out again."""
        self._in_flight.clear()
        self._last_ticket = 0
        self._more = True

    def confirmed(self, ticket: int) -> None:
        """The broker has the message of this ticket."""
        if ticket in self._in_flight:
            self._in_flight.remove(ticket)
            self._ledger.delivered(ticket)

    def rejected(self, ticket: int) -> None:
        """The link would not take the message of this ticket: it stays owed and is tried again."""
        if ticket in self._in_flight:
            self._in_flight.remove(ticket)
            self._last_ticket = min(self._last_ticket, ticket - 1)

    def retry(self) -> None:
        """Some time has passed: what was rejected may be tried again."""
        self._more = True

    def to_publish(self) -> Iterator[Publish]:
        """The next owed messages that fit into the window."""
        room = WINDOW_MESSAGES - len(self._in_flight)
        if not self._more or not room:
            return
        found = self._ledger.owed(room, after=self._last_ticket)
        self._more = len(found) == room
        for ticket, owed in found:
            self._last_ticket = ticket
            if ticket in self._in_flight:
                continue
            self._in_flight.add(ticket)
            yield Publish(Message(owed.topic, owed.payload, expiry_s=owed.expiry_s, correlation=owed.correlation), ticket)
