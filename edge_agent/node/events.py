"""What the node is told, and what it asks for: the vocabulary between the heart and its shells.

Rules: frozen values only.  The shell hands events in one at a time, commits the ledger, then carries out the effects in
their order; it decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from edge_agent.attest.evidence import Measurements
from edge_agent.core.kv import KvAsk, KvItem, KvState
from edge_agent.core.values import AnswerPart, InferenceRequest, InferenceResult, ModelOffer
from edge_agent.node.settings import NodeSettings
from edge_agent.transport.link import LinkEvent, Message


@dataclass(frozen=True, slots=True)
class Submitted:
    """A client of this very process or socket wants an answer; ``handle`` is how the shell finds it again."""

    request: InferenceRequest
    handle: int


@dataclass(frozen=True, slots=True)
class Abandoned:
    """The client behind ``handle`` has gone; its answers have nowhere to go."""

    handle: int


@dataclass(frozen=True, slots=True)
class Partial:
    """The engine made text for the job of this key; ``part`` counts characters from the beginning of the whole answer, and the
    tokens of this job alone."""

    key: str
    part: AnswerPart


@dataclass(frozen=True, slots=True)
class Executed:
    """The engine finished, or failed, the job of this key."""

    key: str
    result: InferenceResult


@dataclass(frozen=True, slots=True)
class Hosted:
    """A model is loaded, and this is its prior cost here."""

    offer: ModelOffer


@dataclass(frozen=True, slots=True)
class KvChanged:
    """What a language model here holds and has room for; its ``queue_us`` is the node's own affair."""

    state: KvState


@dataclass(frozen=True, slots=True)
class KvFound:
    """Answer to ``KvFind``: the names of blocks that the store lacks, whether it lacks ``rows``; or why it takes nothing in."""

    key: str
    missing: tuple[bytes, ...] = ()
    rows: bool = True
    refusal: str = ""


@dataclass(frozen=True, slots=True)
class KvStored:
    """Answer to ``KvPut``: it is kept, or why not."""

    key: str
    item: KvItem
    name: bytes = b""
    refusal: str = ""


@dataclass(frozen=True, slots=True)
class KvGave:
    """Answer to ``KvGive``: the bytes, or why there are none."""

    board: str
    ask: KvAsk
    payload: bytes = field(default=b"", repr=False)
    refusal: str = ""


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """A model can no longer be used here, and why (quarantine, removal)."""

    model: str
    reason: str


@dataclass(frozen=True, slots=True)
class Sensed:
    """The hottest zone and the lowest trip point, in m°C, and what the board draws; ``None`` where it has no such sensor."""

    temperature_mdegc: int | None
    trip_mdegc: int | None
    power_mw: int | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """What runs on this board, as it was measured just now."""

    measurements: Measurements


@dataclass(frozen=True, slots=True)
class Chartered:
    """The fleet's charter says something new: what ``NodeSettings.adopt`` takes of these settings."""

    settings: NodeSettings


@dataclass(frozen=True, slots=True)
class Endorsed:
    """Answer to ``Endorse``: what hardware says of it; empty, with the reason, if it could not."""

    challenge: bytes
    endorsement: bytes = field(default=b"", repr=False)
    refusal: str = ""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed: deadlines, retries and announcements are looked at. ``wall_us``: since 1970, as this board takes it; it is
    told to others and decides nothing."""

    wall_us: int = 0


@dataclass(frozen=True, slots=True)
class Drain:
    """Take nothing new, finish what was begun."""


Event = (
    LinkEvent
    | Chartered
    | Submitted
    | Abandoned
    | Partial
    | Executed
    | Hosted
    | KvChanged
    | KvFound
    | KvStored
    | KvGave
    | Withdrawn
    | Sensed
    | Measured
    | Endorsed
    | Tick
    | Drain
)


@dataclass(frozen=True, slots=True)
class Execute:
    """Run ``request`` on ``model`` here; answer with any number of ``Partial(key, ...)``, then with ``Executed(key, ...)`` within
    ``budget_us``."""

    key: str
    request: InferenceRequest
    model: str
    budget_us: int
    moved_from: str = ""
    """The board that the session's KV was fetched from just now."""


@dataclass(frozen=True, slots=True)
class Cancel:
    """Nobody wants what the job of this key makes: end it now, and say ``Executed`` with whatever result."""

    key: str


@dataclass(frozen=True, slots=True)
class ReplyPart:
    """The next text for the client behind ``handle``: it follows what came before, without a gap."""

    handle: int
    part: AnswerPart


@dataclass(frozen=True, slots=True)
class Reply:
    """The one answer for the client behind ``handle``."""

    handle: int
    result: InferenceResult


@dataclass(frozen=True, slots=True)
class KvFind:
    """Make a session ready to move here, by the ``manifest`` of its holder's store; answer with ``KvFound(key, ...)``."""

    key: str
    model: str
    session: str
    manifest: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class KvPut:
    """Keep an item of a session that moves here; answer with ``KvStored(key, ...)``."""

    key: str
    model: str
    session: str
    item: KvItem
    name: bytes
    payload: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class KvGive:
    """Read what ``board`` asks of a session here (or give the session up to it); answer with ``KvGave(board, ask, ...)``."""

    board: str
    ask: KvAsk


@dataclass(frozen=True, slots=True)
class Endorse:
    """Let this board's hardware sign ``challenge`` (32 bytes); answer with ``Endorsed(challenge, ...)``."""

    challenge: bytes


@dataclass(frozen=True, slots=True)
class Publish:
    """Send; with a ticket, ``Published(ticket)`` is awaited."""

    message: Message
    ticket: int = 0


@dataclass(frozen=True, slots=True)
class Subscribe:
    topic_filter: str


@dataclass(frozen=True, slots=True)
class Acknowledge:
    """Everything that follows from this delivery is durable or known to be worthless: the broker may forget it."""

    token: int


@dataclass(frozen=True, slots=True)
class Log:
    text: str


Effect = Execute | Cancel | ReplyPart | Reply | KvFind | KvPut | KvGive | Endorse | Publish | Subscribe | Acknowledge | Log
