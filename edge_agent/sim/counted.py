"""What a cell's boards really say: production nodes on virtual time over the lossy broker, each message counted by its kind.

Owns ``count``.  Rules: counted is what a board publishes and what the broker delivers to one, as the production node sees both;
the time before ``settled_us`` is not counted, in which boards boot and learn what a job costs; temperatures tremble as sensors
on metal do; no trace is made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from hashlib import sha256

from edge_agent.core.config import AttestSection
from edge_agent.core.values import DataClass
from edge_agent.node.events import Effect, Event, Sensed
from edge_agent.sim.board import SimBoard
from edge_agent.sim.fleet import START_US, SimFleet
from edge_agent.sim.scenario import ArrivalPlan, BoardPlan, LinkPlan, ModelPlan, Scenario
from edge_agent.sim.sharing import shared_work
from edge_agent.sim.traffic import Cell, packet_bytes
from edge_agent.transport.link import Delivered, Message
from edge_agent.transport.topics import Kind, Topics

SETTLED_US = 75_000_000
STEP_US = 1_000_000
SENSOR_STEP_MDEGC, TREMBLES_STEPS = 487, 3
"""A temperature is one of three neighbouring steps at random, each what a Raspberry Pi 4's sensor counts by (``coefficients`` in
Linux's bcm2711.dtsi)."""
TASK = "detect_objects"
DETECTOR = ModelPlan(
    name="ssd-mobilenet", task=TASK, quality_permille=600, macs=300_000_000, weight_bytes=4_500_000, activation_bytes=8_000_000,
    io_bytes=270_000, launches=60,
)  # fmt: skip
PROFILE = "raspberry_pi_5"
Progress = Callable[[int, int], None]


@dataclass(slots=True)
class Counted:
    """In ``window_us``: messages and MQTT bytes that boards published, and that were delivered to them, by kind."""

    window_us: int = 0
    """Of all cells that were counted together."""
    sent: Counter[Kind] = field(default_factory=Counter)
    sent_bytes: Counter[Kind] = field(default_factory=Counter)
    heard: Counter[Kind] = field(default_factory=Counter)
    heard_bytes: Counter[Kind] = field(default_factory=Counter)

    def add(self, other: Counted) -> None:
        """Another cell: rates are those of one cell on average."""
        self.window_us += other.window_us
        for mine, its in zip(self._counters, other._counters, strict=True):
            mine.update(its)

    def sent_hz(self, kind: Kind) -> float:
        return self.sent[kind] * 1e6 / self.window_us

    def heard_hz(self, kind: Kind) -> float:
        return self.heard[kind] * 1e6 / self.window_us

    def packet_bytes(self, kind: Kind) -> float:
        """Of one that was published, on average; 0 if none was."""
        return self.sent_bytes[kind] / self.sent[kind] if self.sent[kind] else 0.0

    @property
    def _counters(self) -> tuple[Counter[Kind], ...]:
        return self.sent, self.sent_bytes, self.heard, self.heard_bytes


class CountedBoard(SimBoard):
    fleet: CountedFleet

    def feed(self, event: Event) -> None:
        super().feed(self._trembling(event) if isinstance(event, Sensed) else event)

    def before_event(self, event: Event) -> None:
        if isinstance(event, Delivered):
            self.fleet.counts(event.message, self.fleet.counted.heard, self.fleet.counted.heard_bytes)

    def before_effect(self, effect: Effect) -> None:
        pass

    def before_publish(self, message: Message) -> None:
        self.fleet.counts(message, self.fleet.counted.sent, self.fleet.counted.sent_bytes)

    def _trembling(self, event: Sensed) -> Sensed:
        if event.temperature_mdegc is None:
            return event
        drawn = sha256(f"{self.name} {self.fleet.now_us}".encode()).digest()[0] % TREMBLES_STEPS
        steps = event.temperature_mdegc // SENSOR_STEP_MDEGC + drawn
        return replace(event, temperature_mdegc=steps * SENSOR_STEP_MDEGC)


class CountedFleet(SimFleet):
    board_kind = CountedBoard

    def __init__(self, scenario: Scenario, seed: int, settled_us: int) -> None:
        super().__init__(scenario, seed)
        self.counted, self._settled_us = Counted(), settled_us
        self._topics, self._kinds = Topics("home"), dict[str, Kind]()

    def counts(self, message: Message, messages: Counter[Kind], size_bytes: Counter[Kind]) -> None:
        if self.since_start_us < self._settled_us:
            return
        kind = self._kinds.get(message.topic)
        if kind is None:
            kind = self._kinds[message.topic] = self._topics.parse(message.topic).kind
        messages[kind] += 1
        size_bytes[kind] += packet_bytes(message)


def count(cell: Cell, window_us: int, seed: int, settled_us: int = SETTLED_US, progress: Progress | None = None) -> Counted:
    """Run one cell, and count for ``window_us`` of virtual time. ``progress`` is told virtual µs done and to do."""
    whole_us = settled_us + window_us
    with shared_work(), CountedFleet(_scenario(cell, whole_us, seed), seed, settled_us) as fleet:
        fleet.begin()
        while fleet.since_start_us < whole_us:
            fleet.clock.run_until(min(fleet.now_us + STEP_US, START_US + whole_us))
            if progress:
                progress(max(0, fleet.since_start_us), whole_us)
        fleet.counted.window_us = window_us
        return fleet.counted


def _scenario(cell: Cell, whole_us: int, seed: int) -> Scenario:
    boards = tuple(_board(cell, number, seed) for number in range(cell.boards))
    sources = tuple(board.id for board in boards if not board.models)
    plan = ArrivalPlan(
        kind="poisson", deadline_ms=5_000, task=TASK, rate_mhz=max(1, cell.sources * cell.requests_mhz), ingress=sources,
        data=DataClass.PUBLIC, size_bytes=cell.request_bytes, roam_permille=1000,
    )  # fmt: skip
    return Scenario(
        name="cell", title="a cell", duration_us=whole_us, warmup_us=0, boards=boards, models=(DETECTOR,),
        arrivals=(plan,) if cell.given_hz else (), links=LinkPlan(loss_permille=1),
        attest=AttestSection(epoch_s=cell.epoch_us // 1_000_000),
    )  # fmt: skip


def _board(cell: Cell, number: int, seed: int) -> BoardPlan:
    """Sources are spread evenly; who is apart boots at any moment of an epoch."""
    is_source = (number + 1) * cell.sources // cell.boards > number * cell.sources // cell.boards
    drawn = int.from_bytes(sha256(f"{seed} {number}".encode()).digest()[:4])
    joins_ms = 1 + drawn % (cell.epoch_us // 1000) if cell.apart else 0
    return BoardPlan(f"board-{number:04d}", PROFILE, models=() if is_source else (DETECTOR.name,), joins_ms=joins_ms)
