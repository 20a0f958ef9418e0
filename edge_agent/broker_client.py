"""A client behind the broker: asks a board over MQTT and waits for its one answer, however often the broker comes and goes.

Rules: a request keeps its id however often it is sent, and a board takes an id only once.  It is sent until the broker has
it; again, a while after its board came (back) or its deadline passed, if it is still unanswered then; and to the next board
named when its board is gone.  An answer is believed when its board signed it; the same answer twice counts once and is counted.
Parts of a turn's answer are handed on in order, each character once; what they lacked follows from the answer itself.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

from edge_agent.configured import broker_address, mqtt_options, signer_of
from edge_agent.core import wire
from edge_agent.core.config import AgentConfig
from edge_agent.core.cose import verify1
from edge_agent.core.errors import ConfigError, RefusedError, SlyError, UnavailableError
from edge_agent.core.values import MAX_PART_CHARS, AnswerPart, InferenceRequest, InferenceResult, Status
from edge_agent.gossip.presence import Presence, Standing, open_presence
from edge_agent.node.streams import Assembly, end_of, turn_of
from edge_agent.node.voice import seconds
from edge_agent.transport.endpoint import BrokerAddress, MqttOptions
from edge_agent.transport.link import (
    MAX_PAYLOAD_BYTES,
    Delivered,
    Link,
    LinkDown,
    LinkEvent,
    LinkUp,
    Message,
    Published,
    Rejected,
)
from edge_agent.transport.topics import TOOL, Kind, Topic, Topics

MAX_OUTSTANDING = 1024
GRACE_S = 3.0
"""How much longer than its deadline the answer to a request may be on its way."""
TELL_LIMIT_S = 10.0
REMIND_AFTER_US = 1_500_000
"""How long a board that came back has to deliver what it owes before it is asked again."""

Later = Callable[[int, Callable[[], None]], object]
"""Runs a callback after so many µs."""
OnPart = Callable[[AnswerPart], None]


@dataclass(slots=True)
class _Outstanding:
    request: InferenceRequest
    boards: deque[str]
    """The one that is asked now first, those to ask when it is gone behind it."""
    answer: asyncio.Future[InferenceResult]
    sent: bool = False
    """The broker has it."""
    on_part: OnPart | None = None
    shown: Assembly | None = None


class BrokerClient:
    """``async with BrokerClient(link, fleet, client, members)``: ``members`` maps each board to its public key, 32 bytes.

    ``later`` is for those who live in virtual time; by default the running loop's timers are used.
    """

    def __init__(self, link: Link, fleet: str, client: str, members: Mapping[str, bytes], later: Later | None = None) -> None:
        self._link, self._topics, self._client, self._members = link, Topics(fleet), client, members
        self._later = later or _by_the_loop
        self._outstanding: dict[str, _Outstanding] = {}
        self._unsent: deque[str] = deque()
        self._tickets: dict[int, str] = {}
        self._presence: dict[str, Presence] = {}
        self._sends = 0
        self.up = asyncio.Event()
        self.duplicates = 0
        self.refused: list[str] = []

    async def __aenter__(self) -> Self:
        self._link.open(self._hear)
        await self.up.wait()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._link.close()

    @property
    def outstanding(self) -> int:
        return len(self._outstanding)

    def ask(self, request: InferenceRequest, *boards: str, on_part: OnPart | None = None) -> asyncio.Future[InferenceResult]:
        """Ask the first of ``boards``, and the others in turn when it is gone; the future gets the one answer.

        ``on_part`` gets the text of a turn as it comes, all of it before the answer.

        Raises ``UnavailableError`` when too many requests are unanswered, ``ValueError`` when no board is named.
        """
        if not boards:
            raise ValueError("name at least one board")
        if len(self._outstanding) >= MAX_OUTSTANDING:
            raise UnavailableError("broker client", f"{len(self._outstanding)} requests are unanswered", "wait for some")
        answer = asyncio.get_running_loop().create_future()
        shown = Assembly(turn_of(request).begun) if on_part else None
        self._outstanding[request.request_id] = _Outstanding(request, deque(boards), answer, on_part=on_part, shown=shown)
        answer.add_done_callback(lambda _: self._outstanding.pop(request.request_id, None))
        self._unsent.append(request.request_id)
        self._send()
        self._watch(request)
        return answer

    def _watch(self, request: InferenceRequest) -> None:
        """A message that its board never got is worthless after its deadline: then the request is sent anew."""
        expired_us = seconds(request.limits.deadline_us) * 1_000_000 + REMIND_AFTER_US
        self._later(expired_us, lambda: self._send_anew(request))

    def _send_anew(self, request: InferenceRequest) -> None:
        waiting = self._outstanding.get(request.request_id)
        if waiting is None:
            return
        if waiting.sent:
            self._unsent.append(request.request_id)
            self._send()
        self._watch(request)

    def _send(self) -> None:
        """Publish what waits, as much as the link takes; the rest when it has sent something."""
        while self._unsent and self._link.up:
            request_id = self._unsent[0]
            waiting = self._outstanding.get(request_id)
            try:
                if waiting is not None:
                    self._sends += 1
                    self._link.publish(self._message(waiting.request, waiting.boards[0]), self._sends)
                    self._tickets[self._sends] = request_id
            except UnavailableError:
                return
            self._unsent.popleft()

    def _message(self, request: InferenceRequest, board: str) -> Message:
        return Message(
            self._topics.request(board),
            wire.encode_request(request, board),
            expiry_s=seconds(request.limits.deadline_us),
            response_topic=self._topics.reply(board, self._client),
            correlation=bytes.fromhex(request.request_id),
        )

    def _hear(self, event: LinkEvent) -> None:
        match event:
            case LinkUp():
                self._begin()
            case LinkDown():
                self.up.clear()
            case Published(ticket):
                if (waiting := self._outstanding.get(self._tickets.pop(ticket, ""))) is not None:
                    waiting.sent = True
                self._send()
            case Rejected(reason, ticket):
                self.refused.append(reason)
                self._tickets.pop(ticket, None)
            case Delivered(message, token):
                try:
                    self._take(message)
                except SlyError as error:
                    self.refused.append(str(error))
                self._link.acknowledge(token)

    def _begin(self) -> None:
        """A new connection: what the broker never confirmed goes out again, and every board's word is news again."""
        self._link.subscribe(self._topics.replies_to(self._client))
        self._link.subscribe(self._topics.every(Kind.ONLINE))
        self._tickets.clear()
        self._presence.clear()
        self._unsent = deque(request_id for request_id, waiting in self._outstanding.items() if not waiting.sent)
        self._send()
        self.up.set()

    def _take(self, message: Message) -> None:
        topic = self._topics.parse(message.topic)
        if topic.kind is Kind.ONLINE:
            self._take_presence(open_presence(message.payload, self._key_of))
        elif topic.kind is Kind.REPLY:
            self._take_reply(topic, message)

    def _take_presence(self, presence: Presence) -> None:
        if self._presence.get(presence.board) == presence:
            return
        self._presence[presence.board] = presence
        if presence.standing is Standing.ONLINE:
            self._later(REMIND_AFTER_US, lambda: self._ask_again(presence.board))
            return
        for waiting in self._outstanding.values():
            if waiting.boards[0] == presence.board and len(waiting.boards) > 1:
                waiting.boards.rotate(-1)
                waiting.sent = False
                self._unsent.append(waiting.request.request_id)
        self._send()

    def _ask_again(self, board: str) -> None:
        self._unsent += [w.request.request_id for w in self._outstanding.values() if w.sent and w.boards[0] == board]
        self._send()

    def _take_part(self, topic: Topic, message: Message) -> None:
        signed = verify1(message.payload, self._key_of, wire.AAD_PART, max_bytes=wire.MAX_SIGNED_PART_BYTES)
        part = wire.decode_part(signed.payload, self._client)
        if signed.kid != topic.board.encode():
            raise RefusedError(f"part on {message.topic}", f"signed by {signed.kid!r}", f"signed by {topic.board}")
        waiting = self._outstanding.get(part.request_id)
        if waiting is not None:
            _show(waiting, part)

    def _take_reply(self, topic: Topic, message: Message) -> None:
        if wire.is_part(message.payload):
            self._take_part(topic, message)
            return
        signed = verify1(message.payload, self._key_of, wire.AAD_RESULT, max_bytes=MAX_PAYLOAD_BYTES)
        result = wire.decode_result(signed.payload, self._client)
        if signed.kid != topic.board.encode():
            raise RefusedError(f"answer on {message.topic}", f"signed by {signed.kid!r}", f"signed by {topic.board}")
        waiting = self._outstanding.pop(result.request_id, None)
        if waiting is None or waiting.answer.done():
            self.duplicates += 1
        else:
            _show_rest(waiting, result)
            waiting.answer.set_result(result)

    def _key_of(self, kid: bytes) -> bytes | None:
        return self._members.get(kid.decode("utf-8", "replace"))


@dataclass(frozen=True, slots=True)
class Asker:
    """Who asks under which ``name`` at which broker; ``members``: the boards' public keys, 32 bytes each."""

    name: str
    fleet: str
    address: BrokerAddress
    members: Mapping[str, bytes]
    options: MqttOptions


def asker_of(config: AgentConfig) -> Asker:
    """A board's configuration asks. Raises ``ConfigError`` where it names no broker."""
    if not config.broker.host:
        raise ConfigError("[broker] host", "nothing", "the address of the fleet's broker")
    keys = {board: bytes.fromhex(key) for board, key in config.fleet.members.items()}
    keys.setdefault(config.board.id, signer_of(config).public_key)
    return Asker(config.board.id, config.fleet.name, broker_address(config), keys, mqtt_options(config))


async def ask_over_broker(asker: Asker, request: InferenceRequest, boards: Sequence[str]) -> InferenceResult:
    """Ask once over the broker, of ``boards`` in turn, and leave no session behind.

    Raises ``SlyError`` in one line for a broker that cannot be used, and ``UnavailableError`` when nobody answers in time.
    """
    from edge_agent.transport.mqtt import MqttLink, check

    client_name = f"ask-{os.urandom(6).hex()}"
    await check(asker.address, client_name)
    link = MqttLink(asker.address, client_name, asyncio.get_running_loop(), replace(asker.options, session_expiry_s=0))
    limit_s = request.limits.deadline_us / 1e6 + GRACE_S
    waiting_name = f"{asker.name}{TOOL}{client_name}"
    try:
        async with asyncio.timeout(limit_s), BrokerClient(link, asker.fleet, waiting_name, asker.members) as client:
            return await client.ask(request, *boards)
    except TimeoutError:
        reason = f"no answer over {asker.address} within {limit_s:g} s"
        raise UnavailableError(f"boards {', '.join(boards)}", reason, "sly status on one of them shows who is there") from None


async def tell_over_broker(config: AgentConfig, message: Message) -> None:
    """Publish one message over the configured broker, and return when the broker has it.

    Raises ``SlyError`` in one line for a broker that cannot be used or does not take it in ``TELL_LIMIT_S``.
    """
    from edge_agent.transport.mqtt import MqttLink, check

    if not config.broker.host:
        raise ConfigError("[broker] host", "nothing", "the address of the fleet's broker")
    address, client_name = broker_address(config), f"tell-{os.urandom(6).hex()}"
    await check(address, client_name)
    loop = asyncio.get_running_loop()
    taken: asyncio.Future[str] = loop.create_future()
    link = MqttLink(address, client_name, loop, replace(mqtt_options(config), session_expiry_s=0))

    def hear(event: LinkEvent) -> None:
        if isinstance(event, LinkUp):
            link.publish(message, 1)
        elif isinstance(event, Published | Rejected) and not taken.done():
            taken.set_result(event.reason if isinstance(event, Rejected) else "")

    try:
        link.open(hear)
        async with asyncio.timeout(TELL_LIMIT_S):
            if refusal := await taken:
                raise UnavailableError(f"broker {address}", f"it does not take {message.topic}: {refusal}", "see its log and ACL")
    except TimeoutError:
        raise UnavailableError(f"broker {address}", f"it did not take {message.topic} within {TELL_LIMIT_S:g} s") from None
    finally:
        link.close()


def _show(waiting: _Outstanding, part: AnswerPart) -> None:
    if waiting.shown is not None and waiting.on_part is not None:
        for fresh in waiting.shown.take(part):
            waiting.on_part(fresh)


def _show_rest(waiting: _Outstanding, result: InferenceResult) -> None:
    """What the answer holds beyond the parts that came."""
    shown = waiting.shown
    if shown is None or result.status is not Status.OK:
        return
    end = end_of(result)
    rest = shown.rest(end.text) or ""
    for start in range(0, len(rest), MAX_PART_CHARS):
        _show(waiting, AnswerPart(result.request_id, shown.length, rest[start : start + MAX_PART_CHARS], end.completion_tokens))


def _by_the_loop(interval_us: int, callback: Callable[[], None]) -> object:
    return asyncio.get_running_loop().call_later(interval_us / 1e6, callback)
