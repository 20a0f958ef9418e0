"""What clients of this process wait for and what its engines do, whichever node decides about it.

Owns what must not be lost when one node takes the place of another.  Rules: whoever was taken in gets an answer; a job that an
engine has already is not begun a second time; the time that a request has waited counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from edge_agent.core.clock import Clock
from edge_agent.node.events import (
    Abandoned,
    Drain,
    Effect,
    Event,
    Execute,
    Executed,
    Hosted,
    KvChanged,
    Reply,
    Submitted,
    Withdrawn,
)
from edge_agent.node.node import Node
from edge_agent.transport.link import Delivered, LinkDown, LinkUp, Published, Rejected

OF_THE_LINK = (LinkUp, LinkDown, Delivered, Published, Rejected)


class UnderWay:
    """``hear`` every event before it is decided about, ask ``lets`` of every effect before it is carried out."""

    def __init__(self, board: str, clock: Clock) -> None:
        self._board, self._clock = board, clock
        self._asked: dict[int, tuple[Submitted, int]] = {}
        """By handle, with when it came (µs)."""
        self._begun: set[str] = set()
        self._held: set[str] = set()
        """Jobs that were begun for the node before."""

    def hear(self, event: Event) -> None:
        match event:
            case Submitted(_, handle):
                self._asked[handle] = event, self._clock.monotonic_us()
            case Abandoned(handle):
                self._asked.pop(handle, None)
            case Executed(key):
                self._begun.discard(key)
                self._held.discard(key)

    def lets(self, effect: Effect) -> bool:
        """Whether it is to be carried out: not the beginning of what was begun already."""
        match effect:
            case Reply(handle):
                self._asked.pop(handle, None)
            case Execute(key):
                if key in self._held:
                    self._held.discard(key)
                    return False
                self._begun.add(key)
        return True

    def carried_over(self, old: Node, lost: Iterable[Event]) -> list[Event]:
        """What the node after ``old`` must be told first, of which ``lost`` is what ``old`` was told and may not have decided."""
        kept = [each for each in lost if not isinstance(each, (*OF_THE_LINK, Submitted))]
        done = {each.key for each in kept if isinstance(each, Executed)}
        self._held = self._begun | done
        asked = [self._again(*each) for each in self._asked.values()]
        held = [each for each in asked if f"{self._board}/{each.request.request_id}" in self._held]
        return [*_state_of(old), *held, *kept, *(each for each in asked if each not in held)]

    def carried(self) -> None:
        """The new node has been told: what it has not begun anew, and no engine has any more, is begun when it says so."""
        self._held &= self._begun

    def _again(self, event: Submitted, came_us: int) -> Submitted:
        limits = event.request.limits
        left_us = max(1, limits.deadline_us - (self._clock.monotonic_us() - came_us))
        return Submitted(replace(event.request, limits=replace(limits, deadline_us=left_us)), event.handle)


def _state_of(node: Node) -> Iterator[Event]:
    """What is hosted and known here."""
    yield from map(Hosted, node.execution.offers.values())
    yield from (Withdrawn(model, reason) for model, reason in node.execution.withdrawn.items())
    yield from map(KvChanged, node.execution.kv.values())
    yield node.sensed
    if node.draining:
        yield Drain()
