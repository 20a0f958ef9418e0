"""One MQTT connection, from the first packet to the reason why it ended.

Rules:

* ``serve`` and every callback run on the network thread; only the methods under "from the loop" run elsewhere, and they only
  leave commands behind.
* A connection is used once.  Its packet ids, tickets and tokens die with it.
* What waits in either direction is bounded: commands by count and bytes, QoS 1 messages owed to the broker by the receive
  maximum that is asked for and the larger one at which nothing more is read.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from paho.mqtt.enums import MQTTErrorCode
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.transport.endpoint import Endpoint
from edge_agent.transport.link import (
    MAX_OWED_MESSAGES,
    MAX_PACKET_BYTES,
    RECEIVE_MAXIMUM,
    Delivered,
    LinkEvent,
    LinkUp,
    Message,
    Published,
    Rejected,
    Will,
)
from edge_agent.transport.owed import Owed
from edge_agent.transport.paho_client import PARSE_FAULTS, GuardedClient, publish_properties
from edge_agent.transport.tls import HUNG_UP, HUNG_UP_BEFORE, HUNG_UP_LATER, connect_fault

MAX_OUTGOING_MESSAGES = 256
MAX_OUTGOING_BYTES = 16 * 2**20
MAX_INFLIGHT = 20
"""QoS 1 messages under way to the broker at once, unless it takes fewer."""
CONNECT_TIMEOUT_S = 5.0
TURN_S = 1.0
WRITE_TURN_S = 0.01
LINGER_S = 2.0
SESSION_TAKEN_OVER = 0x8E
_OWN_ENDS = {0x82: "the broker broke the protocol", 0x8D: "no answer within the keepalive time"}
"""Why paho itself ends a connection, as MQTT 5 reason codes (section 2.4)."""


class Connection:
    """``put`` takes the events of this connection; ``generation`` tells its tokens from those of the others of this link."""

    def __init__(self, endpoint: Endpoint, will: Will | None, put: Callable[[LinkEvent], None], generation: int) -> None:
        self._endpoint, self._put = endpoint, put
        self._client = _configured(endpoint, will, self._take_delivery)
        self._client.on_connect = self._on_connect
        self._client.on_disconnect = self._on_disconnect
        self._client.on_publish = self._on_answer
        self._client.on_subscribe = self._client.on_unsubscribe = self._on_suback
        self.up = self.was_up = False
        self.broker_is_trusted = True
        """Until its certificate is found wrong."""
        self.lasted_us = 0
        self._leaving_since: float | None = None
        self._lock = threading.Lock()
        self._commands: deque[Callable[[], None]] = deque()
        self._stirred = threading.Event()
        self._outgoing_messages = self._outgoing_bytes = 0
        self._broker_limit_bytes = MAX_PACKET_BYTES
        self._sent: dict[int, tuple[int, int, str]] = {}
        self._answers: deque[tuple[int, ReasonCode]] = deque()
        self._owed = Owed(generation)

    # From the loop.

    def publish(self, message: Message, ticket: int) -> None:
        size_bytes = len(message.payload) + 4 * len(message.topic)
        if size_bytes > self._broker_limit_bytes:
            allowed = f"at most {self._broker_limit_bytes} bytes a packet, says the broker"
            raise RefusedError(f"message to {message.topic}", f"about {size_bytes} bytes", allowed)
        self._admit(message.topic, size_bytes)
        self._command(lambda: self._send(message, ticket, size_bytes))

    def subscribe(self, topic_filter: str, qos: int) -> None:
        self._admit(topic_filter, len(topic_filter))
        self._command(lambda: self._ask(topic_filter, qos))

    def unsubscribe(self, topic_filter: str) -> None:
        self._admit(topic_filter, len(topic_filter))
        self._command(lambda: self._take_back(topic_filter))

    def acknowledge(self, token: int) -> None:
        """A token of another connection is ignored."""
        self._command(lambda: self._acknowledge(token))

    def say_goodbye(self) -> bool:
        """Leave cleanly after what was commanded before. Says whether there is a connection that is up."""
        self._leaving_since = time.monotonic()
        self._stirred.set()
        self._client.wake()
        return self.up

    def _admit(self, topic: str, size_bytes: int) -> None:
        with self._lock:
            messages, waiting_bytes = self._outgoing_messages, self._outgoing_bytes
            if messages >= MAX_OUTGOING_MESSAGES or (messages and waiting_bytes + size_bytes > MAX_OUTGOING_BYTES):
                waiting = f"{messages} messages with {waiting_bytes} bytes wait for the broker"
                raise UnavailableError(f"link for {topic}", waiting, "publish again when some were answered")
            self._outgoing_messages += 1
            self._outgoing_bytes += size_bytes

    def _command(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        if len(self._commands) == 1:  # who finds one that waits already comes to this one after it
            self._stirred.set()
            self._client.wake()

    # On the network thread.

    def serve(self) -> str:
        """Connect, and work until the connection ends; why it ended."""
        started = time.monotonic()
        try:
            self._connect()
            self._work()
        except OSError as error:
            self.broker_is_trusted = not isinstance(error, ssl.SSLCertVerificationError)
            self._client.fail(connect_fault(error))
        except PARSE_FAULTS as error:
            self._client.fail(f"the broker broke the protocol: {type(error).__name__}: {error}")
        finally:
            self.up = False
            self._client.discard()
        self.lasted_us = int((time.monotonic() - started) * 1e6) if self.was_up else 0
        if self._client.failure == HUNG_UP:
            return HUNG_UP_LATER if self.was_up else HUNG_UP_BEFORE
        return self._client.failure or "the connection ended"

    def _connect(self) -> None:
        options, address = self._endpoint.options, self._endpoint.address
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = options.session_expiry_s
        properties.ReceiveMaximum = RECEIVE_MAXIMUM
        properties.MaximumPacketSize = MAX_PACKET_BYTES
        self._client.connect(
            address.host, address.port, options.keepalive_s, clean_start=options.session_expiry_s == 0, properties=properties
        )
        sock = self._client.socket()
        if isinstance(sock, socket.socket):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _work(self) -> None:
        said_goodbye = False
        while self._turn() == MQTTErrorCode.MQTT_ERR_SUCCESS and not self._client.failure:
            while self.up and self._commands:
                self._commands.popleft()()
            self._report_answers()
            if self._leaving_since is not None:
                if not said_goodbye:
                    said_goodbye = True
                    self._client.disconnect()
                elif time.monotonic() - self._leaving_since > LINGER_S:
                    return

    def _turn(self) -> MQTTErrorCode:
        """Read and write for a while; only write while too much is owed. (Who acknowledges nothing gets no ping's answer either,
        and is disconnected after the keepalive time.)"""
        if len(self._owed) < MAX_OWED_MESSAGES:
            return self._client.loop(TURN_S)
        self._stirred.wait(WRITE_TURN_S if self._client.want_write() else TURN_S)
        self._stirred.clear()
        written = self._client.loop_write()
        return self._client.loop_misc() if written == MQTTErrorCode.MQTT_ERR_SUCCESS else written

    def _send(self, message: Message, ticket: int, size_bytes: int) -> None:
        info = self._client.publish(message.topic, message.payload, message.qos, message.retain, publish_properties(message))
        self._sent[info.mid] = ticket if message.qos else -1, size_bytes, ""

    def _ask(self, topic_filter: str, qos: int) -> None:
        _, packet_id = self._client.subscribe(topic_filter, options=SubscribeOptions(qos))
        if packet_id is not None:
            self._sent[packet_id] = -1, len(topic_filter), topic_filter

    def _take_back(self, topic_filter: str) -> None:
        _, packet_id = self._client.unsubscribe(topic_filter)
        if packet_id is not None:
            self._sent[packet_id] = -1, len(topic_filter), topic_filter

    def _acknowledge(self, token: int) -> None:
        for packet_id in self._owed.acknowledge(token):
            self._client.ack(packet_id, 1)

    def _take_delivery(self, packet_id: int, message: Message) -> str:
        if not self.up:
            return "the broker sent a message before it accepted the connection"
        self._put(Delivered(message, self._owed.deliver(packet_id) if packet_id else 0))
        return ""

    def _on_connect(self, client: Any, userdata: Any, flags: Any, reason: ReasonCode, properties: Properties | None) -> None:
        if reason.is_failure:
            self._client.fail(f"the broker refused us: {str(reason).lower()}")
        elif self.up:
            self._client.fail("the broker accepted the connection twice")
        else:
            self._broker_limit_bytes = min(MAX_PACKET_BYTES, getattr(properties, "MaximumPacketSize", MAX_PACKET_BYTES))
            self._client.limit_inflight(min(MAX_INFLIGHT, getattr(properties, "ReceiveMaximum", MAX_INFLIGHT)))
            self.up = self.was_up = True
            self._put(LinkUp(flags.session_present))

    def _on_disconnect(self, client: Any, userdata: Any, flags: Any, reason: ReasonCode, properties: Any) -> None:
        if not flags.is_disconnect_packet_from_server:
            self._client.fail(_OWN_ENDS.get(reason.value, ""))
        elif reason.value == SESSION_TAKEN_OVER:
            self._client.fail(
                f"session taken over: another client uses the id {self._endpoint.client_id!r}; give every board its own"
            )
        else:
            self._client.fail(f"the broker ended the connection: {str(reason).lower()}")

    def _on_answer(self, client: Any, userdata: Any, packet_id: int, reason: ReasonCode, properties: Any) -> None:
        self._answers.append((packet_id, reason))

    def _on_suback(self, client: Any, userdata: Any, packet_id: int, reasons: list[ReasonCode], properties: Any) -> None:
        if reasons:
            self._answers.append((packet_id, reasons[0]))

    def _report_answers(self) -> None:
        """After the senders have noted their packet ids: paho answers a QoS 0 message inside ``publish``."""
        while self._answers:
            packet_id, reason = self._answers.popleft()
            ticket, size_bytes, topic_filter = self._sent.pop(packet_id, (-1, -1, ""))
            if size_bytes < 0:
                continue
            with self._lock:
                self._outgoing_messages -= 1
                self._outgoing_bytes -= size_bytes
            if reason.is_failure:
                self._put(Rejected(str(reason).lower(), max(ticket, 0), topic_filter))
            elif ticket >= 0:
                self._put(Published(ticket))


def _configured(endpoint: Endpoint, will: Will | None, take: Callable[[int, Message], str]) -> GuardedClient:
    client = GuardedClient(endpoint.client_id, take)
    client.connect_timeout = CONNECT_TIMEOUT_S
    if endpoint.tls is not None:
        client.tls_set_context(endpoint.tls)
    if endpoint.address.username is not None:
        client.username_pw_set(endpoint.address.username, endpoint.address.password)
    if will is not None:
        properties = publish_properties(will.message, PacketTypes.WILLMESSAGE)
        if will.delay_s:
            properties.WillDelayInterval = will.delay_s
        client.will_set(will.message.topic, will.message.payload, will.message.qos, will.message.retain, properties)
    return client
