"""What an idle agent holds: PSS over all its processes, with one small model loaded and a broker connected.

How: one board as a real daemon, connected to the embedded broker (which is not counted); it serves a few requests, then
nothing, and ``/proc/PID/smaps_rollup`` (proc(5)) of the agent and all its descendants is summed.  PSS divides a page by
the number of processes that map it, also by those outside (this one, the broker); so the sum of the processes' private pages and
of the larger resident share is given too, as the upper bound that a machine with no other Python would see.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from edge_agent.client import Client
from edge_agent.local_fleet import LocalFleet, Member
from edge_agent.transport.embedded import EmbeddedBroker
from models.catalog import card
from models.fetch import fetch, fetch_picture
from tests.bench.figures import Figure, Progress
from tests.brokers import free_port

MODEL, PICTURE, TASK = "blazeface-short", "grace_hopper", "detect_faces"
GOAL_MB = 90.0
REQUESTS = 5


def measure(progress: Progress) -> Iterator[Figure]:
    fetch(card(MODEL), report=progress)
    picture = fetch_picture(PICTURE, report=progress).read_bytes()
    progress("starting a broker and one agent")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sly-bench-")))
        broker = stack.enter_context(EmbeddedBroker(free_port()))
        fleet = stack.enter_context(LocalFleet(folder, [Member("solo", "raspberry_pi_5")], [MODEL], broker.port))
        fleet.start()
        agent = fleet.pid_of("solo")
        loaded = {pid: megabytes(pid, "Pss") for pid in family(agent)}
        with Client(fleet.socket_of("solo")) as client:
            for number in range(REQUESTS):
                progress(f"request {number + 1} of {REQUESTS}")
                client.look(TASK, picture)
        served = {pid: megabytes(pid, "Pss") for pid in family(agent)}
        alone = sum(megabytes(pid, "Rss") for pid in served)
    yield Figure("idle: agent, PSS", served[agent], "MB")
    yield Figure("idle: engine child, PSS", sum(served.values()) - served[agent], "MB")
    yield Figure("idle: agent + one model, PSS", sum(served.values()), "MB", GOAL_MB)
    yield Figure("idle: before the first request, PSS", sum(loaded.values()), "MB")
    yield Figure("idle: upper bound, RSS (shared pages counted twice)", alone, "MB")


def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    found = [pid]
    for parent in found:
        for tasks in Path(f"/proc/{parent}/task").glob("*/children"):
            found += map(int, tasks.read_text().split())
    return found


def megabytes(pid: int, field: str) -> float:
    """One line of ``smaps_rollup``, which counts in KiB, in MB of 10^6 bytes."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"no {field} in /proc/{pid}/smaps_rollup")
