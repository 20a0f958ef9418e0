"""What it costs a board to check the metadata of an update: a child process with python-tuf.

How: the agent's own ``ota.checking.check`` of the repository that ``sly fleet init`` makes, with one release, as it lies on
``ota/meta/``; wall time in this process, from the question until the answer; memory: the most that any child of this process held
at once (getrusage(2), ru_maxrss).
"""

from __future__ import annotations

import asyncio
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ota.charter import CHARTER_PATH
from ota.checking import check
from ota.manifest import AGENT, Kind, manifest_path
from ota.release import build_release
from ota.repository import Repository
from tests.bench.figures import Figure, Progress, p50

ROUNDS = 15


def measure(progress: Progress) -> Iterator[Figure]:
    progress("a fleet with one release")
    with tempfile.TemporaryDirectory(prefix="sly-bench-") as name:
        folder = Path(name)
        repository = Repository.create(folder / "repository", "bench")
        file = folder / "agent.whl"
        file.write_bytes(bytes(2**20))
        files = {file.name: file}
        repository.add_release(build_release(AGENT, 1, "", files, Kind.AGENT), files)
        repository.commit()
        documents, root = dict(repository.documents()), repository.documents()["1.root"]
        wanted = [CHARTER_PATH, manifest_path(AGENT, 1)]
        first: list[float] = []
        again: list[float] = []
        for at in range(ROUNDS):
            progress(f"check {at + 1} of {ROUNDS}")
            place = folder / f"metadata-{at}"
            for taken in (first, again):
                began = time.perf_counter()
                asyncio.run(check(place, root, documents, wanted, {}, 0))
                taken.append(time.perf_counter() - began)
    yield Figure("metadata of an update, checked in a child: from the root on, p50", p50(first) * 1000, "ms")
    yield Figure("the same when nothing is new, p50", p50(again) * 1000, "ms")
    largest_kib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    yield Figure("the largest such child, RSS", largest_kib / 1024, "MiB")
