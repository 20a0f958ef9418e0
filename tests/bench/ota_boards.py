"""Boards of the benchmark ``ota``, in a process of their own: each has a link, a ``Fetching`` and a ``Staging``, nothing else.

``python -m tests.bench.ota_boards PORT FOLDER COUNT SEED``: what lies described in FOLDER is fetched by COUNT boards, after all
of them have what they can copy from the file SEED (``-`` for none).  They begin when a line comes on stdin; for each that is done
a line of JSON goes out.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from contextlib import suppress
from pathlib import Path

from edge_agent.core.clock import SystemClock
from edge_agent.core.cose import Signer
from edge_agent.core.errors import UnavailableError
from edge_agent.store.blobs import BlobStore
from edge_agent.store.staging import Staging
from edge_agent.transport.link import Delivered, LinkDown, LinkEvent, LinkUp, Message
from edge_agent.transport.mqtt import BrokerAddress, MqttLink
from edge_agent.transport.topics import Topics
from ota.chunks import Artefact, decode_chunk, sign_wants
from ota.fetching import Fetching

FLEET = "bench"
BUDGET_BYTES = 2**30
TICK_S = 0.1
TIMEOUT_S = 600.0
CHUNKS, SIZES = "chunks", "sizes"


def signer_of(board: str) -> Signer:
    return Signer(board.encode(), board.encode().ljust(32, b"."))


def described(folder: Path) -> list[Artefact]:
    """What is fetched: the manifest as one piece, then the file in pieces."""
    sizes = json.loads((folder / SIZES).read_text())
    chunks = [b"", (folder / CHUNKS).read_bytes()]
    return [Artefact(bytes.fromhex(digest), size, chunks[n]) for n, (digest, size) in enumerate(sizes)]


class Board:
    def __init__(self, name: str, port: int, folder: Path, artefacts: list[Artefact], seed: Path | None) -> None:
        self.name, self._topics, self._clock = name, Topics(FLEET), SystemClock()
        self._staging = Staging(folder / name / "staging", BlobStore(folder / name / "blobs", BUDGET_BYTES))
        self._receiving = {each.digest.hex(): self._staging.open(each) for each in artefacts}
        if seed is not None:
            for each in self._receiving.values():
                each.seed_file(seed)
        self._fetching = {name: Fetching(each.pieces, each.held) for name, each in self._receiving.items()}  # type: ignore[arg-type]
        self._link = MqttLink(BrokerAddress("127.0.0.1", port), name, asyncio.get_running_loop())
        self._up, self._changed = asyncio.Event(), asyncio.Event()
        self._boot_epoch, self._number = time.time_ns() // 1000, 0
        self.received_bytes = self.asked_bytes = self.received = self.twice = 0

    async def connect(self) -> None:
        self._link.open(self._take)
        await self._up.wait()

    async def fetch(self) -> dict[str, object]:
        begun = time.perf_counter()
        while any(not each.done for each in self._fetching.values()):
            self._ask()
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), TICK_S)
            except TimeoutError:
                continue
        came_s = time.perf_counter() - begun
        self._ask()
        for each in self._receiving.values():
            await asyncio.to_thread(each.verify)
            each.finish()
        told = {"board": self.name, "came_s": came_s, "whole_s": time.perf_counter() - begun, "received": self.received}
        self._link.close()
        return told | {"bytes": self.received_bytes + self.asked_bytes, "twice": self.twice}

    def _ask(self) -> None:
        now_us = self._clock.monotonic_us()
        lacking = [each for each in self._fetching.values() if not each.done]
        if not self._link.up or lacking and not any(each.want_due(now_us) for each in lacking):
            return
        self._number += 1
        payload = sign_wants(
            self.name, self._boot_epoch, self._number, [each.ask(now_us) for each in lacking], signer_of(self.name)
        )
        self.asked_bytes += len(payload)
        with suppress(UnavailableError):  # the link says so itself, and all is asked anew when it is up again
            self._link.publish(Message(self._topics.ota_want(self.name), payload, retain=True))

    def _take(self, event: LinkEvent) -> None:
        if isinstance(event, LinkUp):
            for name, each in self._fetching.items():
                self._link.subscribe(self._topics.ota_chunk(name))
                each.again()
            self._up.set()
        elif isinstance(event, LinkDown):
            print(f"{self.name}: {event.reason}", file=sys.stderr)
        elif isinstance(event, Delivered):
            self._keep(event.message)
            self._link.acknowledge(event.token)

    def _keep(self, message: Message) -> None:
        name = message.topic.rsplit("/", 1)[1]
        index, data = decode_chunk(message.payload)
        self.received += 1
        self.received_bytes += len(message.payload) + len(message.topic)
        if not self._fetching[name].heard(index, data):
            self.twice += 1
            return
        self._receiving[name].put(index, data, checked=True)
        if self._fetching[name].done:
            self._link.unsubscribe(message.topic)
        if self._fetching[name].done or self._fetching[name].want_due(self._clock.monotonic_us()):
            self._changed.set()


async def _fetch_all(port: int, folder: Path, count: int, seed: Path | None) -> None:
    artefacts = described(folder)
    boards = [Board(f"b{number}", port, folder, artefacts, seed) for number in range(count)]
    await asyncio.gather(*(each.connect() for each in boards))
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    async with asyncio.timeout(TIMEOUT_S):
        for done in asyncio.as_completed([each.fetch() for each in boards]):
            print(json.dumps(await done), flush=True)


def main(port: str, folder: str, count: str, seed: str) -> None:
    asyncio.run(_fetch_all(int(port), Path(folder), int(count), None if seed == "-" else Path(seed)))


if __name__ == "__main__":
    main(*sys.argv[1:])
