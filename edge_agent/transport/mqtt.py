"""A link over MQTT 5 through paho.

Owns one network thread per open link.  Rules:

* The thread makes one connection at a time with a fresh client, serves it until it ends, tells why, waits, and tries again;
  nothing of an ended connection is carried into the next (see the tickets in ``link``).
* Only that thread calls paho.  Events reach the asyncio loop through ``Inbox``, commands reach the thread through
  ``Connection``; both are bounded.
* The session outlives a connection by ``session_expiry_s``, so that the broker keeps QoS 1 messages for us meanwhile.
* paho is imported when the first link opens.
"""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.transport.backoff import Backoff
from edge_agent.transport.endpoint import BrokerAddress, Endpoint, MqttOptions
from edge_agent.transport.inbox import Inbox
from edge_agent.transport.link import Link, LinkDown, LinkEvent, LinkUp, Message, Will
from edge_agent.transport.tls import TlsFiles

if TYPE_CHECKING:
    from edge_agent.transport.connection import Connection

__all__ = ["BrokerAddress", "MqttLink", "MqttOptions", "TlsFiles", "check"]

GOODBYE_S = 2.0
"""How long ``close`` waits for the goodbye and what was queued before it to leave this machine."""


class MqttLink(Link):
    """``deliver`` runs on ``loop``; call the link only from there. Raises ``ConfigError`` for TLS files that cannot be used."""

    def __init__(
        self,
        address: BrokerAddress,
        client_id: str,
        loop: asyncio.AbstractEventLoop,
        options: MqttOptions = MqttOptions(),  # noqa: B008  (frozen)
        seed: int | str | None = None,
    ) -> None:
        super().__init__()
        self.endpoint = Endpoint(address, client_id, options)
        self._loop, self._backoff = loop, Backoff(options.backoff, seed)
        self._network: _Network | None = None

    @property
    def dropped(self) -> int:
        """QoS 0 messages that gave way because the loop was too slow, since this link was opened."""
        return self._network.inbox.dropped if self._network else 0

    @property
    def waiting_bytes(self) -> int:
        """Payload bytes that have come in and wait for the loop."""
        return self._network.inbox.waiting_bytes if self._network else 0

    def _open(self, will: Will | None) -> None:
        self._network = _Network(self.endpoint, will, self._backoff, Inbox(self._loop, self._emit))
        self._network.thread.start()

    def _subscribe(self, topic_filter: str, qos: int) -> None:
        self._connection(topic_filter).subscribe(topic_filter, qos)

    def _unsubscribe(self, topic_filter: str) -> None:
        self._connection(topic_filter).unsubscribe(topic_filter)

    def _publish(self, message: Message, ticket: int) -> None:
        self._connection(message.topic).publish(message, ticket)

    def _acknowledge(self, token: int) -> None:
        connection = self._network.connection if self._network else None
        if connection is not None and connection.up:
            connection.acknowledge(token)

    def _close(self) -> None:
        network, self._network = self._network, None
        if network is not None:
            network.close()

    def _connection(self, topic: str) -> Connection:
        connection = self._network.connection if self._network else None
        if connection is None or not connection.up:
            raise UnavailableError(f"link for {topic}", "the connection has just ended", "keep it and publish after LinkUp")
        return connection


class _Network:
    """The thread of an open link."""

    def __init__(self, endpoint: Endpoint, will: Will | None, backoff: Backoff, inbox: Inbox) -> None:
        self.inbox = inbox
        self.connection: Connection | None = None
        self.thread = threading.Thread(target=self._run, name=f"mqtt-{endpoint.client_id}", daemon=True)
        self._endpoint, self._will, self._backoff = endpoint, will, backoff
        self._closing = threading.Event()

    def close(self) -> None:
        """Nothing is delivered from here on. Waits at most ``GOODBYE_S`` for the goodbye of a connection that is up."""
        self.inbox.close()
        self._closing.set()
        connection = self.connection
        if connection is not None and connection.say_goodbye():
            self.thread.join(GOODBYE_S)

    def _run(self) -> None:
        from edge_agent.transport.connection import Connection

        generation = 0
        while not self._closing.is_set():
            generation += 1
            self.connection = Connection(self._endpoint, self._will, self.inbox.put, generation)
            if self._closing.is_set():  # close() may have looked before there was a connection to say goodbye on
                return
            try:
                reason = self.connection.serve()
            except BaseException as error:
                self.inbox.put(LinkDown(f"this link has died of a bug ({type(error).__name__}: {error}) and stays down"))
                raise
            wait_us = self._backoff.after(self.connection.lasted_us)
            self.inbox.put(LinkDown(f"{self._endpoint.address}: {reason}", wait_us))
            self._closing.wait(wait_us / 1e6)


async def check(address: BrokerAddress, client_id: str) -> None:
    """Connect once, say goodbye, and return; no session, no will. ``client_id`` must not be that of a board that is connected.

    Raises ``UnavailableError`` with the one reason if the broker cannot be reached or does not accept us, ``RefusedError`` if
    it is there and its certificate is wrong, ``ConfigError`` for TLS files that cannot be used.
    """
    await asyncio.to_thread(_check, address, client_id)


def _check(address: BrokerAddress, client_id: str) -> None:
    from edge_agent.transport.connection import Connection

    def leave(event: LinkEvent) -> None:
        if isinstance(event, LinkUp):
            connection.say_goodbye()

    endpoint = Endpoint(address, client_id, MqttOptions(keepalive_s=5, session_expiry_s=0))
    connection = Connection(endpoint, None, leave, 1)
    reason = connection.serve()
    if not connection.broker_is_trusted:
        raise RefusedError(f"broker {address}: {reason}")
    if not connection.was_up:
        raise UnavailableError(f"broker {address}", reason)
