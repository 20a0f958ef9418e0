"""Answers that are not in the outbox, and the deliveries that wait for them.

Owns the way out when the ledger has no room for a request, and when an old answer is asked for again.  Rules: the broker
keeps the request until it has the answer, so nothing is lost in between; one answer waits for a delivery, however often the
broker repeats it, so the table is as bounded as what a broker may have under way; a connection's end voids all of it,
because the broker then delivers again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from edge_agent.node.events import Acknowledge, Publish
from edge_agent.transport.link import Message


@dataclass(frozen=True, slots=True)
class _Return:
    token: int
    message: Message


class Returns:
    def __init__(self, tickets: Iterator[int]) -> None:
        self._tickets = tickets
        self._under_way: dict[int, _Return] = {}
        self._refused: list[_Return] = []
        self._tokens: set[int] = set()

    def __len__(self) -> int:
        return len(self._tokens)

    def holds(self, token: int) -> bool:
        """Is the delivery of this token acknowledged by what comes later?"""
        return token in self._tokens

    def give(self, token: int, message: Message) -> Iterator[Publish]:
        """Answer a delivery, unless that is under way; ``token`` is 0 if the broker keeps nothing."""
        if not token:
            yield Publish(message)
        elif token not in self._tokens:
            self._tokens.add(token)
            yield self._send(_Return(token, message))

    def confirmed(self, ticket: int) -> Iterator[Acknowledge]:
        """The broker has the message of this ticket."""
        if ticket in self._under_way:
            token = self._under_way.pop(ticket).token
            self._tokens.discard(token)
            yield Acknowledge(token)

    def rejected(self, ticket: int) -> None:
        """The link would not take it: ``retry`` does it again."""
        if ticket in self._under_way:
            self._refused.append(self._under_way.pop(ticket))

    def retry(self) -> Iterator[Publish]:
        refused, self._refused = self._refused, []
        for each in refused:
            yield self._send(each)

    def restart(self) -> None:
        """The connection has ended, and with it its tokens."""
        self._under_way.clear()
        self._refused.clear()
        self._tokens.clear()

    def _send(self, each: _Return) -> Publish:
        ticket = next(self._tickets)
        self._under_way[ticket] = each
        return Publish(each.message, ticket)
