"""An MQTT 5 client made of bytes: it says what no client library would, over the TLS that it is given (MQTT 5, section 3)."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass, field

from edge_agent.transport.endpoint import BrokerAddress
from tests.hostile_broker import packet, read_packet, remaining_length

PATIENCE_S = 60.0
CONNECT, CONNACK, PUBLISH, PUBACK, PUBREC, SUBSCRIBE, SUBACK, PINGREQ, PINGRESP, DISCONNECT = (
    0x10, 0x20, 0x30, 0x40, 0x50, 0x82, 0x90, 0xC0, 0xD0, 0xE0,
)  # fmt: skip
HUNG_UP = -1
NOT_AUTHORIZED = 0x87
RETAIN, QOS_1, QOS_2 = 1, 2, 4
WEEK_S = 7 * 86_400


def text(value: bytes) -> bytes:
    return len(value).to_bytes(2) + value


@dataclass(frozen=True, slots=True)
class Hello:
    """What a CONNECT packet says. ``will``: topic, payload and whether it is retained."""

    client_id: bytes = b"raw"
    clean: bool = True
    expiry_s: int = 0
    receive_maximum: int = 0
    username: bytes | None = None
    password: bytes | None = None
    will: tuple[bytes, bytes, bool] | None = None
    will_expiry_s: int = 0

    def packet(self) -> bytes:
        flags = 2 * self.clean
        body = text(self.client_id)
        if self.will is not None:
            topic, payload, retained = self.will
            flags |= 0x04 | 0x08 | 0x20 * retained
            body += b"\0" + text(topic) + text(payload)
        if self.username is not None:
            flags |= 0x80
            body += text(self.username)
        if self.password is not None:
            flags |= 0x40
            body += text(self.password)
        properties = b"\x11" + self.expiry_s.to_bytes(4)
        if self.receive_maximum:
            properties += b"\x21" + self.receive_maximum.to_bytes(2)
        head = b"\0\4MQTT\5" + bytes([flags]) + b"\0\x3c" + remaining_length(len(properties)) + properties
        return packet(CONNECT, head + body)


@dataclass(slots=True)
class RawClient:
    """``heard``: topic and payload of all that came, in order. Nothing is acknowledged unless ``acknowledges``."""

    sock: ssl.SSLSocket
    acknowledges: bool = True
    heard: list[tuple[str, bytes]] = field(default_factory=list)

    def connect(self, hello: Hello) -> tuple[int, bool]:
        """The broker's reason code, or ``HUNG_UP``, and whether it had a session."""
        self.sock.sendall(hello.packet())
        first, body = self._read()
        return (body[1], bool(body[0])) if first == CONNACK else (HUNG_UP, False)

    def publish(self, topic: bytes, payload: bytes = b"x", flags: int = QOS_1) -> int:
        """The broker's reason code at QoS 1 and 2, or ``HUNG_UP``; 0 at once at QoS 0."""
        number = b"\0\7" if flags & 6 else b""
        self.send(packet(PUBLISH | flags, text(topic) + number + b"\0" + payload))
        return self.answer(PUBREC if flags & QOS_2 else PUBACK, 2) if flags & 6 else 0

    def subscribe(self, topic_filter: bytes, qos: int = 1) -> int:
        self.send(packet(SUBSCRIBE, b"\0\x09\0" + text(topic_filter) + bytes([qos])))
        return self.answer(SUBACK, 3)

    def settle(self) -> bool:
        """The broker has answered all that was asked before, and what it had for this client has come."""
        self.send(packet(PINGREQ, b""))
        return self.answer(PINGRESP, 0) != HUNG_UP

    def goodbye(self, with_will: bool = False) -> None:
        self.send(packet(DISCONNECT, b"\x04\0" if with_will else b""))

    def end(self) -> None:
        """The broker has ended the connection too."""
        while self._read()[0]:
            pass

    def ended(self) -> bool:
        """Whether the broker hangs up without another answer than DISCONNECT."""
        while (first := self._read()[0]) == DISCONNECT:
            pass
        return first == 0

    @property
    def session(self) -> ssl.SSLSession | None:
        """With which a later connection may be resumed."""
        return self.sock.session

    @property
    def topics(self) -> list[str]:
        return [topic for topic, _ in self.heard]

    def send(self, data: bytes) -> None:
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            self.sock.sendall(data)

    def _read(self) -> tuple[int, bytes]:
        try:
            return read_packet(self.sock)
        except (ConnectionError, ssl.SSLError):
            return 0, b""

    def answer(self, kind: int, at: int) -> int:
        while True:
            first, body = self._read()
            if first & 0xF0 == PUBLISH:
                self._take(first, body)
            elif first == kind:
                return body[at] if len(body) > at else 0
            elif first in (0, DISCONNECT):
                return HUNG_UP

    def _take(self, first: int, body: bytes) -> None:
        end = 2 + int.from_bytes(body[:2])
        rest, qos = body[end:], first >> 1 & 3
        if qos and self.acknowledges:
            self.send(packet(PUBACK, rest[:2]))
        rest = rest[2:] if qos else rest
        self.heard.append((body[2:end].decode(), rest[1 + rest[0] :]))


@contextlib.contextmanager
def dialled(
    address: BrokerAddress, context: ssl.SSLContext | None = None, resumed: ssl.SSLSession | None = None
) -> Iterator[RawClient]:
    """A TLS connection with the certificate of ``address`` (or as ``context`` has it), on which nothing was said yet."""
    assert address.tls is not None
    context = context or address.tls.context()
    plain = socket.create_connection((address.host, address.port), PATIENCE_S)
    with contextlib.closing(plain), context.wrap_socket(plain, server_hostname=address.host, session=resumed) as sock:
        yield RawClient(sock)


@contextlib.contextmanager
def connected(address: BrokerAddress, hello: Hello = Hello()) -> Iterator[RawClient]:
    with dialled(address) as client:
        assert client.connect(hello)[0] == 0
        yield client
