"""A broker in memory, on a clock that is passed in: the simulator's network and the contract's model.

Behaves as MQTT 5 does where the product can see it: sessions and their expiry, QoS 0 and 1, retained messages, wills with
delay, message expiry, wildcards, receive maximum, takeover of a client id, keepalive.  Rules:

* Everything happens in timers of the clock and is drawn from one seed, so a seed reproduces a run.
* A link and the broker learn of each other's silence separately, after ``keepalive_us`` and one and a half of it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from typing import Protocol

from edge_agent.core.clock import TimedClock, Timer
from edge_agent.core.values import bounded
from edge_agent.transport.backoff import BackoffLimits
from edge_agent.transport.faults import Faults, Partition, Way, Wire
from edge_agent.transport.link import RECEIVE_MAXIMUM, Message, Will, matches

MAX_QUEUED_MESSAGES = 1000
"""For one session, as in Mosquitto's default; the newest gives way."""
MAX_CACHED_ROUTES = 4096
MAX_INTERVAL_US = 2**53


@dataclass(frozen=True, slots=True)
class LoopbackOptions:
    keepalive_us: int = 15_000_000
    connect_timeout_us: int = 5_000_000
    session_expiry_us: int = 3_600_000_000
    backoff: BackoffLimits = BackoffLimits()

    def __post_init__(self) -> None:
        bounded("keepalive_us", self.keepalive_us, 1, MAX_INTERVAL_US, "µs")
        bounded("connect_timeout_us", self.connect_timeout_us, 1, MAX_INTERVAL_US, "µs")
        bounded("session_expiry_us", self.session_expiry_us, 0, MAX_INTERVAL_US, "µs")


class Client(Protocol):
    """What the broker tells a link, when it arrives there; see ``loopback.LoopbackLink``."""

    @property
    def client_id(self) -> str: ...
    @property
    def options(self) -> LoopbackOptions: ...
    def accept(self, connection: int, session_present: bool) -> None: ...
    def lose(self, connection: int, reason: str) -> None: ...
    def take(self, connection: int, packet_id: int, message: Message) -> bool: ...
    def confirm(self, connection: int, packet_id: int) -> None: ...
    def transmit(self, connection: int, packet_id: int) -> None: ...


@dataclass(slots=True)
class _Kept:
    """A message in the broker's hands, with the time at which it is worth nothing any more."""

    message: Message
    expires_us: int | None

    def fresh(self, now_us: int) -> Message | None:
        """The message with what is left of its expiry; ``None`` when it is over."""
        if self.expires_us is None:
            return self.message
        if now_us >= self.expires_us:
            return None
        return replace(self.message, expiry_s=-(-(self.expires_us - now_us) // 1_000_000))


@dataclass(slots=True)
class _Session:
    client_id: str
    options: LoopbackOptions
    will: Will | None = None
    link: Client | None = None
    """Whose connection it is now; ``None`` while the client is away."""
    connection: int = 0
    subscriptions: dict[str, int] = field(default_factory=dict)
    queue: deque[_Kept] = field(default_factory=deque)
    unacknowledged: dict[int, _Kept] = field(default_factory=dict)
    last_packet_id: int = 0
    expiry: Timer | None = None
    will_due: Timer | None = None

    def next_packet_id(self) -> int:
        self.last_packet_id = self.last_packet_id % 65535 + 1
        return self.last_packet_id


class LoopbackBroker:
    """``wire.faults`` may be exchanged at any time; ``partition`` and ``heal``, ``stop`` and ``start`` act at once."""

    def __init__(self, clock: TimedClock, seed: int | str = 0, faults: Faults | None = None) -> None:
        self.clock, self.seed = clock, seed
        self.wire = Wire(clock, seed, faults or Faults())
        self.running = True
        self._retained: dict[str, _Kept] = {}
        self._sessions: dict[str, _Session] = {}
        self._routes: dict[str, list[tuple[_Session, int]]] = {}

    def partition(self, partition: Partition) -> None:
        """Cut links off, in place of the partition that was. Both sides notice by and by."""
        self.wire.partition(partition)
        for session in self._sessions.values():
            self._watch_silence(session)

    def heal(self) -> None:
        self.wire.partition(Partition())

    def stop(self) -> None:
        """The broker's process ends: connections break, and no wills are sent."""
        self.running = False
        for session in self._sessions.values():
            cancel(session.expiry, session.will_due)
            session.expiry = session.will_due = None
            if session.link is not None:
                self._tell_lost(session.link, session.connection, "the broker closed the connection without a reason")
            session.link, session.will = None, None

    def start(self, keep_sessions: bool = True, keep_retained: bool = True) -> None:
        """It is back, with or without what it knew."""
        self.running = True
        self._routes.clear()
        if not keep_sessions:
            self._sessions.clear()
        if not keep_retained:
            self._retained.clear()
        for session in self._sessions.values():
            self._count_down(session)

    def _watch_silence(self, session: _Session) -> None:
        """Of a session that is cut off, both sides notice, each in its time, unless the partition changes before."""
        link, connection, keepalive_us = session.link, session.connection, session.options.keepalive_us
        if link is None or not self.wire.cuts(session.client_id):
            return
        epoch = self.wire.epoch

        def link_notices() -> None:
            if self.wire.epoch == epoch:
                link.lose(connection, "no answer within the keepalive time")

        def broker_notices() -> None:
            if self.wire.epoch == epoch:
                self.gone(link, connection)

        self.wire.after(keepalive_us, link_notices)
        if self.wire.cuts(session.client_id, Way.TO_BROKER):
            self.wire.after(keepalive_us * 3 // 2, broker_notices)

    def _tell_lost(self, link: Client, connection: int, reason: str) -> None:
        """Repeated while it cannot arrive: a connection that only one side believes in is reset by whatever is sent on it."""
        self.wire.carry(
            link.client_id,
            Way.FROM_BROKER,
            lambda: link.lose(connection, reason),
            lambda: self._tell_lost(link, connection, reason),
        )

    # What a link asks, when it arrives.

    def connect(self, link: Client, connection: int, will: Will | None) -> None:
        if not self.running:
            return
        session = self._sessions.get(link.client_id)
        present = session is not None
        if session is None:
            session = self._sessions[link.client_id] = _Session(link.client_id, link.options)
        elif session.link is not None:
            self._take_over(session)
        cancel(session.expiry, session.will_due)
        session.expiry = session.will_due = None
        session.link, session.connection, session.will, session.options = link, connection, will, link.options
        self.wire.carry(link.client_id, Way.FROM_BROKER, lambda: link.accept(connection, present))
        self._watch_silence(session)
        for packet_id in list(session.unacknowledged):
            self._transmit(session, packet_id)
        self._push(session)

    def _take_over(self, session: _Session) -> None:
        assert session.link is not None
        reason = f"session taken over: another client uses the id {session.client_id!r}; give every board its own"
        self._tell_lost(session.link, session.connection, reason)
        if session.will is not None and not session.will.delay_s:
            self._route(session.will.message)

    def subscribe(self, link: Client, connection: int, topic_filter: str, qos: int) -> None:
        session = self._current(link, connection)
        if session is None:
            return
        session.subscriptions[topic_filter] = qos
        self._routes.clear()
        for topic, kept in list(self._retained.items()):
            if matches(topic_filter, topic):
                self._enqueue(session, kept, min(qos, kept.message.qos))

    def unsubscribe(self, link: Client, connection: int, topic_filter: str) -> None:
        session = self._current(link, connection)
        if session is not None and session.subscriptions.pop(topic_filter, None) is not None:
            self._routes.clear()

    def publish(self, link: Client, connection: int, packet_id: int, message: Message) -> None:
        if self._current(link, connection) is None:
            return
        self._route(message)
        if packet_id:
            self.wire.carry(
                link.client_id,
                Way.FROM_BROKER,
                lambda: link.confirm(connection, packet_id),
                lambda: link.transmit(connection, packet_id),
            )

    def acknowledge(self, link: Client, connection: int, packet_id: int) -> None:
        session = self._current(link, connection)
        if session is not None and session.unacknowledged.pop(packet_id, None) is not None:
            self._push(session)

    def disconnect(self, link: Client, connection: int) -> None:
        """A clean goodbye: the will is forgotten."""
        session = self._current(link, connection)
        if session is not None:
            session.link, session.will = None, None
            self._count_down(session)

    def gone(self, link: Client, connection: int) -> None:
        """The connection ended without a goodbye."""
        session = self._current(link, connection)
        if session is None:
            return
        session.link = None
        will, session.will = session.will, None
        self._count_down(session)
        if will is not None:
            delay_us = min(will.delay_s * 1_000_000, session.options.session_expiry_us)
            session.will_due = self.wire.after(delay_us, lambda: self._route(will.message))

    def retry(self, link: Client, connection: int, packet_id: int) -> None:
        session = self._current(link, connection)
        if session is not None and packet_id in session.unacknowledged:
            self._transmit(session, packet_id)

    def _current(self, link: Client, connection: int) -> _Session | None:
        """The session, if this connection is the one that it has now."""
        session = self._sessions.get(link.client_id)
        return session if session and session.link is link and session.connection == connection else None

    # Sessions and messages.

    def _count_down(self, session: _Session) -> None:
        def expire() -> None:
            if self._sessions.get(session.client_id) is session and session.link is None:
                del self._sessions[session.client_id]
                self._routes.clear()

        session.expiry = self.wire.after(session.options.session_expiry_us, expire)

    def _route(self, message: Message) -> None:
        now_us = self.clock.monotonic_us()
        kept = _Kept(message, None if message.expiry_s is None else now_us + message.expiry_s * 1_000_000)
        if message.retain:
            self._retained.pop(message.topic, None)
            if message.payload:
                self._retained[message.topic] = kept
            kept = _Kept(replace(message, retain=False), kept.expires_us)
        for session, qos in self._subscribers(message.topic):
            self._enqueue(session, kept, min(qos, message.qos))

    def _subscribers(self, topic: str) -> list[tuple[_Session, int]]:
        found = self._routes.get(topic)
        if found is None:
            if len(self._routes) >= MAX_CACHED_ROUTES:
                self._routes.clear()
            found = self._routes[topic] = []
            for session in self._sessions.values():
                granted = [qos for topic_filter, qos in session.subscriptions.items() if matches(topic_filter, topic)]
                if granted:
                    found.append((session, max(granted)))
        return found

    def _enqueue(self, session: _Session, kept: _Kept, qos: int) -> None:
        if qos != kept.message.qos:
            kept = _Kept(replace(kept.message, qos=qos), kept.expires_us)
        if qos == 0:
            self._transmit_once(session, kept)
        elif len(session.queue) < MAX_QUEUED_MESSAGES:
            session.queue.append(kept)
            self._push(session)

    def _push(self, session: _Session) -> None:
        while session.link is not None and session.queue and len(session.unacknowledged) < RECEIVE_MAXIMUM:
            packet_id = session.next_packet_id()
            session.unacknowledged[packet_id] = session.queue.popleft()
            self._transmit(session, packet_id)

    def _transmit(self, session: _Session, packet_id: int) -> None:
        message = session.unacknowledged[packet_id].fresh(self.clock.monotonic_us())
        link, connection = session.link, session.connection
        if link is None:
            return
        if message is None:
            del session.unacknowledged[packet_id]
            return

        def lost() -> None:
            self.retry(link, connection, packet_id)

        def arrive() -> None:
            if not link.take(connection, packet_id, message):
                self.wire.lose(lost)

        self.wire.carry(link.client_id, Way.FROM_BROKER, arrive, lost)

    def _transmit_once(self, session: _Session, kept: _Kept) -> None:
        message = kept.fresh(self.clock.monotonic_us())
        link, connection = session.link, session.connection
        if message is not None and link is not None:
            self.wire.carry(link.client_id, Way.FROM_BROKER, lambda: link.take(connection, 0, message), nothing)


def cancel(*timers: Timer | None) -> None:
    for timer in timers:
        if timer is not None:
            timer.cancel()


def nothing() -> None:
    """What follows when a QoS 0 message is lost."""
