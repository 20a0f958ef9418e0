"""What crypto, the ledger and MQTT cost: the parts of a request that goes to another board.

How: signing and verifying are loops in this process, p50 of one call.  The ledger is the real file in the folder for temporary
files, so its fsync is that disk's (on a RAM disk it is nothing).  The round trip is a message of 50 kB from one link to
another over a broker on loopback, QoS 1, answered with 200 bytes.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from edge_agent.core import wire
from edge_agent.core.cose import Signer, sign1, verify1
from edge_agent.core.errors import UnavailableError
from edge_agent.core.values import InferenceRequest, ModelOffer, encoded_image
from edge_agent.gossip.record import BoardRecord, open_record, sign_record
from edge_agent.store.ledger import Ledger, Owed
from edge_agent.transport.embedded import EmbeddedBroker
from edge_agent.transport.link import Delivered, LinkEvent, LinkUp, Message
from edge_agent.transport.mqtt import BrokerAddress, MqttLink
from tests.bench.figures import Figure, Progress, p50
from tests.brokers import free_port, mosquitto

PICTURE_BYTES, MESSAGE_BYTES, ANSWER_BYTES = 60_000, 50_000, 200
CALLS, ROUND_TRIPS, WARM_UPS = 400, 300, 20
GROUPS = ((1, 200), (32, 10))
"""Requests in one transaction, and how many such transactions."""
TIMEOUT_S = 60.0
BOARD = "bench"


def measure(progress: Progress) -> Iterator[Figure]:
    yield from _crypto(progress)
    with tempfile.TemporaryDirectory(prefix="sly-bench-") as name:
        yield from _ledger(Path(name), progress)
        yield from _brokers(Path(name), progress)


def _crypto(progress: Progress) -> Iterator[Figure]:
    progress("signing and verifying")
    signer = Signer(BOARD.encode(), os.urandom(32))
    request = InferenceRequest(os.urandom(16).hex(), "detect_faces", {"image": encoded_image(os.urandom(PICTURE_BYTES))})
    offers = tuple(ModelOffer(f"model-{n}", "detect_faces", bytes(32), 800, 1000, 1000) for n in range(3))
    record = BoardRecord(BOARD, 1, 1, "a board", offers=offers)

    def key_of(kid: bytes) -> bytes:
        return signer.public_key

    def signed_request() -> bytes:
        return sign1(wire.encode_request(request, BOARD), signer, wire.AAD_REQUEST)

    def opened_request() -> InferenceRequest:
        return wire.decode_request(verify1(message, key_of, wire.AAD_REQUEST).payload, BOARD)

    message, told = signed_request(), sign_record(record, signer)
    yield Figure("request of 60 kB: encode and sign, p50", _p50_us(signed_request), "µs")
    yield Figure("request of 60 kB: verify and decode, p50", _p50_us(opened_request), "µs")
    yield Figure(f"record of {len(told)} bytes: encode and sign, p50", _p50_us(lambda: sign_record(record, signer)), "µs")
    yield Figure(f"record of {len(told)} bytes: verify and decode, p50", _p50_us(lambda: open_record(told, key_of)), "µs")


def _p50_us(call: Callable[[], object]) -> float:
    samples = []
    for _ in range(CALLS + WARM_UPS):
        started_ns = time.perf_counter_ns()
        call()
        samples.append((time.perf_counter_ns() - started_ns) / 1000)
    return p50(samples[WARM_UPS:])


def _ledger(folder: Path, progress: Progress) -> Iterator[Figure]:
    for size, times in GROUPS:
        progress(f"ledger, {times} groups of {size}")
        with Ledger(folder / f"ledger-{size}.db") as ledger:
            samples = [_group_s(ledger, f"{number:020x}", size) for number in range(times + 1)][1:]
        rate = size / p50(samples)
        yield Figure(f"ledger: accept, answer, deliver a request (groups of {size})", rate, "1/s")


def _group_s(ledger: Ledger, prefix: str, size: int) -> float:
    """Three transactions, each for the whole group: so a group of one has the three fsyncs of a lone request."""
    keys = [f"client/{prefix}{number:012x}" for number in range(size)]
    started = time.perf_counter()
    with ledger.transaction():
        for key in keys:
            ledger.accept(key, bytes(PICTURE_BYTES))
    with ledger.transaction():
        for key in keys:
            ledger.answer(key, bytes(ANSWER_BYTES), Owed(key, "topic", bytes(ANSWER_BYTES)))
    with ledger.transaction():
        for ticket, _ in ledger.owed(size):
            ledger.delivered(ticket)
    return time.perf_counter() - started


def _brokers(folder: Path, progress: Progress) -> Iterator[Figure]:
    if not shutil.which("mosquitto", path=os.environ.get("PATH", "") + ":/usr/sbin"):
        raise UnavailableError("Mosquitto", "it is not installed", "apt-get install mosquitto")
    progress("round trips through Mosquitto")
    with mosquitto(folder / "mosquitto") as broker:
        yield Figure("MQTT round trip of 50 kB, Mosquitto, p50", asyncio.run(_round_trip_us(broker.port)), "µs")
    progress("round trips through the embedded broker")
    with EmbeddedBroker(free_port()) as embedded:
        yield Figure("MQTT round trip of 50 kB, embedded, p50", asyncio.run(_round_trip_us(embedded.port)), "µs")


class _Peer:
    """A link that is up and subscribed to a topic of its own; what comes there goes to ``heard``."""

    def __init__(self, port: int, name: str, heard: Callable[[bytes], None]) -> None:
        self.link = MqttLink(BrokerAddress("127.0.0.1", port), name, asyncio.get_running_loop())
        self._topic, self._heard = f"bench/{name}", heard
        self._subscribed = asyncio.Event()

    async def open(self) -> None:
        self.link.open(self._take)
        await self._subscribed.wait()

    def _take(self, event: LinkEvent) -> None:
        if isinstance(event, LinkUp):
            self.link.subscribe(self._topic)
            self.link.publish(Message(self._topic, b""))
        elif isinstance(event, Delivered):
            self.link.acknowledge(event.token)
            self._subscribed.set()
            if event.message.payload:
                self._heard(event.message.payload)


async def _round_trip_us(port: int) -> float:
    back = asyncio.Event()
    far = _Peer(port, "far", lambda _: far.link.publish(Message("bench/near", bytes(ANSWER_BYTES))))
    near = _Peer(port, "near", lambda _: back.set())
    samples = []
    try:
        async with asyncio.timeout(TIMEOUT_S):
            await far.open()
            await near.open()
            for _ in range(ROUND_TRIPS + WARM_UPS):
                back.clear()
                started_ns = time.perf_counter_ns()
                near.link.publish(Message("bench/far", bytes(MESSAGE_BYTES)))
                await back.wait()
                samples.append((time.perf_counter_ns() - started_ns) / 1000)
    except TimeoutError:
        raise UnavailableError(f"broker on port {port}", f"{len(samples)} round trips in {TIMEOUT_S:g} s") from None
    finally:
        near.link.close()
        far.link.close()
    return p50(samples[WARM_UPS:])
