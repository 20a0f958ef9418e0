"""What this board owes to others: published in order, forgotten when the broker has taken it.

Rules: the ledger is the mailbox; only a window of it is in flight at a time, so that a long absence costs no memory.  A
reconnect starts the window anew: a message that was in flight may arrive twice, and its receiver drops it by its id.  An
answer that the ledger has no room for becomes a short one that says so, and waits here until there is room; until then its
request counts as unanswered, so a restart loses nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

from edge_agent.core.errors import UnavailableError
from edge_agent.core.values import InferenceResult, Status, failure
from edge_agent.node.events import Effect, Log, Publish
from edge_agent.node.voice import Voice
from edge_agent.store.ledger import Ledger, Owed
from edge_agent.transport.link import Message

WINDOW_MESSAGES = 32


class Mailbox:
    def __init__(self, ledger: Ledger, voice: Voice) -> None:
        self._ledger, self._voice = ledger, voice
        self._in_flight: dict[int, str] = {}
        self._unkept: dict[str, Owed] = {}
        self._last_ticket = 0
        self._more = True

    def __len__(self) -> int:
        """How many answers wait here because the ledger has no room."""
        return len(self._unkept)

    @property
    def congested(self) -> str:
        """Why nothing more should be taken in that has to be answered through here; empty if it may."""
        return f"{len(self._unkept)} answers found no room in the ledger" if self._unkept else ""

    def answer(self, key: str, addressee: str, result: InferenceResult, expiry_s: int) -> Iterator[Effect]:
        """The request of this key has its answer: remember it, and owe it to ``addressee``."""
        try:
            self._keep(key, self._voice.answer(result, addressee, key, expiry_s))
        except UnavailableError as error:
            yield Log(f"the answer to {key} is not kept: {error}")
            short = failure(result.request_id, Status.FAILED, result.board, f"there was no room to keep the answer: {error}")
            self._unkept[key] = self._voice.answer(short, addressee, key, expiry_s)

    def is_under_way(self, key: str) -> bool:
        """Is the answer to this key on its way to the broker, in a message that is repeated until it arrives?"""
        return key in self._in_flight.values()

    def restart(self) -> None:
        """A new connection: whatever the last one did not confirm goes out again."""
        self._in_flight.clear()
        self._last_ticket = 0
        self._more = True

    def confirmed(self, ticket: int) -> None:
        """The broker has the message of this ticket."""
        if self._in_flight.pop(ticket, None) is not None:
            self._ledger.delivered(ticket)
            self._keep_unkept()

    def rejected(self, ticket: int) -> None:
        """The link would not take the message of this ticket: it stays owed, and is tried again after a ``retry``."""
        if self._in_flight.pop(ticket, None) is not None:
            self._last_ticket = min(self._last_ticket, ticket - 1)
            self._more = False

    def retry(self) -> None:
        """Some time has passed: what was rejected, or found no room, may be tried again."""
        self._more = True
        self._keep_unkept()

    def to_publish(self) -> Iterator[Publish]:
        """The next owed messages that fit into the window."""
        room = WINDOW_MESSAGES - len(self._in_flight)
        if not self._more or room <= 0:
            return
        found = self._ledger.owed(room, after=self._last_ticket)
        self._more = bool(found)
        for ticket, owed in found:
            self._last_ticket = ticket
            if ticket not in self._in_flight:
                self._in_flight[ticket] = owed.key
                yield Publish(Message(owed.topic, owed.payload, expiry_s=owed.expiry_s, correlation=owed.correlation), ticket)

    def _keep(self, key: str, owed: Owed) -> None:
        self._ledger.answer(key, owed.payload, owed)
        self._more = True

    def _keep_unkept(self) -> None:
        while self._unkept:
            key, owed = next(iter(self._unkept.items()))
            try:
                self._keep(key, owed)
            except UnavailableError:
                return
            del self._unkept[key]
