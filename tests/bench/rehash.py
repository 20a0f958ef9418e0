"""What it costs to measure all the time: the background re-hash at its default rate, as a share of one core, and its memory.

How: the agent's own ``Measuring`` on an event loop of this process, over 256 MiB of files, so that it never rests; CPU time of
the process (user and system) over the wall time.  The pages are in the page cache, as those of a mapped model are.  Memory: PSS
of a real daemon with one model, with ``[attest] on`` and without.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from edge_agent.attest.measure import FileSet, Software, file_digest, library_files
from edge_agent.core.clock import SystemClock
from edge_agent.core.config import AttestSection
from edge_agent.hosting import Host
from edge_agent.local_fleet import LocalFleet, Member
from edge_agent.shell.measuring import Measuring
from models.catalog import card
from models.fetch import fetch
from tests.bench.figures import Figure, Progress
from tests.bench.memory import MODEL, family, megabytes

FILES, FILE_BYTES = 2, 128 * 2**20
SPAN_S = 12.0
GOAL_PERCENT = 2.0
SETTLE_S = 12.0
"""A round of one small model and the library: every page was read once."""


class NoModels:
    def mapped(self) -> list[Any]:
        return []


def measure(progress: Progress) -> Iterator[Figure]:
    fetch(card(MODEL), report=progress)
    with tempfile.TemporaryDirectory(prefix="sly-bench-") as name:
        software = _large(Path(name))
        progress(f"hashing for {SPAN_S:g} s")
        percent, hashed_bytes = asyncio.run(_hashing(software))
    yield Figure("background re-hash at the default rate, of one core", percent, "%", GOAL_PERCENT)
    yield Figure("background re-hash: bytes hashed a second", hashed_bytes / SPAN_S / 2**20, "MiB/s")
    library = library_files("auto")
    started = time.process_time()
    library.digests()
    yield Figure("interpreter library, hashed once at the start", (time.process_time() - started) * 1000, "ms")
    off, on = (_agent_mb(settings, progress) for settings in ("[attest]\non = false\n", ""))
    yield Figure("agent's PSS that attestation adds", on - off, "MB")


def _large(folder: Path) -> Software:
    paths = [folder / str(number) for number in range(FILES)]
    for path in paths:
        path.write_bytes(os.urandom(2**20) * (FILE_BYTES // 2**20))
    files = FileSet("bench", {path.name: path for path in paths})
    return Software(bytes(32), files, {path.name: file_digest(path) for path in paths})


async def _hashing(software: Software) -> tuple[float, int]:
    rate, clock = AttestSection().rehash_bytes_per_s, SystemClock()
    measuring = Measuring(cast(Host, NoModels()), software, bytes(32), rate, clock, lambda event: None, print)
    measuring.begin()
    running = asyncio.create_task(measuring.measure_for_ever())
    await asyncio.sleep(1)
    before, started, cpu = _read_bytes(), time.perf_counter(), time.process_time()
    await asyncio.sleep(SPAN_S)
    percent = (time.process_time() - cpu) / (time.perf_counter() - started) * 100
    hashed_bytes = _read_bytes() - before
    running.cancel()
    await asyncio.wait([running])
    measuring.close()
    return percent, hashed_bytes


def _read_bytes() -> int:
    """What this process has read until now (proc(5), io)."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


def _agent_mb(settings: str, progress: Progress) -> float:
    progress(f"an agent for {SETTLE_S:g} s, {settings.strip() or 'attesting'}")
    with (
        tempfile.TemporaryDirectory(prefix="sly-bench-") as name,
        LocalFleet(Path(name), [Member("solo", "raspberry_pi_5")], [MODEL], 0, settings=settings) as fleet,
    ):
        fleet.start()
        time.sleep(SETTLE_S)
        return megabytes(family(fleet.pid_of("solo"))[0], "Pss")
