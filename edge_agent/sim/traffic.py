"""What a cell of boards costs its broker: messages and bytes a second of each kind, computed from the protocol's own periods.

Owns ``flows``, a pure function of a ``Cell``.  Rules: periods, neighbours and witnesses are read where the protocol has them;
sizes are those of messages that the production voice signs; nothing is measured here (``sim.counted`` counts the same in a
simulation).  A cell is one gossip domain: a fleet of its own name, whose boards hear each other and nobody else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import exp

from edge_agent.attest.quorum import NEIGHBOURS
from edge_agent.attest.telling import SAY_AGAIN_EPOCHS, WITNESSES
from edge_agent.attest.verifier import ASK_AFTER
from edge_agent.core.values import MAX_BOARDS, bounded
from edge_agent.node.announcer import CHANGED_PERIOD_US, QUIET_PERIOD_US
from edge_agent.node.told import WAVE_PERIOD_US
from edge_agent.sim.specimens import specimens
from edge_agent.transport.link import Message
from edge_agent.transport.topics import Kind

SECOND_US = 1_000_000
SENSE_US = 2_000_000
"""As often as a board's sensors are read, after which its record is another one where the temperature moved."""
TABLES_A_WAVE = 2
"""Where requests come, costs and demand move: about so many tables are made in each wave of small changes (``node.told``)."""
TICK_US = 100_000
ACK_BYTES = 4
"""A PUBACK without a reason (MQTT 5, section 3.4)."""
TLS_BYTES, TCP_BYTES = 22, 52
"""Assumed of each packet: a TLS 1.3 record (RFC 8446, section 5.2: 5 + 1 + 16); IPv4, TCP and its timestamps (20 + 20 + 12)."""


@dataclass(frozen=True, slots=True)
class Cell:
    """``sources`` of the ``boards`` host no model and give each of their requests to another board; the others host one and work.

    ``requests_mhz``: thousandths of a request a second that come in at each source.  Local requests cost no message.
    ``warm``: temperatures move, as they do on metal; else boards at rest say the same until their period is over.
    ``apart``: boards booted at different moments, as they do in the field.
    """

    boards: int
    sources: int = 0
    requests_mhz: int = 0
    request_bytes: int = 16_384
    warm: bool = True
    apart: bool = True
    epoch_us: int = 30_000_000

    def __post_init__(self) -> None:
        bounded("cell's boards", self.boards, 2, MAX_BOARDS)
        bounded("cell's sources", self.sources, 0, self.boards - 1)
        bounded("cell's requests_mhz", self.requests_mhz, 0, 10**6, "mHz")
        bounded("cell's request_bytes", self.request_bytes, 1, 2**22, "bytes")
        bounded("cell's epoch_us", self.epoch_us, SECOND_US, 3_600 * SECOND_US, "µs")

    @property
    def workers(self) -> int:
        return self.boards - self.sources

    @property
    def given_hz(self) -> float:
        """Requests a second of the whole cell, each of which goes from one board to another."""
        return self.sources * self.requests_mhz / 1000

    @property
    def neighbours(self) -> int:
        return min(NEIGHBOURS, self.boards - 1)

    @property
    def listeners(self) -> int:
        """Who hears a quote or an epoch: the neighbours, or all where those are most of them (``Attestation.topic_filters``)."""
        return self.boards if 2 * self.neighbours >= self.boards else self.neighbours


@dataclass(frozen=True, slots=True)
class Flow:
    """One kind of message in a whole cell. ``sent_hz`` come to the broker a second, each goes out ``fan_out`` times."""

    kind: Kind
    sent_hz: float
    fan_out: int
    packet_bytes: int
    """Of MQTT, without acknowledgements and what lies below."""
    payload_bytes: int
    kept: int = 0
    """Retained messages of this kind that the broker holds."""

    @property
    def heard_hz(self) -> float:
        return self.sent_hz * self.fan_out


@dataclass(frozen=True, slots=True)
class Total:
    """Of a cell, or of many, a second: what comes to the broker and what goes out, in messages and in bytes on the wire."""

    in_hz: float
    out_hz: float
    in_bytes: float
    out_bytes: float
    kept: int
    kept_bytes: int


def flows(cell: Cell) -> list[Flow]:
    """Every kind of message of a cell that goes on as it is, most often heard first."""
    samples = specimens(cell.boards, cell.request_bytes, cell.sources)
    made = [_flow(kind, rate_hz, fan_out, kept, samples[kind]) for kind, rate_hz, fan_out, kept in _rates(cell)]
    return sorted(made, key=lambda flow: (-flow.heard_hz, flow.kind))


def total(made: list[Flow], cells: int = 1) -> Total:
    """With acknowledgements (every message is QoS 1, so each is acknowledged on either side), TLS and TCP."""
    below, acknowledged = TLS_BYTES + TCP_BYTES, ACK_BYTES + TLS_BYTES + TCP_BYTES
    in_hz, out_hz = sum(flow.sent_hz for flow in made), sum(flow.heard_hz for flow in made)
    in_bytes = sum(flow.sent_hz * (flow.packet_bytes + below) for flow in made) + out_hz * acknowledged
    out_bytes = sum(flow.heard_hz * (flow.packet_bytes + below) for flow in made) + in_hz * acknowledged
    kept, kept_bytes = sum(flow.kept for flow in made), sum(flow.kept * flow.packet_bytes for flow in made)
    return Total(cells * in_hz, cells * out_hz, cells * in_bytes, cells * out_bytes, cells * kept, cells * kept_bytes)


def _flow(kind: Kind, sent_hz: float, fan_out: int, kept: int, sample: Message) -> Flow:
    return Flow(kind, sent_hz, fan_out, packet_bytes(sample), len(sample.payload), kept)


def _rates(cell: Cell) -> Iterator[tuple[Kind, float, int, int]]:
    """Of each kind: how many a second, who hears each, how many are retained."""
    n, quote_hz = cell.boards, _quote_hz(cell)
    quiet_hz, epoch_hz = SECOND_US / QUIET_PERIOD_US, SECOND_US / cell.epoch_us
    said_again_hz = epoch_hz * cell.neighbours / min(SAY_AGAIN_EPOCHS, cell.neighbours)
    yield Kind.ONLINE, n * quiet_hz, n, n
    yield Kind.DIGEST, n * (TABLES_A_WAVE * SECOND_US / WAVE_PERIOD_US if cell.given_hz else quiet_hz), n, n
    yield Kind.APPRAISAL, n * (quote_hz * min(WITNESSES, cell.neighbours) + said_again_hz), n, n * cell.neighbours
    yield Kind.QUOTE, n * quote_hz, cell.listeners, n
    yield Kind.EPOCH, n * epoch_hz, cell.listeners, n
    yield Kind.CHALLENGE, n * quote_hz if cell.apart else 0.0, 1, 0
    yield Kind.REQUEST, cell.given_hz, 1, 0
    yield Kind.REPLY, cell.given_hz, 1, 0
    other_hz = sum(hz * fan_out for _, hz, fan_out, _ in _rates_of_others(cell)) / n
    worked_hz = cell.given_hz / cell.workers
    yield Kind.RECORD, cell.workers * _record_hz(cell, worked_hz, other_hz) + cell.sources * _record_hz(cell, 0.0, other_hz), n, n


def _rates_of_others(cell: Cell) -> Iterator[tuple[Kind, float, int, int]]:
    """Without records: about what makes a board look up."""
    bare = replace(cell, sources=0, requests_mhz=0)
    n = cell.boards
    yield Kind.ONLINE, 3 * n * SECOND_US / QUIET_PERIOD_US, n, n
    yield Kind.APPRAISAL, n * (2 * _quote_hz(bare)), n, n
    yield Kind.REQUEST, 4 * cell.given_hz, 1, 0


def _quote_hz(cell: Cell) -> float:
    """A quote a board and epoch, where all epochs turn at once.

    Else a verifier whose epoch is half over asks for one; that serves all whose half comes within the next half epoch, and then
    the first of the others asks: of ``k`` moments that lie anywhere in an epoch, after a gap of 1/(k + 1) of it on average.
    """
    epoch_s = cell.epoch_us / SECOND_US
    if not cell.apart:
        return 1 / epoch_s
    return 1 / (epoch_s * (1 / ASK_AFTER + 1 / (cell.neighbours + 1)))


def _record_hz(cell: Cell, worked_hz: float, looks_hz: float) -> float:
    """How often a board says its record anew, at which ``worked_hz`` jobs come in a second, each much shorter than a second.

    A record is said when it differs from the last, a second after that at the earliest: when the sensors were read, when a job
    has just come, and a second after that because its queue is empty again.  A chain of three: the record was said as the
    sensors were read (``z``), at a job (``q``), or at any other moment (``o``).
    """
    if not cell.warm and not worked_hz:
        return SECOND_US / QUIET_PERIOD_US
    looks_s = 1 / (looks_hz + SECOND_US / TICK_US / 10)
    if not worked_hz:
        return SECOND_US / SENSE_US
    idle_s = SENSE_US / SECOND_US - 1
    none = (1 - exp(-worked_hz * idle_s)) / (worked_hz * idle_s)
    from_z_wait_s, from_o_wait_s = none * idle_s, (1 - none) / worked_hz / 2
    to_z_from_z, to_z_from_o = exp(-worked_hz * idle_s), none / 2
    z = to_z_from_o / (1 - to_z_from_z)
    q = z * (1 - to_z_from_z) + (1 - none) / 2
    return (z + q + 1) / (z * from_z_wait_s + from_o_wait_s + (z + q + 1) * (CHANGED_PERIOD_US / SECOND_US + looks_s))


def packet_bytes(message: Message) -> int:
    """Of a PUBLISH packet (MQTT 5, section 3.3)."""
    properties = 5 * (message.expiry_s is not None)
    if message.response_topic is not None:
        properties += 3 + len(message.response_topic.encode())
    if message.correlation is not None:
        properties += 3 + len(message.correlation)
    body = 2 + len(message.topic.encode()) + 2 * bool(message.qos) + _varint_bytes(properties) + properties + len(message.payload)
    return 1 + _varint_bytes(body) + body


def _varint_bytes(number: int) -> int:
    return max(1, -(-number.bit_length() // 7))
