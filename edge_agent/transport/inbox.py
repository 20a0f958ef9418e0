"""How a network thread hands events to the asyncio loop: in order, in batches, and never more than a bound.

Rules:

* One ``call_soon_threadsafe`` is under way at a time, however many events wait for it.
* When too much waits, the oldest waiting QoS 0 message goes (its next period brings a newer one) and is counted.  Without
  one, the network thread waits: it stops reading, and TCP slows the broker down.
* After ``close`` nothing is delivered.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable

from edge_agent.transport.link import Delivered, LinkEvent

MAX_WAITING_EVENTS = 1024
MAX_WAITING_BYTES = 16 * 2**20
BATCH_EVENTS = 64
"""Delivered in one turn of the loop, so that timers and sockets get theirs."""


def _size_bytes(event: LinkEvent) -> int:
    return len(event.message.payload) if isinstance(event, Delivered) else 0


class Inbox:
    """Carries events from one network thread to ``receive``, which runs on ``loop``."""

    def __init__(self, loop: asyncio.AbstractEventLoop, receive: Callable[[LinkEvent], None]) -> None:
        self._loop, self._receive = loop, receive
        self._changed = threading.Condition()
        self._events: deque[LinkEvent] = deque()
        self.waiting_bytes = 0
        self._scheduled = self._closed = False
        self.dropped = 0

    def put(self, event: LinkEvent) -> None:
        """From the network thread. Waits while the bounds are reached, until the loop has taken something or ``close``."""
        size_bytes = _size_bytes(event)
        with self._changed:
            while not self._closed and self._full(size_bytes):
                if not self._drop_oldest_qos0():
                    self._changed.wait()
            if self._closed:
                return
            self._events.append(event)
            self.waiting_bytes += size_bytes
            if not self._scheduled:
                self._scheduled = self._schedule()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._events.clear()
            self._changed.notify_all()

    def _full(self, more_bytes: int) -> bool:
        return bool(self._events) and (
            len(self._events) >= MAX_WAITING_EVENTS or self.waiting_bytes + more_bytes > MAX_WAITING_BYTES
        )

    def _drop_oldest_qos0(self) -> bool:
        for i, event in enumerate(self._events):
            if isinstance(event, Delivered) and event.message.qos == 0:
                del self._events[i]
                self.waiting_bytes -= _size_bytes(event)
                self.dropped += 1
                return True
        return False

    def _schedule(self) -> bool:
        try:
            self._loop.call_soon_threadsafe(self._drain)
        except RuntimeError:  # the loop is closed: nobody is left to deliver to
            self._closed = True
            return False
        return True

    def _take(self) -> LinkEvent | None:
        with self._changed:
            if not self._events:
                self._scheduled = False
                return None
            event = self._events.popleft()
            self.waiting_bytes -= _size_bytes(event)
            self._changed.notify_all()
            return event

    def _drain(self) -> None:
        try:
            for _ in range(BATCH_EVENTS):
                event = self._take()
                if event is None:
                    return
                self._receive(event)
        finally:
            with self._changed:
                if self._scheduled:
                    self._scheduled = self._schedule()
