"""What the updates of a board are told, and what they ask for: the vocabulary between ``course`` and its shell.

Rules: frozen values only; the shell hands events in one at a time, commits the ledger, then carries out the effects in order;
what takes long comes back as an event; ``why`` is empty where something went well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from edge_agent.transport.link import Message
from edge_agent.transport.topics import Topic
from models.installed import Installed
from ota.charter import Charter
from ota.chunks import Artefact
from ota.manifest import Release


@dataclass(frozen=True, slots=True)
class LinkTurned:
    """The link came up or went down."""

    up: bool


@dataclass(frozen=True, slots=True)
class Heard:
    """A message on one of the topics that were subscribed to; ``token``: to be acknowledged, 0 for none."""

    topic: Topic
    payload: bytes = field(repr=False)
    token: int = 0


@dataclass(frozen=True, slots=True)
class Sent:
    """The broker took the message of this ticket, or (``why``) it never will."""

    ticket: int
    why: str = ""


@dataclass(frozen=True, slots=True)
class Listed:
    """The metadata was verified: ``targets`` maps each path to its size in bytes and SHA-256; ``marks``: floors to be raised."""

    targets: Mapping[str, tuple[int, bytes]]
    marks: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class NotListed:
    """The metadata was refused, or (``refused`` false) could not be checked now."""

    why: str
    refused: bool


@dataclass(frozen=True, slots=True)
class Opened:
    """The staging of an artefact is open; ``held``: the set of the pieces that are in it; ``why``: it is not, for good if
    ``refused`` (the cache can never hold it), else for now."""

    digest: bytes
    held: int = 0
    why: str = ""
    refused: bool = False


@dataclass(frozen=True, slots=True)
class Stored:
    """A piece was written, or could not be; ``token`` is that of the message that brought it."""

    digest: bytes
    index: int
    token: int = 0
    why: str = ""


@dataclass(frozen=True, slots=True)
class Finished:
    """An artefact is whole in the cache; ``data``: what it holds, of one that is a single piece.

    ``why``: it is not; for good if ``refused``, else it is tried again.
    """

    digest: bytes
    data: bytes = field(default=b"", repr=False)
    why: str = ""
    refused: bool = False


@dataclass(frozen=True, slots=True)
class Brought:
    """A release was loaded beside what serves (the agent's own: installed beside what runs)."""

    model: str
    number: int
    why: str = ""


@dataclass(frozen=True, slots=True)
class Probed:
    """What a brought release gave for its golden input, by which library; ``why``: it is bad by itself."""

    model: str
    number: int
    golden: bytes = b""
    library: str = ""
    why: str = ""


@dataclass(frozen=True, slots=True)
class Turned:
    """New requests go to this release from now on, 0 being the factory's; ``why``: they do not."""

    model: str
    number: int
    why: str = ""


@dataclass(frozen=True, slots=True)
class Ran:
    """An inference of a release on trial has ended; ``why``: it was not clean."""

    model: str
    number: int
    why: str = ""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = LinkTurned | Heard | Sent | Listed | NotListed | Opened | Stored | Finished | Brought | Probed | Turned | Ran | Tick


@dataclass(frozen=True, slots=True)
class List:
    """Verify the metadata that was ``offered``, and say what it lists of the targets that are ``wanted``."""

    offered: Mapping[str, bytes] = field(repr=False)
    wanted: tuple[str, ...]
    floors: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Open:
    """Open the staging of an artefact; ``seeds``: what is held that may share pieces with it, besides the factory's files of
    ``model``."""

    artefact: Artefact
    seeds: tuple[bytes, ...] = ()
    model: str = ""


@dataclass(frozen=True, slots=True)
class Store:
    """Write a piece that was verified."""

    digest: bytes
    index: int
    data: bytes = field(repr=False)
    token: int = 0


@dataclass(frozen=True, slots=True)
class Finish:
    """Every piece is there: check the whole, and take it into the cache."""

    digest: bytes


@dataclass(frozen=True, slots=True)
class Abandon:
    """An artefact is not wanted any more."""

    digest: bytes


@dataclass(frozen=True, slots=True)
class Keep:
    """Pin these in the cache, and nothing else of the updates."""

    digests: frozenset[bytes]


@dataclass(frozen=True, slots=True)
class Give:
    """Send a piece of what is held to whoever listens; ``Sent(ticket)`` is awaited."""

    artefact: Artefact
    index: int
    ticket: int


@dataclass(frozen=True, slots=True)
class Bring:
    """Load a release beside what serves."""

    installed: Installed


@dataclass(frozen=True, slots=True)
class BringBack:
    """Load the factory's release beside what serves."""

    model: str


@dataclass(frozen=True, slots=True)
class BringAgent:
    """Install a release of the agent beside what runs."""

    release: Release


@dataclass(frozen=True, slots=True)
class Probe:
    """Give a brought release its golden input."""

    model: str
    number: int


@dataclass(frozen=True, slots=True)
class Turn:
    """Let new requests go to the brought release; those under way end where they are. Of the agent: start anew with it."""

    model: str
    number: int


@dataclass(frozen=True, slots=True)
class Settle:
    """The trial is over: what served before may go."""

    model: str


@dataclass(frozen=True, slots=True)
class TurnBack:
    """Let requests go to what served before the trial again; what was on trial goes."""

    model: str
    why: str = ""


@dataclass(frozen=True, slots=True)
class Stand:
    """Golden inputs stand in for requests that do not come: run one on the release on trial."""

    model: str
    number: int


@dataclass(frozen=True, slots=True)
class Adopt:
    """The fleet has another charter."""

    charter: Charter


@dataclass(frozen=True, slots=True)
class Say:
    """Publish; with a ticket, ``Sent`` is awaited."""

    message: Message
    ticket: int = 0


@dataclass(frozen=True, slots=True)
class Listen:
    topic_filter: str


@dataclass(frozen=True, slots=True)
class Leave:
    """Listen to a topic no more."""

    topic_filter: str


@dataclass(frozen=True, slots=True)
class Done:
    """A message was dealt with: acknowledge it."""

    token: int


@dataclass(frozen=True, slots=True)
class Note:
    """For the log."""

    text: str


Effect = (
    List
    | Open
    | Store
    | Finish
    | Abandon
    | Keep
    | Give
    | Bring
    | BringBack
    | BringAgent
    | Probe
    | Turn
    | Settle
    | TurnBack
    | Stand
    | Adopt
    | Say
    | Listen
    | Leave
    | Done
    | Note
)
