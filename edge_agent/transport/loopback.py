"""A link to the broker in memory.

Rules: the same as for a link over MQTT (tickets and tokens die with their connection, an ended connection is tried again after
a jittered back-off), driven by the broker's clock, so everything that it says comes out of a timer.
"""

from __future__ import annotations

from collections.abc import Callable

from edge_agent.core.clock import Timer
from edge_agent.core.values import CLIENT_ID, checked
from edge_agent.transport.backoff import Backoff
from edge_agent.transport.faults import Delay, Faults, Partition, Way
from edge_agent.transport.link import Delivered, Link, LinkDown, LinkUp, Message, Published, Will
from edge_agent.transport.loopback_broker import LoopbackBroker, LoopbackOptions, cancel, nothing
from edge_agent.transport.owed import Owed

__all__ = ["Delay", "Faults", "LoopbackBroker", "LoopbackLink", "LoopbackOptions", "Partition", "Way"]


class LoopbackLink(Link):
    """A link to a ``LoopbackBroker``; two with one client id take each other's session, as in MQTT."""

    def __init__(self, broker: LoopbackBroker, client_id: str, options: LoopbackOptions = LoopbackOptions()) -> None:  # noqa: B008  (frozen)
        super().__init__()
        self.client_id, self.options = checked(CLIENT_ID, "client id", client_id), options
        self._broker = broker
        self._backoff = Backoff(options.backoff, f"{broker.seed}/{client_id}")
        self._will: Will | None = None
        self._connection = 0
        self._since_us = 0
        self._last_packet_id = 0
        self._sent: dict[int, tuple[Message, int]] = {}
        self._owed = Owed(0)
        self._timer: Timer | None = None

    def crash(self, power_cut: bool = False) -> None:
        """This board's process dies, without a goodbye; after a power cut the broker has to find out by the silence."""
        if not self._opened:
            return
        connection = self._connection
        self._forget()
        self._opened, self._receiver = False, None
        silence_us = self.options.keepalive_us * 3 // 2 if power_cut else 0
        self._broker.wire.after(silence_us, lambda: self._hang_up(connection))

    # From the contract.

    def _open(self, will: Will | None) -> None:
        self._will = will
        self._timer = self._broker.wire.after(0, self._attempt)

    def _subscribe(self, topic_filter: str, qos: int) -> None:
        connection = self._connection

        def send() -> None:
            if connection == self._connection:
                self._carry(lambda: self._broker.subscribe(self, connection, topic_filter, qos), send)

        send()

    def _unsubscribe(self, topic_filter: str) -> None:
        connection = self._connection

        def send() -> None:
            if connection == self._connection:
                self._carry(lambda: self._broker.unsubscribe(self, connection, topic_filter), send)

        send()

    def _publish(self, message: Message, ticket: int) -> None:
        connection = self._connection
        if not message.qos:
            self._carry(lambda: self._broker.publish(self, connection, 0, message), nothing)
            return
        self._last_packet_id = self._last_packet_id % 65535 + 1
        self._sent[self._last_packet_id] = message, ticket
        self.transmit(connection, self._last_packet_id)

    def _acknowledge(self, token: int) -> None:
        connection = self._connection
        for packet_id in self._owed.acknowledge(token):
            self._confirm_delivery(connection, packet_id)

    def _close(self) -> None:
        connection = self._connection
        self._carry(lambda: self._broker.disconnect(self, connection))
        self._forget()

    # From the broker.

    def accept(self, connection: int, session_present: bool) -> None:
        if connection == self._connection and not self._up and self._opened:
            cancel(self._timer)
            self._since_us = self._broker.clock.monotonic_us()
            self._emit(LinkUp(session_present))

    def lose(self, connection: int, reason: str) -> None:
        """This connection ended, or never came about."""
        if connection != self._connection or not self._opened:
            return
        lasted_us = self._broker.clock.monotonic_us() - self._since_us if self._up else 0
        self._hang_up(connection)
        self._forget()
        wait_us = self._backoff.after(lasted_us)
        self._timer = self._broker.wire.after(wait_us, self._attempt)
        self._emit(LinkDown(reason, wait_us))

    def take(self, connection: int, packet_id: int, message: Message) -> bool:
        """A message comes in; ``False`` if this connection cannot take it now."""
        if connection != self._connection or not self._up:
            return False
        self._emit(Delivered(message, self._owed.deliver(packet_id) if packet_id else 0))
        return True

    def confirm(self, connection: int, packet_id: int) -> None:
        if connection == self._connection and packet_id in self._sent:
            self._emit(Published(self._sent.pop(packet_id)[1]))

    def transmit(self, connection: int, packet_id: int) -> None:
        """Send a publication, or send it again, unless it was confirmed meanwhile."""
        if connection == self._connection and packet_id in self._sent:
            message = self._sent[packet_id][0]
            self._carry(
                lambda: self._broker.publish(self, connection, packet_id, message),
                lambda: self.transmit(connection, packet_id),
            )

    def _confirm_delivery(self, connection: int, packet_id: int) -> None:
        self._carry(
            lambda: self._broker.acknowledge(self, connection, packet_id),
            lambda: self._broker.retry(self, connection, packet_id),
        )

    def _attempt(self) -> None:
        self._connection += 1
        connection = self._connection
        if not self._broker.running:
            self._timer = self._broker.wire.after(
                0, lambda: self.lose(connection, "nothing listens there; check that the broker runs")
            )
            return
        timeout_us = self.options.connect_timeout_us
        self._timer = self._broker.wire.after(timeout_us, lambda: self.lose(connection, "no answer in time"))
        self._carry(lambda: self._broker.connect(self, connection, self._will))

    def _hang_up(self, connection: int) -> None:
        self._carry(lambda: self._broker.gone(self, connection))

    def _forget(self) -> None:
        cancel(self._timer)
        self._timer = None
        self._connection += 1
        self._up = False
        self._sent.clear()
        self._owed = Owed(self._connection)

    def _carry(self, arrive: Callable[[], None], lost: Callable[[], None] | None = None) -> None:
        self._broker.wire.carry(self.client_id, Way.TO_BROKER, arrive, lost)
