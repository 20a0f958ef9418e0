"""The embedded broker: rumqttd, as the ``iotcore`` wheel brings it, in a child process.

For the demo, the tests and a fleet in one box; a fleet on many machines runs Mosquitto or another MQTT 5 cluster.  Rules:

* The child listens on loopback only and ends when its parent does (it watches its standard input).
* Ready means that the port accepts; the child says so with one line.
* The broker's configuration is our own, MQTT 5 only, with our packet bound.

What it can and cannot do was tried with ``tests/test_link_contract.py`` and is kept in ``docs/adr/0002-embedded-broker.md``.
In short: it forgets everything when it stops, raises the QoS of a message to that of the subscription, and has up
to 100 messages under way whatever the client asked for.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType

from edge_agent.core.errors import UnavailableError
from edge_agent.core.values import bounded
from edge_agent.transport.link import MAX_PACKET_BYTES

HOST = "127.0.0.1"
READY = "ready"
START_LIMIT_S = 20.0
STOP_LIMIT_S = 5.0
POLL_S = 0.01
MAX_CONNECTIONS = 1024
SEGMENT_BYTES = 2 * MAX_PACKET_BYTES
SEGMENTS = 4
"""rumqttd keeps what it may still have to deliver in memory, a log for every filter: at most this many segments of this size."""

_CONFIGURATION = f"""
id = 0
[router]
id = 0
max_connections = {MAX_CONNECTIONS}
max_outgoing_packet_count = 200
max_segment_size = {SEGMENT_BYTES}
max_segment_count = {SEGMENTS}
[v5.1]
name = "v5"
listen = "{HOST}:%d"
next_connection_delay_ms = 1
[v5.1.connections]
connection_timeout_ms = 10000
max_payload_size = {MAX_PACKET_BYTES}
max_inflight_count = 100
dynamic_filters = true
"""


class EmbeddedBroker:
    """A broker on ``127.0.0.1:port`` while it is started; as a context manager, for the time of the block."""

    def __init__(self, port: int) -> None:
        self.port = bounded("broker port", port, 1, 65535)
        self._process: subprocess.Popen[str] | None = None

    @property
    def pid(self) -> int | None:
        """The process id of the child while it runs."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def start(self) -> None:
        """Return when it accepts connections. Raises ``UnavailableError`` without the extra ``demo`` or with the port taken."""
        if self.pid is not None:
            return
        _must_be_installed()
        _must_be_free(self.port)
        command = [sys.executable, "-m", "edge_agent.transport.embedded", "--port", str(self.port)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8",
            start_new_session=True,
        )  # fmt: skip
        line = _first_line(self._process, START_LIMIT_S)
        if line != READY:
            self.kill()
            raise UnavailableError("embedded broker", line or f"not ready within {START_LIMIT_S:.0f} s")

    def stop(self) -> None:
        """Let it end by itself. Harmless when it does not run."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            try:
                self._process.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
            self._reap()

    def kill(self) -> None:
        """End it at once, as a power cut would. Harmless when it does not run."""
        if self._process is not None:
            self._process.kill()
            self._reap()

    def _reap(self) -> None:
        process, self._process = self._process, None
        assert process is not None
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> EmbeddedBroker:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()


def _must_be_installed() -> None:
    if importlib.util.find_spec("iotcore") is None:
        raise UnavailableError("embedded broker", "iotcore is not installed", "pip install 'slyos-edge[demo]'")


def _must_be_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            reason = f"port {port} cannot be used ({(error.strerror or str(error)).lower()})"
            raise UnavailableError("embedded broker", reason, "choose another port, or stop what listens there") from error


def _first_line(process: subprocess.Popen[str], limit_s: float) -> str:
    """What the child says first, or its last words on standard error if it ends without a line; empty after ``limit_s``."""
    assert process.stdout is not None and process.stderr is not None
    if not select.select([process.stdout], [], [], limit_s)[0]:
        return ""
    line = process.stdout.readline().strip()
    if line:
        return line
    words = process.stderr.read().strip().splitlines()
    return words[-1] if words else f"it ended with code {process.wait()}"


def main(arguments: list[str] | None = None) -> None:
    """The child: run the broker until standard input ends."""
    parser = argparse.ArgumentParser(prog="python -m edge_agent.transport.embedded", description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, required=True)
    port = parser.parse_args(arguments).port
    threading.Thread(target=_end_with_parent, daemon=True).start()
    threading.Thread(target=_say_when_ready, args=(port,), daemon=True).start()
    _run_broker(port)


def _run_broker(port: int) -> None:
    import logging

    from iotcore.iotcore import IotCoreBroker

    logging.disable(logging.CRITICAL)  # rumqttd logs every packet as an error, and nobody reads the pipe
    with tempfile.TemporaryDirectory(prefix="sly-broker-") as folder:
        path = Path(folder, "rumqttd.toml")
        path.write_text(_CONFIGURATION % port, encoding="utf-8")
        broker = IotCoreBroker(config_path=str(path))
    broker.run_forever()


def _say_when_ready(port: int) -> None:
    while True:
        try:
            socket.create_connection((HOST, port), timeout=1).close()
        except OSError:
            time.sleep(POLL_S)
        else:
            print(READY, flush=True)
            return


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    main()
