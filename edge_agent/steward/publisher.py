"""The operator's machine gives what boards lack: every piece once for all who want it, as long as this runs.

Owns ``Publisher``.  Rules: only what the repository lists is given; pieces go out as the broker takes them, no more than
``MAX_UNDER_WAY`` at a time; wants are believed when a board of the charter signed them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Protocol

from edge_agent.core.clock import SystemClock
from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.gossip.presence import Standing, open_presence
from edge_agent.steward.session import OperatorSession
from edge_agent.transport.link import Message
from edge_agent.transport.topics import Kind, Topic
from ota.chunks import Artefact, artefact_of, encode_chunk, open_wants
from ota.giving import Giving
from ota.manifest import Release

MAX_UNDER_WAY = 64
IDLE_S = 1.0


class Artefacts(Protocol):
    """What has the bytes: ``ota.repository.Repository``."""

    def artefact(self, digest: bytes) -> Path | None: ...


class Publisher:
    """``async with session, Publisher(session, repository) as publisher``; ``hold`` what is to be given.

    ``given_bytes`` counts what went out. ``rate_bytes_per_s``: 0 for no limit.
    """

    def __init__(self, session: OperatorSession, repository: Artefacts, rate_bytes_per_s: int = 0) -> None:
        self._session, self._repository = session, repository
        self._giving = Giving(session.speaker.name, rate_bytes_per_s, first=True)
        self._clock = SystemClock()
        self._paths: dict[bytes, Path] = {}
        self._artefacts: dict[bytes, Artefact] = {}
        self._stir = asyncio.Event()
        self._room = asyncio.Semaphore(MAX_UNDER_WAY)
        self._sends: set[asyncio.Task[None]] = set()
        self._task: asyncio.Task[None] | None = None

    @property
    def given_bytes(self) -> int:
        return self._giving.given_bytes

    async def __aenter__(self) -> Publisher:
        self._session.hear(Kind.OTA_WANT, self._take)
        self._session.hear(Kind.ONLINE, self._take_presence)
        self._task = asyncio.get_running_loop().create_task(self._give_for_ever(), name="give")
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        tasks = [*self._sends, *([self._task] if self._task else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def hold(self, release: Release, manifest: bytes) -> None:
        """Give everything of a release, whose manifest has this digest. Raises ``UnavailableError`` for what is not here."""
        for artefact in [self._whole(manifest), *map(artefact_of, release.files)]:
            self._hold(artefact)

    def hold_whole(self, digest: bytes) -> None:
        """Give an artefact of one piece: a charter, a manifest."""
        self._hold(self._whole(digest))

    def _whole(self, digest: bytes) -> Artefact:
        return Artefact(digest, self._path(digest).stat().st_size)

    def _hold(self, artefact: Artefact) -> None:
        self._paths[artefact.digest], self._artefacts[artefact.digest] = self._path(artefact.digest), artefact
        self._giving.hold(artefact)
        self._stir.set()

    def _path(self, digest: bytes) -> Path:
        path = self._repository.artefact(digest)
        if path is None:
            raise UnavailableError(f"artefact {digest.hex()[:16]}", "it is not in the repository", "push the release again")
        return path

    def _take(self, topic: Topic, payload: bytes) -> None:
        if not payload:
            return
        boards = self._session.charter.members
        wants = open_wants(payload, lambda kid: boards.get(kid.decode("utf-8", "replace")))
        if wants.board != topic.board:
            raise RefusedError("wants", f"of {wants.board!r} on the topic of {topic.board!r}", "its own topic")
        self._giving.heard_wants(wants, self._clock.monotonic_us())
        self._stir.set()

    def _take_presence(self, topic: Topic, payload: bytes) -> None:
        """Nothing is sent for a board that is gone, until it asks anew."""
        boards = self._session.charter.members
        presence = open_presence(payload, lambda kid: boards.get(kid.decode("utf-8", "replace"))) if payload else None
        if presence is not None and presence.standing is not Standing.ONLINE:
            self._giving.gone(topic.board)

    async def _give_for_ever(self) -> None:
        while True:
            self._stir.clear()
            now_us = self._clock.monotonic_us()
            if self._session.ready.is_set() and (piece := self._giving.next(now_us)) is not None:
                await self._room.acquire()
                self._giving.sent(*piece, self._clock.monotonic_us())
                self._send(*piece)
                continue
            due_us = self._giving.next_us(now_us)
            wait_s = IDLE_S if due_us is None else min(IDLE_S, max(0.0, (due_us - now_us) / 1e6))
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._stir.wait()

    def _send(self, digest: bytes, index: int) -> None:
        task = asyncio.get_running_loop().create_task(self._say(digest, index))
        self._sends.add(task)
        task.add_done_callback(self._sent)

    def _sent(self, task: asyncio.Task[None]) -> None:
        self._sends.discard(task)
        self._room.release()
        if not task.cancelled() and (error := task.exception()) is not None:
            self._session.refused.append(f"a piece was not sent: {error}")

    async def _say(self, digest: bytes, index: int) -> None:
        artefact = self._artefacts[digest]
        read: Callable[[], bytes] = partial(_piece, self._paths[digest], artefact, index)
        topic = self._session.topics.ota_chunk(digest.hex())
        await self._session.say(Message(topic, encode_chunk(index, await asyncio.to_thread(read))))


def _piece(path: Path, artefact: Artefact, index: int) -> bytes:
    with path.open("rb") as file:
        file.seek(index * artefact.step_bytes)
        return file.read(artefact.piece_bytes(index))
