"""What a fleet goes through in one seed: requests from all sides, and faults drawn at random, until it is calm again.

Rules: faults only while the weather lasts; then everything is mended, and every promise of ``VirtualFleet`` must come true.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from random import Random

from edge_agent.core.chat import CHAT
from edge_agent.core.config import QueueSection
from edge_agent.core.errors import UnavailableError
from edge_agent.core.values import InferenceRequest, ModelOffer
from edge_agent.node.events import Hosted, Sensed, Withdrawn
from edge_agent.store.ledger import Bounds
from edge_agent.transport.link import Delivered, LinkEvent, LinkUp, Message
from edge_agent.transport.loopback import Delay, Faults, Partition, Way
from tests.virtual_board import FLEET, REFUSABLE, VirtualBoard, offer
from tests.virtual_fleet import VirtualFleet

WEATHER_US = 15_000_000
SETTLE_US = 120_000_000
AGREE_US = 60_000_000
DEADLINES_US = (300_000, 2_000_000, 5_000_000, 12_000_000)
KEPT_MESSAGES = 64


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a seed. ``outcomes`` counts the answers by status."""

    trace_digest: str
    outcomes: Counter[str]
    virtual_us: int


async def ride_out(seed: int, verbose: bool = False) -> Outcome:
    """One fleet through one weather. Raises ``BrokenPromiseError``."""
    with VirtualFleet(seed, verbose) as fleet:
        weather = Weather(fleet, Random(f"weather {seed}"))
        await weather.gather()
        weather.forecast()
        fleet.run_for(WEATHER_US)
        weather.clear()
        fleet.settle(SETTLE_US)
        fleet.agree(AGREE_US)
        return Outcome(fleet.trace_digest, _outcomes(fleet), fleet.now_us)


def _outcomes(fleet: VirtualFleet) -> Counter[str]:
    return Counter(asked.answers[0].status.value for asked in fleet.asked if asked.answers)


class Weather:
    def __init__(self, fleet: VirtualFleet, random: Random) -> None:
        self._fleet, self._random = fleet, random
        self._adversary: Adversary | None = None

    async def gather(self) -> None:
        """The boards and the clients."""
        random, fleet = self._random, self._fleet
        self._cramped = random.random() < 0.25
        for i in range(random.randrange(2, 6)):
            board = fleet.add_board(f"b{i}", *self._offers(first=i == 0), queue=self._queue(), bounds=self._bounds())
            board.engine_ok_permille = random.choice((1000, 1000, 900, 500))
        fleet.boot()
        for i in range(random.randrange(3)):
            await fleet.add_client(f"camera{i}")
        if random.random() < 0.3:
            self._adversary = Adversary(fleet, Random(random.random()))
        fleet.run_for(random.choice((0, 2_000_000)))

    def forecast(self) -> None:
        """Everything that will happen, each at its time."""
        for _ in range(self._random.randrange(5, 40)):
            self._at_some_time(self._request)
        faults = (
            self._kill, self._kill, self._stop, self._stop_broker, self._partition, self._partition, self._rough_network,
            self._withdraw, self._heat, self._abandon, self._lose_client,
        )  # fmt: skip
        for _ in range(self._random.randrange(7)):
            self._at_some_time(self._random.choice(faults))

    def clear(self) -> None:
        if self._adversary is not None:
            self._adversary.leave()
        self._fleet.calm()

    def _at_some_time(self, what: Callable[[], object]) -> None:
        self._fleet.after(self._random.randrange(WEATHER_US), what)

    def _offers(self, first: bool) -> list[ModelOffer]:
        busy_us = self._random.choice((5_000, 50_000, 400_000))
        small, large = offer("small", busy_us, 700), offer("large", 3 * busy_us, 900)
        offers = self._random.choice(([small], [small, large], [small, large], [small] if first else []))
        if self._random.random() < 0.6:
            talk = offer("parrot", self._random.choice((200_000, 600_000)), 700, CHAT)
            offers = [*offers, replace(talk, parallel=self._random.choice((1, 2, 4)))]
        return offers

    def _queue(self) -> QueueSection:
        return QueueSection(max_requests=4, max_bytes=2**20) if self._cramped else QueueSection()

    def _bounds(self) -> Bounds | None:
        return Bounds(unanswered_count=3, owed_count=2, owed_bytes=4096) if self._cramped else None

    def _board(self) -> VirtualBoard:
        return self._random.choice(list(self._fleet.boards.values()))

    def _request(self) -> None:
        random, fleet = self._random, self._fleet
        if random.random() < 0.3:
            deadline_us, session = random.choice((2_000_000, 12_000_000, 60_000_000)), random.choice(("", "s1", "s2", "s3"))
            self._ask(fleet.turn(random.choice((1, 10, 40, 100)), deadline_us, session))
            return
        request = fleet.request(
            random.choice(DEADLINES_US),
            byte=random.choice((0, 0, 0, 0, 0, REFUSABLE)),
            size_bytes=random.choice((16, 16, 16, 100_000)),
            quality=random.choice((0, 0, 800, 950)) if random.random() < 0.3 else 0,
        )
        self._ask(request)

    def _ask(self, request: InferenceRequest) -> None:
        random, fleet = self._random, self._fleet
        boards = random.sample(list(fleet.boards), random.randrange(1, len(fleet.boards) + 1))
        client = random.choice(["", *fleet.clients])
        if not client:
            fleet.ask(request, *boards)
        else:
            fleet.ask_by_broker(client, request, *boards)

    def _kill(self) -> None:
        board = self._board()
        board.kill(power_cut=self._random.random() < 0.5)
        self._fleet.after(self._random.randrange(10_000, 8_000_000), board.boot)

    def _stop(self) -> None:
        board = self._board()
        board.stop()
        self._fleet.after(self._random.randrange(1_000_000, 8_000_000), board.boot)

    def _stop_broker(self) -> None:
        broker, keep = self._fleet.broker, self._random.random() < 0.5
        if not broker.running:
            return
        self._fleet.note("the broker stops")
        broker.stop()

        def start() -> None:
            self._fleet.note(f"the broker starts, and {'knows' if keep else 'has forgotten'} its sessions")
            if not broker.running:
                broker.start(keep_sessions=keep, keep_retained=keep)

        self._fleet.after(self._random.randrange(10_000, 8_000_000), start)

    def _partition(self) -> None:
        everyone = [*self._fleet.boards, *self._fleet.clients]
        islanders = self._random.sample(everyone, self._random.randrange(1, len(everyone) + 1))
        ways = self._random.choice((frozenset(Way), frozenset({Way.TO_BROKER}), frozenset({Way.FROM_BROKER})))
        self._fleet.note(f"{sorted(islanders)} are cut off, {sorted(way.value for way in ways)}")
        self._fleet.broker.partition(Partition(frozenset(islanders), ways))
        self._fleet.after(self._random.randrange(100_000, 8_000_000), self._fleet.broker.heal)

    def _rough_network(self) -> None:
        random = self._random
        self._fleet.broker.wire.faults = Faults(
            Delay(1_000, random.choice((0, 5_000, 500_000)), random.choice((0, 50)), 2_000_000),
            loss_permille=random.choice((0, 20, 200)),
            duplicate_permille=random.choice((0, 20, 300)),
            reorder_permille=random.choice((0, 100, 500)),
        )

    def _withdraw(self) -> None:
        board = self._board()
        if board.up and board.offers:
            gone = self._random.choice(board.offers)
            board.feed(Withdrawn(gone.model, "quarantined after three deaths"))
            self._fleet.after(self._random.randrange(5_000_000), lambda: board.feed(Hosted(gone)) if board.up else None)

    def _heat(self) -> None:
        board = self._board()
        if board.up:
            board.feed(Sensed(84_500, 85_000))
            self._fleet.after(self._random.randrange(5_000_000), lambda: board.feed(Sensed(50_000, 85_000)) if board.up else None)

    def _abandon(self) -> None:
        board = self._board()
        if board.up and (handle := board.some_handle()) is not None:
            board.abandon(handle)

    def _lose_client(self) -> None:
        if self._fleet.clients:
            self._fleet.lose_client(self._random.choice(list(self._fleet.clients)))


class Adversary:
    """Someone whom the broker lets write everywhere: repeats what boards signed, as it was or with a bit turned, and empties
    retained topics."""

    def __init__(self, fleet: VirtualFleet, random: Random) -> None:
        self._fleet, self._random = fleet, random
        self._heard: list[Message] = []
        self._link = fleet.link_of("mallory")
        self._link.open(self._hear)

    def leave(self) -> None:
        self._link.close()

    def _hear(self, event: LinkEvent) -> None:
        if isinstance(event, LinkUp):
            self._link.subscribe(f"sly/1/{FLEET}/#")
        elif isinstance(event, Delivered):
            self._link.acknowledge(event.token)
            signed = event.message.payload[:1] == b"\xd2"
            if signed and len(self._heard) < KEPT_MESSAGES:
                self._heard.append(event.message)
            if self._heard and self._random.random() < 0.3:
                self._fleet.after(self._random.randrange(3_000_000), self._speak)

    def _speak(self) -> None:
        message = self._random.choice(self._heard)
        payload = bytearray(message.payload)
        kind = self._random.randrange(4)
        if kind == 0:
            payload[self._random.randrange(len(payload))] ^= 1 << self._random.randrange(8)
        elif kind == 1:
            payload.clear()
        topic = message.topic if kind != 2 else self._random.choice(self._heard).topic
        retain = topic.endswith(("online", "record")) and self._random.random() < 0.5
        with suppress(UnavailableError):
            self._link.publish(Message(topic, bytes(payload), retain=retain, correlation=message.correlation))
