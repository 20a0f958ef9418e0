"""What a fleet of four emulated boards on this one machine serves: a picture in, faces out, from eight clients at once.

How: four agents with their engine children as real processes, unpaced, so that the CPU of this machine is the limit and not
the emulated boards; each client asks its board again as soon as it has its answer.  The time that goes into the picture is what
``models.pictures`` takes to decode and resize it, measured alone in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from edge_agent.client import Client, request_for_picture
from edge_agent.core.errors import UnavailableError
from edge_agent.core.values import Status
from edge_agent.demo.play import BOARDS
from edge_agent.local_fleet import LocalFleet
from edge_agent.transport.embedded import EmbeddedBroker
from models.catalog import card
from models.fetch import fetch, fetch_picture
from tests.bench.figures import Figure, Progress, p50, p95
from tests.brokers import free_port

MODEL, TASK, PICTURE = "blazeface-short", "detect_faces", "grace_hopper"
CLIENTS_PER_BOARD = 2
WARM_UP_S, RUN_S = 1.0, 5.0
NO_BROKER_PORT = 1
UNPACED = "paced = false"
DECODES = 30


def measure(progress: Progress) -> Iterator[Figure]:
    fetch(card(MODEL), report=progress)
    path = fetch_picture(PICTURE, report=progress)
    for with_broker in (False, True):
        kind = "with broker" if with_broker else "no broker"
        latencies = _run(path.read_bytes(), with_broker, kind, progress)
        yield Figure(f"four boards, {kind}: requests a second", len(latencies) / RUN_S, "1/s")
        yield Figure(f"four boards, {kind}: latency p50", p50(latencies), "ms")
        yield Figure(f"four boards, {kind}: latency p95", p95(latencies), "ms")
        if not with_broker:
            rate = len(latencies) / RUN_S
    progress("decoding the picture alone")
    decode_ms = _decode_ms(path)
    yield Figure("the picture alone: decode and resize, p50", decode_ms, "ms")
    yield Figure("share of the picture in the CPU time of a request", decode_ms * rate / 1000 / (os.cpu_count() or 1) * 100, "%")


def _run(picture: bytes, with_broker: bool, kind: str, progress: Progress) -> list[float]:
    """Latencies in ms of the requests that were answered in ``RUN_S``."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sly-bench-")))
        port = stack.enter_context(EmbeddedBroker(free_port())).port if with_broker else NO_BROKER_PORT
        fleet = stack.enter_context(_UnpacedFleet(folder, BOARDS, [MODEL], port))
        progress(f"{kind}, starting {len(BOARDS)} boards")
        fleet.start()
        if with_broker:
            fleet.wait_acquainted(fleet.members)
        progress(f"{kind}, {CLIENTS_PER_BOARD * len(BOARDS)} clients for {WARM_UP_S + RUN_S:g} s")
        return _served(fleet, picture)


class _UnpacedFleet(LocalFleet):
    def prepare(self) -> None:
        super().prepare()
        for board in self.members:
            path = self.folder / board / "agent.toml"
            path.write_text(path.read_text().replace("[board]\n", f"[board]\n{UNPACED}\n"))


def _served(fleet: LocalFleet, picture: bytes) -> list[float]:
    begin = time.perf_counter() + WARM_UP_S
    latencies: list[float] = []
    failures: list[str] = []

    def ask(board: str) -> None:
        with Client(fleet.socket_of(board)) as client:
            while (asked := time.perf_counter()) < begin + RUN_S:
                result = client.submit(request_for_picture(TASK, picture))
                if result.status is not Status.OK:
                    failures.append(result.reason)
                    return
                if begin <= asked and (now := time.perf_counter()) < begin + RUN_S:
                    latencies.append((now - asked) * 1000)

    clients = [threading.Thread(target=ask, args=(board,)) for board in fleet.members for _ in range(CLIENTS_PER_BOARD)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    if failures or not latencies:
        raise UnavailableError("fleet", failures[0] if failures else "no request was answered")
    return latencies


DECODE = """
import sys, time
from pathlib import Path
import numpy as np
from models.catalog import card
from models.vision import prepare
data = np.frombuffer(Path(sys.argv[1]).read_bytes(), np.uint8)
samples = []
for _ in range(int(sys.argv[3])):
    started = time.perf_counter()
    prepare(card(sys.argv[2]), data)
    samples.append(time.perf_counter() - started)
print(sorted(samples)[len(samples) // 2] * 1000)
"""


def _decode_ms(picture: Path) -> float:
    command = [sys.executable, "-c", DECODE, str(picture), MODEL, str(DECODES)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
