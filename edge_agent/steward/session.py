"""The operator's connection to the fleet: what is kept there is heard, and what the operator says is said until it is in.

Owns ``OperatorSession``.  Rules:

* What comes in is believed as ``Hearing`` has it; what is refused is named, and ends nothing.
* ``async with`` returns when all that the broker keeps was heard: the session says something to itself after it subscribed, and
  the broker hands on in order.
* What is published is published again after a connection that ended, until the broker has it.
* Metadata goes out so that a board that reads at any moment finds what it needs: the roots, then targets, snapshot, and the
  timestamp last; only then is what is old taken away.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, Self

from edge_agent.core.cose import Signer
from edge_agent.core.errors import RefusedError, SlyError, UnavailableError
from edge_agent.steward.hearing import Hearing, in_order, timestamp_version
from edge_agent.transport.endpoint import BrokerAddress, MqttOptions
from edge_agent.transport.link import Delivered, Link, LinkDown, LinkEvent, LinkUp, Message, Published, Rejected
from edge_agent.transport.mqtt import MqttLink
from edge_agent.transport.mqtt import check as check_link
from edge_agent.transport.topics import Kind, Topic, Topics
from ota.charter import Charter

CONNECT_LIMIT_S = 15.0
SAY_LIMIT_S = 60.0
"""For the broker to take one message."""
HEARD = (Kind.ONLINE, Kind.RECORD, Kind.OTA_META, Kind.ROLLOUT, Kind.REPORT, Kind.SELF_TEST)
Taker = Callable[[Topic, bytes], None]


class Documents(Protocol):
    """What has a repository's metadata: ``ota.repository.Repository``."""

    def documents(self) -> Mapping[str, bytes]: ...


@dataclass(frozen=True, slots=True)
class Speaker:
    """Who speaks: the operator's key, whose ``kid`` is the operator's name, and the MQTT client id."""

    signer: Signer
    client_id: str

    @property
    def name(self) -> str:
        return self.signer.kid.decode()


class OperatorSession(Hearing):
    """``async with OperatorSession(address, charter, signer) as session``; ``signer.kid`` is the operator's name.

    What it heard is that of ``Hearing``, of the ``kinds`` that it asks for.

    Raises ``UnavailableError`` where the broker is not there or does not answer, ``RefusedError`` where its certificate is wrong.
    """

    def __init__(
        self,
        address: BrokerAddress,
        charter: Charter,
        signer: Signer,
        *,
        kinds: Collection[Kind] = HEARD,
        link: Link | None = None,
        limit_s: float = CONNECT_LIMIT_S,
    ) -> None:
        super().__init__(charter)
        self.speaker = Speaker(signer, f"sly-op-{os.urandom(8).hex()}")
        self.topics = Topics(charter.fleet)
        self.link: Link | None = link
        self._address, self._kinds, self._limit_s = address, frozenset(kinds), limit_s
        self._takers: dict[Kind, list[Taker]] = {}
        self._tickets: dict[int, asyncio.Future[str]] = {}
        self._last_ticket = 0
        self._echo = b""
        self._news = asyncio.Event()
        self.events = 0
        self.ready = asyncio.Event()
        """Connected, and all that was kept was heard."""
        self.down = ""
        """Why the link is down; empty while it is up."""

    async def __aenter__(self) -> Self:
        if self.link is None:
            await check_link(self._address, f"{self.speaker.client_id}-check")
            options = MqttOptions(session_expiry_s=0)
            self.link = MqttLink(self._address, self.speaker.client_id, asyncio.get_running_loop(), options)
        self.link.open(self._hear)
        try:
            async with asyncio.timeout(self._limit_s):
                await self.ready.wait()
        except TimeoutError:
            await self.__aexit__()
            reason = self.down or f"it did not tell what it keeps within {self._limit_s:g} s"
            raise UnavailableError(f"broker {self._address}", reason, "see its log and its access list") from None
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._void_tickets()
        if self.link is not None:
            self.link.close()

    def hear(self, kind: Kind, take: Taker) -> None:
        """Hand what comes in on topics of ``kind`` to ``take`` as well, before it is judged here."""
        self._takers.setdefault(kind, []).append(take)
        if kind not in self._kinds and self.link is not None and self.link.up:
            self.link.subscribe(self.topics.every(kind))

    async def wait_for(self, predicate: Callable[[], bool], limit_s: float | None = None) -> bool:
        """Return when ``predicate`` holds, looked at after everything that is heard; ``False`` when ``limit_s`` is over first."""
        try:
            async with asyncio.timeout(limit_s):
                while not predicate():
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            return predicate()
        return True

    async def news(self, since: int) -> int:
        """Return when more than ``since`` events came in, and how many they are now."""
        while self.events <= since:
            self._news.clear()
            await self._news.wait()
        return self.events

    async def say(self, message: Message, limit_s: float = SAY_LIMIT_S) -> None:
        """Publish, and return when the broker has it, also over connections that end meanwhile.

        Raises ``UnavailableError`` when it has not within ``limit_s``, or does not take it from this operator.
        """
        try:
            async with asyncio.timeout(limit_s):
                while (answer := await self._say_once(message)) is None:
                    pass
        except TimeoutError:
            reason = self.down or f"it did not take {message.topic} within {limit_s:g} s"
            raise UnavailableError(f"broker {self._address}", reason) from None
        if answer:
            remedy = "its access list names who is an operator: sly fleet broker"
            raise UnavailableError(f"broker {self._address}", f"it does not take {message.topic}: {answer}", remedy)

    async def say_all(self, messages: Iterable[Message]) -> None:
        """One after another, each when the broker has the one before."""
        for message in messages:
            await self.say(message)

    async def publish_repository(self, repository: Documents, over: bool = False) -> int:
        """Put the repository's metadata on the broker, as far as it differs; the number of messages that took.

        What does not belong there goes first: the tables of boards may be full of it.
        Raises as ``must_not_be_ahead`` and ``say`` do.
        """
        self.must_not_be_ahead(repository, over)
        documents = repository.documents()
        changed = [name for name in in_order(documents) if self.metadata.get(name) != documents[name]]
        old = [name for name in in_order(self.metadata) if name not in documents]
        await self.say_all(self._document(name, b"") for name in old)
        await self.say_all(self._document(name, documents[name]) for name in changed)
        self.metadata = dict(documents)
        return len(changed) + len(old)

    def must_not_be_ahead(self, repository: Documents, over: bool = False) -> None:
        """Raises ``RefusedError`` if the broker keeps a later timestamp than this repository's, unless ``over`` that."""
        there, here = timestamp_version(self.metadata), timestamp_version(repository.documents())
        if there > here and not over:
            allowed = f"at least version {there}, which the broker keeps"
            remedy = "somebody published from another copy of this folder: use that one (or --over, if you know why)"
            raise RefusedError("timestamp of this repository", f"version {here}", allowed, remedy)

    def _document(self, name: str, payload: bytes) -> Message:
        return Message(self.topics.ota_meta(name), payload, retain=True)

    async def _say_once(self, message: Message) -> str | None:
        """What the broker answered, empty if it has taken it; ``None`` if it must be said again."""
        await self.ready.wait()
        self._last_ticket += 1
        ticket = self._last_ticket
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._tickets[ticket] = answer
        try:
            assert self.link is not None
            self.link.publish(message, ticket)
            return await answer
        except (UnavailableError, _LinkEndedError):
            self._news.clear()
            await self._news.wait()
            return None
        finally:
            self._tickets.pop(ticket, None)

    # What comes in.

    def _hear(self, event: LinkEvent) -> None:
        match event:
            case LinkUp():
                self.down = ""
                self._begin()
            case LinkDown(reason):
                self.down = reason
                self.ready.clear()
                self._void_tickets()
            case Published(ticket):
                self._answer(ticket, "")
            case Rejected(reason, ticket, topic_filter):
                self._answer(ticket, reason)
                if topic_filter:
                    self.refused.append(f"subscription to {topic_filter}: {reason}")
            case Delivered(message, token):
                self._take(message)
                if self.link is not None:
                    self.link.acknowledge(token)
        self.events += 1
        self._news.set()

    def _begin(self) -> None:
        """A new connection: ask for everything, then say to oneself what comes back after all that is kept."""
        assert self.link is not None
        own = self.topics.reply(self.speaker.name, self.speaker.client_id)
        self._echo = os.urandom(16)
        with suppress(UnavailableError):  # the link is down again; it tells so
            for kind in sorted({*self._kinds, *self._takers}):
                self.link.subscribe(self.topics.every(kind))
            self.link.subscribe(own)
            self.link.publish(Message(own, self._echo))

    def _take(self, message: Message) -> None:
        try:
            topic = self.topics.parse(message.topic)
            for take in self._takers.get(topic.kind, ()):
                take(topic, message.payload)
            if topic.kind is Kind.REPLY:
                if message.payload == self._echo:
                    self.ready.set()
            else:
                self.judge(topic, message.payload)
        except SlyError as error:
            self.refused.append(str(error))

    def _answer(self, ticket: int, reason: str) -> None:
        answer = self._tickets.get(ticket)
        if answer is not None and not answer.done():
            answer.set_result(reason)

    def _void_tickets(self) -> None:
        for answer in self._tickets.values():
            if not answer.done():
                answer.set_exception(_LinkEndedError())


class _LinkEndedError(Exception):
    """The connection ended before the broker answered."""
