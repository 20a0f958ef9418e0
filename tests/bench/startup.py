"""How long a person, and a service manager, wait: ``sly --help``, and an agent from its start to READY.

How: each run is a fresh process; the wall time from its start to its end, or to ``READY=1`` of sd_notify.  The file cache is
warm: the first run is discarded.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from edge_agent.local_fleet import LocalFleet, Member
from models.catalog import card
from models.fetch import fetch
from tests.bench.figures import Figure, Progress, p50

MODEL = "blazeface-short"
RUNS, AGENT_RUNS = 10, 5
HELP_GOAL_MS = 300.0
NO_BROKER_PORT = 1


def measure(progress: Progress) -> Iterator[Figure]:
    fetch(card(MODEL), report=progress)
    command = [sys.executable, "-m", "edge_agent.cli", "--help"]
    yield Figure("sly --help, p50", _timed("sly --help", RUNS, lambda: _quiet(command), progress), "ms", HELP_GOAL_MS)
    bare = [sys.executable, "-c", "pass"]
    yield Figure("python -c pass, p50", _timed("python", RUNS, lambda: _quiet(bare), progress), "ms")
    yield Figure("sly agent, start to READY with one model, p50", _timed("agent", AGENT_RUNS, _until_ready, progress), "ms")


def _quiet(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


def _until_ready() -> float:
    """A cold boot without a broker: nothing listens on the port that the configuration names."""
    with tempfile.TemporaryDirectory(prefix="sly-bench-") as name:
        members = [Member("solo", "raspberry_pi_5")]
        with LocalFleet(Path(name), members, [MODEL], NO_BROKER_PORT) as fleet:
            started = time.perf_counter()
            fleet.start()
            return time.perf_counter() - started


def _timed(what: str, runs: int, run: Callable[[], float], progress: Progress) -> float:
    samples = []
    for number in range(runs + 1):
        progress(f"{what}, run {number} of {runs}")
        samples.append(run() * 1000)
    return p50(samples[1:])
