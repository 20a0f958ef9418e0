"""A broker that means harm: it accepts over TCP, then sends whatever the test says, byte by byte if need be.

``Script`` functions get the accepted socket after the CONNECT packet was read, in a thread of their own.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable

Script = Callable[[socket.socket], None]
CONNACK = b"\x20\x03\x00\x00\x00"
CONNACK_SESSION_PRESENT = b"\x20\x03\x01\x00\x00"


def remaining_length(number: int) -> bytes:
    """A variable byte integer (MQTT 5, section 1.5.5)."""
    encoded = bytearray()
    while True:
        number, digit = divmod(number, 128)
        encoded.append(digit | (0x80 if number else 0))
        if not number:
            return bytes(encoded)


def packet(first_byte: int, body: bytes) -> bytes:
    return bytes([first_byte]) + remaining_length(len(body)) + body


def publish(topic: bytes, payload: bytes, packet_id: int = 0, properties: bytes = b"") -> bytes:
    """QoS 1 with a packet id, QoS 0 without."""
    number = packet_id.to_bytes(2) if packet_id else b""
    body = len(topic).to_bytes(2) + topic + number + remaining_length(len(properties)) + properties + payload
    return packet(0x32 if packet_id else 0x30, body)


def read_packet(sock: socket.socket) -> tuple[int, bytes]:
    """The first byte and the body of the next packet; ``(0, b"")`` at the end."""
    first = sock.recv(1)
    if not first:
        return 0, b""
    length, shift = 0, 0
    while True:
        digit = sock.recv(1)
        if not digit:
            return 0, b""
        length |= (digit[0] & 127) << shift
        shift += 7
        if digit[0] < 128:
            break
    body = b""
    while len(body) < length:
        more = sock.recv(length - len(body))
        if not more:
            return 0, b""
        body += more
    return first[0], body


class HostileBroker:
    """Runs ``script`` for every connection until the context ends; ``connections`` counts them."""

    def __init__(self, script: Script, tls: ssl.SSLContext | None = None) -> None:
        self._script, self._tls = script, tls
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.connections = 0
        self._ended = threading.Event()
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]

    def __enter__(self) -> HostileBroker:
        self._threads[0].start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        for sock in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        for thread in self._threads:
            thread.join(10)

    def _accept(self) -> None:
        while not self._ended.is_set():
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(sock)
            self.connections += 1
            thread = threading.Thread(target=self._serve, args=(sock,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            if read_packet(sock)[0] == 0x10:
                self._script(sock)
        sock.close()
