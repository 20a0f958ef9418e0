"""The contract of a link: what carries messages between this board and the others.

Owns the message and event values and the ``Link`` base class.  Rules:

* A link is driven by calls and answers with events, handed one at a time to ``deliver``, always on the thread that opened
  it; it never blocks and holds no unbounded queue.
* ``publish`` is for a link that is up: while it is down it raises ``UnavailableError``, because what must survive waits in
  the ledger, not in a socket library.
* A QoS 1 message that was delivered is acknowledged only by ``acknowledge``, after the receiver's own fsync.
* A backend writes the methods with an underscore; the limits are enforced here, for all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

from edge_agent.core.errors import RefusedError, UnavailableError

MAX_TOPIC_BYTES = 512
MAX_PAYLOAD_BYTES = 4 * 2**20
MAX_PACKET_BYTES = MAX_PAYLOAD_BYTES + 64 * 2**10
"""What an incoming packet may announce as its remaining length; more, and the connection is dropped with a reason."""


@dataclass(frozen=True, slots=True)
class Message:
    """One publication. ``expiry_s`` is the MQTT 5 message expiry; ``None`` keeps it for ever."""

    topic: str
    payload: bytes = field(repr=False)
    qos: int = 1
    retain: bool = False
    expiry_s: int | None = None
    response_topic: str | None = None
    correlation: bytes | None = None

    def __post_init__(self) -> None:
        encoded = self.topic.encode("utf-8", "strict")
        if not 0 < len(encoded) <= MAX_TOPIC_BYTES or any(c in self.topic for c in "+#\0"):
            raise RefusedError("topic", self.topic, f"1 to {MAX_TOPIC_BYTES} bytes without + # or NUL")
        if len(self.payload) > MAX_PAYLOAD_BYTES:
            raise RefusedError(
                f"message to {self.topic}", f"{len(self.payload)} bytes", f"at most {MAX_PAYLOAD_BYTES} bytes"
            )
        if self.qos not in (0, 1):
            raise ValueError(f"qos {self.qos}: this protocol uses 0 and 1")


@dataclass(frozen=True, slots=True)
class Will:
    """What the broker says for a board that vanished, ``delay_s`` after it did."""

    message: Message
    delay_s: int = 0


@dataclass(frozen=True, slots=True)
class LinkUp:
    """Connected. Without ``session_present`` the broker knows nothing of us: subscribe and publish retained state anew."""

    session_present: bool


@dataclass(frozen=True, slots=True)
class LinkDown:
    """Not connected, and why. The link goes on trying by itself, with a capped, jittered back-off."""

    reason: str


@dataclass(frozen=True, slots=True)
class Delivered:
    """A message came in. A QoS 1 message stays owed to the broker until ``acknowledge(token)``."""

    message: Message
    token: int


@dataclass(frozen=True, slots=True)
class Published:
    """The broker took responsibility for the QoS 1 message that was published with this ticket."""

    ticket: int


LinkEvent = LinkUp | LinkDown | Delivered | Published


class Link(ABC):
    """Base of the backends: ``mqtt`` (paho), ``loopback`` (in memory)."""

    def __init__(self) -> None:
        self._up = False
        self._opened = False
        self._receiver: Callable[[LinkEvent], None] | None = None

    @property
    def up(self) -> bool:
        return self._up

    def open(self, deliver: Callable[[LinkEvent], None], will: Will | None = None) -> None:
        """Begin connecting; return at once. Events go to ``deliver`` from now on. Raises ``RuntimeError`` if already open."""
        if self._opened:
            raise RuntimeError("this link is open already")
        self._opened, self._receiver = True, deliver
        self._open(will)

    def subscribe(self, topic_filter: str, qos: int = 1) -> None:
        """Ask for a topic filter (``+`` and ``#`` allowed). Raises ``UnavailableError`` while down."""
        self._must_be_up(topic_filter)
        self._subscribe(topic_filter, qos)

    def publish(self, message: Message, ticket: int = 0) -> None:
        """Send. A QoS 1 message is answered by ``Published(ticket)``. Raises ``UnavailableError`` while down."""
        self._must_be_up(message.topic)
        self._publish(message, ticket)

    def acknowledge(self, token: int) -> None:
        """Give up the claim on a delivered QoS 1 message; a token of an earlier connection is ignored."""
        self._acknowledge(token)

    def close(self) -> None:
        """Say goodbye cleanly (the will is not sent) and free everything. May be called twice."""
        if self._opened:
            self._opened = self._up = False
            self._close()
            self._receiver = None

    def _emit(self, event: LinkEvent) -> None:
        """Backends report here, on the thread that opened the link."""
        if isinstance(event, LinkUp):
            self._up = True
        elif isinstance(event, LinkDown):
            self._up = False
        if self._receiver is not None:
            self._receiver(event)

    def _must_be_up(self, topic: str) -> None:
        if not self._up:
            raise UnavailableError(f"link for {topic}", "not connected", "keep it and publish after LinkUp")

    @abstractmethod
    def _open(self, will: Will | None) -> None: ...

    @abstractmethod
    def _subscribe(self, topic_filter: str, qos: int) -> None: ...

    @abstractmethod
    def _publish(self, message: Message, ticket: int) -> None: ...

    @abstractmethod
    def _acknowledge(self, token: int) -> None: ...

    @abstractmethod
    def _close(self) -> None: ...
