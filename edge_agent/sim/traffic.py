"""What a cell of boards costs its broker: messages and bytes a second of each kind, computed from the protocol's own periods.

Owns ``flows``, a pure function of a ``Cell``.  Rules: periods, neighbours and witnesses are read where the protocol has them;
sizes are those of messages that the production voice signs; nothing is measured here (``sim.counted`` counts the same in a
simulation).  A cell is one gossip domain: a fleet of its own name, whose boards hear each other and nobody else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import exp
from random import Random

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
TABLES_A_WAVE, WORDS_BEFORE_A_WAVE = 1.63, 0.64
"""Where requests come, costs and demand move: digests of new tables that a board says in each wave of small changes
(``node.told``), and of its old one, because the first board to have a new one differs from it and five seconds have passed."""
CHANGES_A_WAVE = 0.27
"""Costs, demand and heat that a board tells in a record that no job is the reason of.

These three depend on what jobs are like, not on the protocol alone: counted by reason in three cells of 20 (seeds 100 to 102)."""
TICK_US = 100_000
"""About so late a board at work sees that something is due: ten messages a second make it look."""
SAMPLES, SETTLED_QUOTES = 2_000, 20
ACK_BYTES = 4
"""A PUBACK without a reason (MQTT 5, section 3.4)."""
TLS_BYTES, TCP_BYTES = 22, 52
"""Assumed of each packet: a TLS 1.3 record (RFC 8446, section 5.2: 5 + 1 + 16); IPv4, TCP and its timestamps (20 + 20 + 12)."""


@dataclass(frozen=True, slots=True)
class Cell:
    """``sources`` of the ``boards`` host no model and give each of their requests to another board; the others host one and work.

    ``requests_mhz``: thousandths of a request a second that come in at each source.  Local requests cost no message.
    ``apart``: boards booted at different moments, as they do in the field.
    """

    boards: int
    sources: int = 0
    requests_mhz: int = 0
    request_bytes: int = 16_384
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
    n, epoch_hz = cell.boards, SECOND_US / cell.epoch_us
    shown, asked = _shown_an_epoch(cell.neighbours) if cell.apart else (1.0, 0.0)
    quiet_hz, quote_hz = SECOND_US / QUIET_PERIOD_US, epoch_hz * shown
    said_again_hz = epoch_hz * cell.neighbours / min(SAY_AGAIN_EPOCHS, cell.neighbours)
    yield Kind.ONLINE, n * quiet_hz, n, n
    waves_hz = SECOND_US / WAVE_PERIOD_US if cell.given_hz else 0.0
    yield Kind.DIGEST, n * ((TABLES_A_WAVE + WORDS_BEFORE_A_WAVE) * waves_hz or quiet_hz), n, n
    yield Kind.APPRAISAL, n * (quote_hz * min(WITNESSES, cell.neighbours) + said_again_hz), n, n * cell.neighbours
    yield Kind.QUOTE, n * quote_hz, cell.listeners, n
    yield Kind.EPOCH, n * epoch_hz, cell.listeners, n
    yield Kind.CHALLENGE, n * epoch_hz * asked, 1, 0
    yield Kind.REQUEST, cell.given_hz, 1, 0
    yield Kind.REPLY, cell.given_hz, 1, 0
    at_worker_hz, at_source_hz = (_record_hz(hz, CHANGES_A_WAVE * waves_hz) for hz in (cell.given_hz / cell.workers, 0.0))
    yield Kind.RECORD, cell.workers * at_worker_hz + cell.sources * at_source_hz, n, n


@lru_cache(maxsize=64)
def _shown_an_epoch(verifiers: int) -> tuple[float, float]:
    """How many quotes a board shows an epoch whose verifiers' epochs turn at any moments, and how many of them it is asked for.

    A quote serves every verifier that is half through its epoch within the next half of one (``ASK_AFTER``); the first that is so
    later asks for the next.  Where that takes a whole epoch, the board shows one of itself.  Moments are fixed: from whichever
    quote, boards soon go round in the same few of them; the mean over ``SAMPLES`` draws.
    """
    drawn, shown, asked = Random(verifiers), 0.0, 0.0
    for _ in range(SAMPLES):
        moments = sorted(drawn.random() for _ in range(verifiers))
        spans = _go_round(moments)
        shown += len(spans) / sum(spans) / SAMPLES
        asked += sum(span < 1 for span in spans) / sum(spans) / SAMPLES
    return shown, asked


def _go_round(moments: list[float]) -> list[float]:
    """The spans between quotes, in epochs, once they are the same again and again."""
    at, spans = 0, list[float]()
    for _ in range(2 * SETTLED_QUOTES):
        served = (moments[at] + 1 / ASK_AFTER) % 1
        following = next((number for number, moment in enumerate(moments) if moment >= served), 0)
        spans.append((moments[following] - moments[at]) % 1 or 1.0)
        at = following
    return spans[SETTLED_QUOTES:]


def _record_hz(worked_hz: float, changes_hz: float) -> float:
    """How often a board says its record anew, at which ``worked_hz`` jobs come in a second, each much shorter than a second.

    A record is said when it differs from the last, a second after that at the earliest, or after ``QUIET_PERIOD_US``.  After one
    that tells of an empty queue, a job that comes within a second is over before the next could be said; the first that comes
    later is told at once, and a second after that, that the queue is empty again.  ``changes_hz``: what else is told, in one.
    """
    changed_s, quiet_s, any_hz = CHANGED_PERIOD_US / SECOND_US, QUIET_PERIOD_US / SECOND_US, worked_hz + changes_hz
    if not any_hz:
        return 1 / quiet_s
    told = 1 - exp(-any_hz * (quiet_s - changed_s))
    of_jobs = told * worked_hz / any_hz
    return (1 + of_jobs) / (changed_s + told / any_hz + of_jobs * (changed_s + TICK_US / SECOND_US))


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
