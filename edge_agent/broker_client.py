"""A client behind the broker: asks a board over MQTT and waits for its one answer, however often the broker comes and goes.

Rules: what is not answered is sent again, with the same request id, on every new connection and whenever its board says that
it is there; boards take an id only once.  When a board is gone the next one named is asked.  An answer is believed when its
board signed it; the same answer twice counts once and is counted.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from edge_agent.core import wire
from edge_agent.core.cose import verify1
from edge_agent.core.errors import RefusedError, SlyError, UnavailableError
from edge_agent.core.values import InferenceRequest, InferenceResult
from edge_agent.gossip.presence import Presence, Standing, open_presence
from edge_agent.node.voice import seconds
from edge_agent.transport.link import MAX_PAYLOAD_BYTES, Delivered, Link, LinkDown, LinkEvent, LinkUp, Message, Published
from edge_agent.transport.topics import Kind, Topic, Topics

MAX_OUTSTANDING = 1024


@dataclass(slots=True)
class _Outstanding:
    request: InferenceRequest
    boards: deque[str]
    """The one that is asked now first, those to ask when it is gone behind it."""
    answer: asyncio.Future[InferenceResult]


class BrokerClient:
    """``async with BrokerClient(link, fleet, client, members)``: ``members`` maps each board to its public key, 32 bytes."""

    def __init__(self, link: Link, fleet: str, client: str, members: Mapping[str, bytes]) -> None:
        self._link, self._topics, self._client, self._members = link, Topics(fleet), client, members
        self._outstanding: dict[str, _Outstanding] = {}
        self._unsent: deque[str] = deque()
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

    def ask(self, request: InferenceRequest, *boards: str) -> asyncio.Future[InferenceResult]:
        """Ask the first of ``boards``, and the others in turn when it is gone; the future gets the one answer.

        Raises ``UnavailableError`` when too many requests are unanswered, ``ValueError`` when no board is named.
        """
        if not boards:
            raise ValueError("name at least one board")
        if len(self._outstanding) >= MAX_OUTSTANDING:
            raise UnavailableError("broker client", f"{len(self._outstanding)} requests are unanswered", "wait for some")
        answer = asyncio.get_running_loop().create_future()
        self._outstanding[request.request_id] = _Outstanding(request, deque(boards), answer)
        answer.add_done_callback(lambda _: self._outstanding.pop(request.request_id, None))
        self._unsent.append(request.request_id)
        self._send()
        return answer

    def _send(self) -> None:
        """Publish what waits, as much as the link takes; the rest when it has sent something."""
        while self._unsent and self._link.up:
            waiting = self._outstanding.get(self._unsent[0])
            try:
                if waiting is not None:
                    self._link.publish(self._message(waiting.request, waiting.boards[0]))
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
        if isinstance(event, LinkUp):
            self._link.subscribe(self._topics.replies_to(self._client))
            self._link.subscribe(self._topics.every(Kind.ONLINE))
            self._unsent = deque(self._outstanding)
            self._send()
            self.up.set()
        elif isinstance(event, Published):
            self._send()
        elif isinstance(event, LinkDown):
            self.up.clear()
        elif isinstance(event, Delivered):
            try:
                self._take(event.message)
            except SlyError as error:
                self.refused.append(str(error))
            self._link.acknowledge(event.token)

    def _take(self, message: Message) -> None:
        topic = self._topics.parse(message.topic)
        if topic.kind is Kind.ONLINE:
            self._take_presence(open_presence(message.payload, self._key_of))
        elif topic.kind is Kind.REPLY:
            self._take_reply(topic, message)

    def _take_presence(self, presence: Presence) -> None:
        for request_id, waiting in self._outstanding.items():
            if waiting.boards[0] == presence.board:
                if presence.standing is not Standing.ONLINE:
                    waiting.boards.rotate(-1)
                self._unsent.append(request_id)
        self._send()

    def _take_reply(self, topic: Topic, message: Message) -> None:
        signed = verify1(message.payload, self._key_of, wire.AAD_RESULT, max_bytes=MAX_PAYLOAD_BYTES)
        result = wire.decode_result(signed.payload, self._client)
        if signed.kid != topic.board.encode():
            raise RefusedError(f"answer on {message.topic}", f"signed by {signed.kid!r}", f"signed by {topic.board}")
        waiting = self._outstanding.pop(result.request_id, None)
        if waiting is None or waiting.answer.done():
            self.duplicates += 1
        else:
            waiting.answer.set_result(result)

    def _key_of(self, kid: bytes) -> bytes | None:
        return self._members.get(kid.decode("utf-8", "replace"))
