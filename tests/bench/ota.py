"""What an update over the air costs: bytes for a revision, upload for twenty boards, and the pace of a push beside mosquitto_pub.

How: a real Mosquitto with its defaults for queues; the giver is this process (``Giving`` over an ``MqttLink``, pieces read from
the file as they go), the boards are another (``tests/bench/ota_boards.py``).  A board's bytes are all payloads and topics that it
got and asked with, the manifest too.  For the pace a board's push and ``mosquitto_pub -q 1 -l`` of as many lines of that length,
with one subscriber each, alternate; a push counts from the first want until the last piece is checked and written, less the
quarter of a second in which others may ask too, mosquitto_pub until the broker has the last line, whoever else has it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from base64 import b64encode
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from random import Random

from edge_agent.core.clock import SystemClock
from edge_agent.core.errors import UnavailableError
from edge_agent.transport.link import Delivered, LinkEvent, LinkUp, Message, Published
from edge_agent.transport.mqtt import BrokerAddress, MqttLink
from edge_agent.transport.topics import Kind, Topics
from ota.chunks import Artefact, encode_chunk, open_wants
from ota.giving import Giving
from ota.manifest import CHUNK_BYTES
from ota.offer import GATHER_US
from tests.bench.figures import Figure, Progress, p50
from tests.bench.ota_boards import CHUNKS, FLEET, SIZES, signer_of
from tests.brokers import mosquitto

MODEL_BYTES = 136_000_000
BOARDS = 20
PAIRS = 5
RUNS = 20
"""Stretches of the file that a revision changes, together one in a hundred of its bytes."""
MAX_UNDER_WAY = 64
LINES = -(-MODEL_BYTES // CHUNK_BYTES)
TIMEOUT_S = 600.0


def measure(progress: Progress) -> Iterator[Figure]:
    if not (shutil.which("mosquitto_pub") and shutil.which("mosquitto", path=os.environ.get("PATH", "") + ":/usr/sbin")):
        raise UnavailableError("Mosquitto", "it or its clients are not installed", "apt-get install mosquitto mosquitto-clients")
    with tempfile.TemporaryDirectory(prefix="sly-bench-") as name, mosquitto(Path(name) / "mosquitto") as broker:
        folder = Path(name)
        progress("two releases of 136 MB")
        old, new = folder / "old", folder / "new"
        _write_releases(old, new, RUNS)
        yield from _revision(broker.port, folder, old, new, progress)
        yield from _fleet(broker.port, folder, new, progress)
        yield from _pace(broker.port, folder, new, progress)


def _revision(port: int, folder: Path, old: Path, new: Path, progress: Progress) -> Iterator[Figure]:
    progress("a revision that changes 1 %")
    (told,), _ = asyncio.run(_push(port, folder / "revised", new, 1, old))
    share = int(told["bytes"]) / MODEL_BYTES * 100
    yield Figure(f"revision of 1 % in {RUNS} stretches: bytes of a board", share, "% of the file", 3)
    for runs in (1, 200, 2000):
        progress(f"a revision in {runs} stretches, counted")
        other = folder / "other"
        _write_releases(old, other, runs)
        pieces = sum(a != b for a, b in zip(_digests(old), _digests(other), strict=True))
        yield Figure(f"the same in {runs} stretches: pieces that differ", pieces / LINES * 100, "% of the file")


def _fleet(port: int, folder: Path, new: Path, progress: Progress) -> Iterator[Figure]:
    given = {}
    for count in (1, BOARDS):
        progress(f"a push to {count}")
        told, given[count] = asyncio.run(_push(port, folder / f"fleet-{count}", new, count, None))
        seconds = max(float(each["whole_s"]) for each in told)
        yield Figure(f"a push of 136 MB to {count}: until all have it, whole and durable", seconds, "s")
        shutil.rmtree(folder / f"fleet-{count}")
    yield Figure(f"upload for {BOARDS} boards, of that for one", given[BOARDS] / given[1], "x", 1.2)


def _pace(port: int, folder: Path, new: Path, progress: Progress) -> Iterator[Figure]:
    lines = folder / "lines"
    with lines.open("wb") as file:
        for _ in range(LINES):
            file.write(b64encode(os.urandom(CHUNK_BYTES * 3 // 4)) + b"\n")
    pushes, plain = [], []
    for number in range(PAIRS):
        progress(f"pace, pair {number + 1} of {PAIRS}")
        (told,), _ = asyncio.run(_push(port, folder / "pace", new, 1, None))
        pushes.append(MODEL_BYTES / 1e6 / (float(told["came_s"]) - GATHER_US / 1e6))
        shutil.rmtree(folder / "pace")
        plain.append(MODEL_BYTES / 1e6 / _plain_s(port, lines))
    yield Figure("a push to one board", p50(pushes), "MB/s")
    yield Figure("mosquitto_pub of the same chunks", p50(plain), "MB/s")
    slower = p50([b / a for a, b in zip(pushes, plain, strict=True)])
    yield Figure("mosquitto_pub's pace, of the push's", slower, "x", 1 / 0.7)


def _plain_s(port: int, lines: Path) -> float:
    """From the start of mosquitto_pub until it ends, while a subscriber listens."""
    where = ["-p", str(port), "-t", "plain", "-q", "1", "-V", "5"]
    subprocess.run(["mosquitto_pub", *where, "-r", "-m", "x"], check=True)
    with subprocess.Popen(["stdbuf", "-oL", "mosquitto_sub", *where, "-F", "%l"], stdout=subprocess.PIPE) as subscriber:
        assert subscriber.stdout
        subscriber.stdout.readline()
        begun = time.perf_counter()
        with lines.open("rb") as file:
            subprocess.run(["mosquitto_pub", *where, "-l"], stdin=file, check=True, timeout=TIMEOUT_S)
        lasted_s = time.perf_counter() - begun
        subscriber.terminate()
    return lasted_s


async def _push(port: int, folder: Path, new: Path, count: int, seed: Path | None) -> tuple[list[dict[str, object]], int]:
    """What each of ``count`` boards says when it is done, and the bytes that were given."""
    folder.mkdir()
    giver = _Giver(port, new)
    giver.describe(folder)
    command = [sys.executable, "-m", "tests.bench.ota_boards", str(port), str(folder), str(count), str(seed or "-")]
    boards = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE)
    assert boards.stdin and boards.stdout
    try:
        async with asyncio.timeout(TIMEOUT_S):
            await boards.stdout.readline()
            giver.open()
            boards.stdin.write(b"go\n")
            told = [json.loads(await boards.stdout.readline()) for _ in range(count)]
            await boards.wait()
    except TimeoutError:
        boards.kill()
        raise UnavailableError("the boards of the benchmark", f"not done after {TIMEOUT_S:g} s") from None
    finally:
        giver.close()
    return told, giver.given_bytes


class _Giver:
    """The operator's machine: what ``Giving`` says, over a link, read as it goes."""

    def __init__(self, port: int, path: Path) -> None:
        self._topics, self._clock = Topics(FLEET), SystemClock()
        self._manifest = b"".join(_digests(path))
        self._giving = Giving("desk", first=True)
        self._link = MqttLink(BrokerAddress("127.0.0.1", port), "desk", asyncio.get_running_loop())
        self._fd = os.open(path, os.O_RDONLY)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
        self._artefacts = {each.digest: each for each in (
            Artefact(sha256(self._manifest).digest(), len(self._manifest)),
            Artefact(digest, MODEL_BYTES, self._manifest),
        )}  # fmt: skip
        self._under_way = 0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def given_bytes(self) -> int:
        return self._giving.given_bytes

    def describe(self, folder: Path) -> None:
        sizes = [(each.digest.hex(), each.size_bytes) for each in self._artefacts.values()]
        (folder / SIZES).write_text(json.dumps(sizes))
        (folder / CHUNKS).write_bytes(self._manifest)

    def open(self) -> None:
        for each in self._artefacts.values():
            self._giving.hold(each)
        self._link.open(self._take)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._link.close()
        os.close(self._fd)

    def _take(self, event: LinkEvent) -> None:
        if isinstance(event, LinkUp):
            self._link.subscribe(self._topics.every(Kind.OTA_WANT))
        elif isinstance(event, Published):
            self._under_way -= 1
        elif isinstance(event, Delivered):
            self._link.acknowledge(event.token)
            wants = open_wants(event.message.payload, lambda kid: signer_of(kid.decode()).public_key)
            self._giving.heard_wants(wants, self._clock.monotonic_us())
        self._give()

    def _give(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now_us = self._clock.monotonic_us()
        while self._under_way < MAX_UNDER_WAY and (piece := self._giving.next(now_us)) is not None:
            self._link.publish(self._message(*piece), ticket=1)
            self._giving.sent(*piece, now_us)
            self._under_way += 1
        due_us = self._giving.next_us(now_us)
        if self._under_way < MAX_UNDER_WAY and due_us is not None:
            self._timer = asyncio.get_running_loop().call_later(max(0, due_us - now_us) / 1e6, self._give)

    def _message(self, digest: bytes, index: int) -> Message:
        artefact = self._artefacts[digest]
        data = os.pread(self._fd, artefact.piece_bytes(index), index * CHUNK_BYTES) if artefact.chunks else self._manifest
        return Message(self._topics.ota_chunk(digest.hex()), encode_chunk(index, data))


def _write_releases(old: Path, new: Path, runs: int) -> None:
    """``old`` if it is not there, and ``new``: the same with one in a hundred bytes changed, in ``runs`` even stretches."""
    if not old.exists():
        old.write_bytes(Random(1).randbytes(MODEL_BYTES))
    shutil.copyfile(old, new)
    random, each_bytes = Random(2), MODEL_BYTES // 100 // runs
    with new.open("r+b") as file:
        for number in range(runs):
            file.seek(MODEL_BYTES // runs * number + random.randrange(MODEL_BYTES // runs - each_bytes))
            file.write(random.randbytes(each_bytes))


def _digests(path: Path) -> list[bytes]:
    with path.open("rb") as file:
        return [sha256(piece).digest() for piece in iter(lambda: file.read(CHUNK_BYTES), b"")]
