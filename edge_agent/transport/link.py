"""The contract of a link: what carries messages between this board and the others.

Owns the message and event values and the ``Link`` base class.  Rules:

* A link is driven by calls and answers with events, handed one at a time to ``deliver``, always on the thread that opened
  it; it never blocks and holds no unbounded queue.
* ``publish`` is for a link that is up: while it is down it raises ``UnavailableError``, because what must survive waits in
  the ledger, not in a socket library.  For the same reason a ticket that was not answered before ``LinkDown`` is void: publish
  it again after ``LinkUp``.  Receivers are idempotent, because QoS 1 means "at least once".
* A QoS 1 message that was delivered is acknowledged only by ``acknowledge``, after the receiver's own fsync.
* A backend writes the methods with an underscore; the limits are enforced here, for all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

from edge_agent.core.errors import RefusedError, UnavailableError, shown
from edge_agent.core.values import bounded

MAX_TOPIC_BYTES = 512
MAX_PAYLOAD_BYTES = 4 * 2**20
MAX_CORRELATION_BYTES = 256
MAX_WILL_BYTES = 65_535
MAX_EXPIRY_S = 2**32 - 1
RECEIVE_MAXIMUM = 32
"""QoS 1 messages that we ask a broker to have under way to us at most."""
MAX_OWED_MESSAGES = 128
"""While so many are delivered and not acknowledged, nothing more is read from the broker. (rumqttd has up to 100 under way,
whatever it was asked; Mosquitto 2.0.11 has more and more in a stream of QoS 1: eclipse-mosquitto/mosquitto #2301.)"""
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
        _publishable("topic", self.topic)
        if self.response_topic is not None:
            _publishable("response topic", self.response_topic)
        if self.correlation is not None and len(self.correlation) > MAX_CORRELATION_BYTES:
            raise RefusedError("correlation data", f"{len(self.correlation)} bytes", f"at most {MAX_CORRELATION_BYTES} bytes")
        if self.expiry_s is not None:
            bounded("message expiry", self.expiry_s, 0, MAX_EXPIRY_S, "s")
        if len(self.payload) > MAX_PAYLOAD_BYTES:
            raise RefusedError(f"message to {self.topic}", f"{len(self.payload)} bytes", f"at most {MAX_PAYLOAD_BYTES} bytes")
        if self.qos not in (0, 1):
            raise ValueError(f"qos {self.qos}: this protocol uses 0 and 1")


def _publishable(subject: str, topic: str) -> None:
    try:
        size_bytes = len(topic.encode("utf-8", "strict"))
    except UnicodeEncodeError as error:
        raise RefusedError(subject, shown(topic), "UTF-8 text") from error
    if not 0 < size_bytes <= MAX_TOPIC_BYTES or any(c in topic for c in "+#\0"):
        raise RefusedError(subject, shown(topic), f"1 to {MAX_TOPIC_BYTES} bytes without + # or NUL")


@dataclass(frozen=True, slots=True)
class Will:
    """What the broker says for a board that vanished, ``delay_s`` after it did."""

    message: Message
    delay_s: int = 0

    def __post_init__(self) -> None:
        bounded("will delay", self.delay_s, 0, MAX_EXPIRY_S, "s")
        if len(self.message.payload) > MAX_WILL_BYTES:
            raise RefusedError("will", f"{len(self.message.payload)} bytes", f"at most {MAX_WILL_BYTES} bytes")


@dataclass(frozen=True, slots=True)
class LinkUp:
    """Connected. Without ``session_present`` the broker knows nothing of us: subscribe and publish retained state anew.

    With it, that is only the broker's word: a link that subscribes after every ``LinkUp`` is not deaf when the word is false.
    """

    session_present: bool


@dataclass(frozen=True, slots=True)
class LinkDown:
    """Not connected, and why; it comes once for every connection that ended and every attempt that failed.

    The link goes on trying by itself, with a capped, jittered back-off: the next attempt is in ``retry_in_us``.
    """

    reason: str
    retry_in_us: int = 0


@dataclass(frozen=True, slots=True)
class Delivered:
    """A message came in. It stays owed to the broker until ``acknowledge(token)``, unless the token is 0 (QoS 0)."""

    message: Message
    token: int


@dataclass(frozen=True, slots=True)
class Published:
    """The broker took responsibility for the QoS 1 message that was published with this ticket."""

    ticket: int


@dataclass(frozen=True, slots=True)
class Rejected:
    """The broker would not take a publication (``ticket``) or a subscription (``topic_filter``); the link does not repeat it."""

    reason: str
    ticket: int = 0
    topic_filter: str = ""


LinkEvent = LinkUp | LinkDown | Delivered | Published | Rejected


def is_filter(topic_filter: str) -> bool:
    """Whether a topic filter is well formed: ``#`` alone and last, ``+`` alone on its level (MQTT 5, section 4.7.1)."""
    if not 0 < len(topic_filter.encode("utf-8", "replace")) <= MAX_TOPIC_BYTES or "\0" in topic_filter:
        return False
    levels = topic_filter.split("/")
    return all(level in ("+", "#") or not set(level) & {"+", "#"} for level in levels) and "#" not in levels[:-1]


def matches(topic_filter: str, topic: str) -> bool:
    """Whether a topic falls under a well-formed filter (MQTT 5, section 4.7; topics that begin with ``$`` match no wildcard)."""
    wanted, got = topic_filter.split("/"), topic.split("/")
    if topic.startswith("$") and wanted[0] in ("+", "#"):
        return False
    for i, level in enumerate(wanted):
        if level == "#":
            return True
        if i >= len(got) or level not in ("+", got[i]):
            return False
    return len(wanted) == len(got)


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
        if not is_filter(topic_filter) or qos not in (0, 1):
            raise ValueError(f"not a topic filter of at most {MAX_TOPIC_BYTES} bytes with QoS 0 or 1: {topic_filter!r}, {qos}")
        self._must_be_up(topic_filter)
        self._subscribe(topic_filter, qos)

    def unsubscribe(self, topic_filter: str) -> None:
        """Take a subscription back; one that is not there changes nothing. What is under way may still come, also after that.

        Raises ``UnavailableError`` while down.
        """
        if not is_filter(topic_filter):
            raise ValueError(f"not a topic filter of at most {MAX_TOPIC_BYTES} bytes: {topic_filter!r}")
        self._must_be_up(topic_filter)
        self._unsubscribe(topic_filter)

    def publish(self, message: Message, ticket: int = 0) -> None:
        """Send. A QoS 1 message is answered by ``Published(ticket)``, or by ``Rejected``.

        Raises ``UnavailableError`` while down and while too much waits to be sent; ``RefusedError`` for a message that is
        larger than what the broker takes.
        """
        self._must_be_up(message.topic)
        self._publish(message, ticket)

    def acknowledge(self, token: int) -> None:
        """Give up the claim on a delivered QoS 1 message. It may be done twice; a token of an ended connection is ignored.

        Acknowledgements leave in the order of the deliveries, so a message that is never acknowledged holds up those after it.
        """
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
    def _unsubscribe(self, topic_filter: str) -> None: ...

    @abstractmethod
    def _publish(self, message: Message, ticket: int) -> None: ...

    @abstractmethod
    def _acknowledge(self, token: int) -> None: ...

    @abstractmethod
    def _close(self) -> None: ...
