"""A paho client that trusts the broker with nothing.

paho reads a packet of any announced length into memory, and its parsers take time that is quadratic in the number of
properties.  Rules here:

* The announced length is judged before the first byte of the body is read; more than the kind of packet may have, and the
  connection ends with a reason.
* A PUBLISH is split here; only its property section, which is bounded too, goes through paho's parser.
* Every read of a packet's body asks for a quick TCP acknowledgement (tcp(7): it is not permanent), because a broker that leaves
  Nagle's algorithm on, as rumqttd does, waits 40 ms for a delayed one.
* What breaks MQTT ends the connection.  What is good MQTT but outside our bounds (a client's overlong topic that an honest
  broker passes on) is skipped and acknowledged, or a single retained message could keep us off the broker for ever.

The overrides are of private methods of paho 2.1 and 2.2; ``tests/test_mqtt.py`` fails if a later paho no longer calls them.
Section numbers are those of MQTT 5.0 (OASIS, 2019).
"""

from __future__ import annotations

import socket
import ssl
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import paho.mqtt.client as paho
from paho.mqtt import MQTTException
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties, VariableByteIntegers

from edge_agent.core.errors import RefusedError
from edge_agent.transport.link import MAX_PACKET_BYTES, Message
from edge_agent.transport.tls import HUNG_UP, connect_fault

MAX_CONTROL_PACKET_BYTES = 4096
MAX_PROPERTIES_BYTES = 4096
MAX_UNSENT_PACKETS = 2048
PACKETS_FOR_A_CLIENT = (
    paho.CONNACK, paho.PUBLISH, paho.PUBACK, paho.SUBACK, paho.UNSUBACK, paho.PINGRESP, paho.DISCONNECT
)  # fmt: skip
QUICK_ACKNOWLEDGEMENT: int | None = getattr(socket, "TCP_QUICKACK", None)
READ_BYTES = 256 * 2**10
PARSE_FAULTS = (MQTTException, LookupError, ValueError, TypeError, AttributeError, struct.error)
"""What paho's parsers raise on crafted packets."""


@dataclass(frozen=True, slots=True)
class Publish:
    """A PUBLISH as it came. ``packet_id`` is 0 for QoS 0."""

    qos: int
    retain: bool
    packet_id: int
    topic: bytes
    properties: bytes
    payload: bytes


def split_publish(flags: int, body: bytes | bytearray) -> Publish:
    """Cut a PUBLISH (section 3.3) into its parts. Raises ``RefusedError`` if it breaks MQTT."""
    qos = flags >> 1 & 3
    if qos > 1:
        raise RefusedError("PUBLISH", f"QoS {qos}", "0 or 1, as this client subscribed")
    try:
        topic_end = 2 + int.from_bytes(body[:2])
        properties_start = topic_end + 2 * qos
        properties_bytes, prefix_bytes = VariableByteIntegers.decode(bytes(body[properties_start : properties_start + 4]))  # type: ignore[no-untyped-call]
    except PARSE_FAULTS as error:
        raise RefusedError("PUBLISH", f"{len(body)} bytes that end early", "a whole packet") from error
    payload_start = properties_start + prefix_bytes + properties_bytes
    packet_id = int.from_bytes(body[topic_end:properties_start])
    if payload_start > len(body) or (qos and not packet_id):
        got = f"{properties_bytes} bytes of properties in a body of {len(body)} bytes, packet id {packet_id}"
        raise RefusedError("PUBLISH", got, "parts that fit into the packet, a packet id from 1")
    section = bytes(body[properties_start : min(payload_start, properties_start + prefix_bytes + MAX_PROPERTIES_BYTES + 1)])
    return Publish(qos, bool(flags & 1), packet_id, bytes(body[2:topic_end]), section, bytes(memoryview(body)[payload_start:]))


def read_properties(section: bytes) -> Properties:
    """Parse a bounded property section. Raises ``RefusedError`` if it breaks MQTT or uses the topic alias we never offered."""
    properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    try:
        properties.unpack(section)  # type: ignore[no-untyped-call]
    except PARSE_FAULTS as error:
        raise RefusedError("PUBLISH properties", str(error) or type(error).__name__, "well-formed MQTT 5 properties") from error
    if hasattr(properties, "TopicAlias"):
        raise RefusedError("PUBLISH", "a topic alias", "none: this client offers no alias (section 3.1.2.11.5)")
    return properties


class GuardedClient(paho.Client):
    """paho with bounds. ``failure`` holds the first reason why the connection ended; ``skipped`` counts unusable messages."""

    def __init__(self, client_id: str, on_delivery: Callable[[int, Message], str]) -> None:
        """``on_delivery(packet_id, message)`` takes a message on the network thread; text that it returns ends the connection."""
        super().__init__(
            CallbackAPIVersion.VERSION2,
            client_id,
            protocol=paho.MQTTv5,
            manual_ack=True,
            reconnect_on_failure=False,
        )
        self.failure = ""
        self.skipped = 0
        self._on_delivery = on_delivery
        self._wake_lock = threading.Lock()

    def fail(self, reason: str) -> MQTTErrorCode:
        """Note why the connection ends; the first reason is the one that counts."""
        self.failure = self.failure or reason
        return MQTTErrorCode.MQTT_ERR_PROTOCOL

    def limit_inflight(self, messages: int) -> None:
        """The broker's receive maximum, known from CONNACK on; paho's own setter refuses by then."""
        self._max_inflight_messages = messages

    def discard(self) -> None:
        """Close every socket of this client."""
        with self._wake_lock:
            self._reset_sockets()

    def wake(self) -> None:
        """From any thread: make the ``loop`` call that is under way, if any, return soon."""
        with self._wake_lock, suppress(BlockingIOError):  # a full pipe has enough to wake it
            if self._sockpairW is not None:
                self._sockpairW.send(b"w")

    def _ssl_wrap_socket(self, tcp_sock: socket.socket) -> ssl.SSLSocket:
        """As paho's, but a handshake that fails leaves no open socket behind. The context checks the host name."""
        assert self._ssl_context is not None and self._ssl_context.check_hostname
        sock = tcp_sock
        try:
            sock = wrapped = self._ssl_context.wrap_socket(tcp_sock, server_hostname=self._host, do_handshake_on_connect=False)
            wrapped.settimeout(self._connect_timeout)
            wrapped.do_handshake()
        except (OSError, ValueError):
            sock.close()
            raise
        return wrapped

    def _sock_recv(self, bufsize: int) -> bytes:
        self._judge_announced_length()
        try:
            data = super()._sock_recv(min(bufsize, READ_BYTES))
        except BlockingIOError:
            raise
        except OSError as error:
            self.fail(connect_fault(error))
            raise
        if not data:
            self.fail(HUNG_UP)
        elif bufsize > 1 and QUICK_ACKNOWLEDGEMENT is not None and isinstance(self._sock, socket.socket):
            with suppress(OSError):  # the connection's end is told by the next read
                self._sock.setsockopt(socket.IPPROTO_TCP, QUICK_ACKNOWLEDGEMENT, 1)
        return data

    def _sock_send(self, buf: bytes | bytearray) -> int:
        try:
            return super()._sock_send(buf)
        except BlockingIOError:
            raise
        except OSError as error:
            with suppress(OSError):  # a TLS alert that came before the end says more than the end; reading it notes it
                self._sock_recv(1)
            self.fail(connect_fault(error))
            raise

    def _judge_announced_length(self) -> None:
        packet = self._in_packet
        if not packet["have_remaining"]:
            return
        is_publish = packet["command"] & 0xF0 == paho.PUBLISH
        allowed_bytes = MAX_PACKET_BYTES if is_publish else MAX_CONTROL_PACKET_BYTES
        if packet["remaining_length"] > allowed_bytes:
            reason = f"the broker announced a packet of {packet['remaining_length']} bytes; allowed: {allowed_bytes}"
            self.fail(reason)
            raise ConnectionAbortedError(reason)

    def _packet_handle(self) -> MQTTErrorCode:
        command = self._in_packet["command"] & 0xF0
        if command not in PACKETS_FOR_A_CLIENT:
            return self.fail(f"the broker broke the protocol: packet type {command >> 4}, which no client of ours is sent")
        if len(self._out_packet) > MAX_UNSENT_PACKETS:
            return self.fail(f"the broker does not read: {len(self._out_packet)} packets wait to be sent")
        return super()._packet_handle()

    def _handle_publish(self) -> MQTTErrorCode:
        try:
            publish = split_publish(self._in_packet["command"] & 0x0F, self._in_packet["packet"])
            if len(publish.properties) > MAX_PROPERTIES_BYTES:
                return self._skip(publish)
            properties = read_properties(publish.properties)
        except RefusedError as error:
            return self.fail(f"the broker broke the protocol: {error}")
        try:
            message = _message(publish, properties)
        except (RefusedError, UnicodeDecodeError):
            return self._skip(publish)
        reason = self._on_delivery(publish.packet_id, message)
        return self.fail(reason) if reason else MQTTErrorCode.MQTT_ERR_SUCCESS

    def _skip(self, publish: Publish) -> MQTTErrorCode:
        self.skipped += 1
        return self._send_puback(publish.packet_id) if publish.qos else MQTTErrorCode.MQTT_ERR_SUCCESS


def _message(publish: Publish, properties: Properties) -> Message:
    return Message(
        topic=publish.topic.decode("utf-8", "strict"),
        payload=publish.payload,
        qos=publish.qos,
        retain=publish.retain,
        expiry_s=getattr(properties, "MessageExpiryInterval", None),
        response_topic=getattr(properties, "ResponseTopic", None),
        correlation=getattr(properties, "CorrelationData", None),
    )


def publish_properties(message: Message, kind: int = PacketTypes.PUBLISH) -> Properties:
    """The MQTT 5 properties of an outgoing message or (``kind`` WILLMESSAGE) of a will."""
    properties = Properties(kind)  # type: ignore[no-untyped-call]
    if message.expiry_s is not None:
        properties.MessageExpiryInterval = message.expiry_s
    if message.response_topic is not None:
        properties.ResponseTopic = message.response_topic
    if message.correlation is not None:
        properties.CorrelationData = message.correlation
    return properties
