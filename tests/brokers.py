"""Real brokers for tests, on free loopback ports: Mosquitto, the embedded one, and a relay whose connections can be cut.

Rules: a broker is ready when it accepts a connection; it is stopped by its process id; nothing sleeps for a state.
"""

from __future__ import annotations

import contextlib
import getpass
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from edge_agent.transport.embedded import EmbeddedBroker
from tests.needs import needs_module, needs_mosquitto

START_LIMIT_S = 30.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_accepting(port: int, process: subprocess.Popen[bytes]) -> None:
    """Return once the port accepts; raise if the process ends or takes longer than ``START_LIMIT_S``."""
    end = time.monotonic() + START_LIMIT_S
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            raise RuntimeError(f"the broker ended with code {process.wait(0.02)} before it listened on {port}")
    raise RuntimeError(f"the broker does not listen on {port} after {START_LIMIT_S} s")


class Mosquitto:
    """A Mosquitto process with its own folder. ``stop`` keeps what it knows (it saves on SIGTERM); ``kill`` loses it."""

    def __init__(self, folder: Path, settings: str = "", tls: str = "") -> None:
        self.path, self.port = needs_mosquitto(), free_port()
        folder.mkdir(parents=True, exist_ok=True)
        self._config = folder / "mosquitto.conf"
        self._config.write_text(
            f"user {getpass.getuser()}\nlistener {self.port} 127.0.0.1\n{tls}\nallow_anonymous true\nset_tcp_nodelay true\n"
            f"persistence true\npersistence_location {folder}/\nmax_inflight_messages 100\n{settings}\n"
        )
        self._log = folder / "mosquitto.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen([self.path, "-c", str(self._config)], stdout=log, stderr=log)
        wait_until_accepting(self.port, self._process)

    def stop(self, signal_number: int = signal.SIGTERM) -> None:
        if self._process is not None:
            self._process.send_signal(signal_number)
            self._process.wait(START_LIMIT_S)
            self._process = None

    def kill(self) -> None:
        self.stop(signal.SIGKILL)


@contextlib.contextmanager
def mosquitto(folder: Path, settings: str = "", tls: str = "") -> Iterator[Mosquitto]:
    broker = Mosquitto(folder, settings, tls)
    broker.start()
    try:
        yield broker
    finally:
        broker.stop()


def embedded_broker() -> EmbeddedBroker:
    """The product's own embedded broker on a free port; not started."""
    needs_module("iotcore", "demo")
    return EmbeddedBroker(free_port())


class Relay:
    """A TCP relay to a broker. ``cut`` resets what runs through it and refuses newcomers until ``mend``.

    Only its thread touches the sockets.
    """

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._wake_read, self._wake_write = socket.socketpair()
        self._pairs: dict[socket.socket, socket.socket] = {}
        self._open, self._ending, self._is_cut = True, False, threading.Event()
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)
        self._thread.start()

    def cut(self) -> None:
        self._is_cut.clear()
        self._open = False
        self._wake_write.send(b"w")
        assert self._is_cut.wait(START_LIMIT_S)

    def mend(self) -> None:
        self._open = True

    def close(self) -> None:
        self.cut()
        self._ending = True
        self._wake_write.send(b"w")
        self._thread.join(START_LIMIT_S)
        for sock in (self._listener, self._wake_read, self._wake_write):
            sock.close()

    def _run(self) -> None:
        while not self._ending:
            for sock in select.select([self._listener, self._wake_read, *self._pairs], [], [])[0]:
                if sock is self._wake_read:
                    sock.recv(1024)
                    self._drop(*self._pairs)
                    self._pairs.clear()
                    self._is_cut.set()
                elif sock is self._listener:
                    self._accept()
                elif sock in self._pairs:
                    self._forward(sock, self._pairs[sock])

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        try:
            if not self._open:
                raise ConnectionRefusedError
            broker = socket.create_connection(("127.0.0.1", self._target_port))
        except OSError:
            self._drop(client)
            return
        for sock in (client, broker):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._pairs[client], self._pairs[broker] = broker, client

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            data = source.recv(65536)
            sink.sendall(data)
        except OSError:
            data = b""
        if not data:
            for sock in (source, sink):
                del self._pairs[sock]
                sock.close()

    @staticmethod
    def _drop(*socks: socket.socket) -> None:
        """Reset instead of a polite end, as a power cut or a pulled cable looks to the other side in the end."""
        for sock in socks:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            sock.close()
