"""A language model that this board hosts, as the node and the fleet see it: its offer, its turns, and where its sessions lie.

Owns the bringing up of a ``LanguageService`` from the configuration and the board's word on its KV (``KvState``).  Rules: only
named sessions are told of, by their hash, the last used first; what is told of speeds was measured.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from pathlib import Path
from typing import Protocol

from board_support.board import Board
from edge_agent.core.chat import CHAT, Tier, Turn, TurnEnd, TurnPart
from edge_agent.core.config import AgentConfig
from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.core.kv import BLOCK_TOKENS, MAX_HOMES, KvAsk, KvHome, KvItem, KvState, Place, session_hash
from edge_agent.core.values import MAX_PARALLEL, ModelOffer
from edge_agent.gateway.talker import SESSION_BUSY, Figure
from edge_agent.language.service import LanguageService, runtime_of
from edge_agent.runtime.settings import EngineSettings
from edge_agent.store.kv_manifest import Manifest
from edge_agent.store.kv_peers import PeerKv
from models.language_card import LanguageCard

Kept = tuple[str, int, int, str, int]
"""Of a session that is kept: its name, tokens in KV, bytes, tier, seconds since its last turn here."""
TYPICAL_TOKENS = 128
"""Of an answer: what a turn is thought to take before any was measured."""
PRIOR_TOKEN_US = 50_000


class Speaker(Protocol):
    """A language model that runs here."""

    def talk(self, turn: Turn) -> AsyncGenerator[TurnPart | TurnEnd, None]:
        """Serve one turn: parts that follow ``turn.begun``, then the end, whose text is the whole. Raises ``SlyError``."""
        ...

    async def ready(self) -> str:
        """Why no turn could be served now; empty when one could."""
        ...

    def figures(self) -> Iterable[Figure]: ...

    def kv_state(self) -> KvState | None:
        """What is told of its KV; ``None`` for one without."""
        ...

    def sessions(self) -> list[Kept]: ...

    async def drop(self, name: str) -> bool:
        """Forget a named session; ``False`` if it is not here. Raises ``RefusedError`` while it talks."""
        ...

    # The following raise ``SlyError``.

    async def adopt(self, session: str, manifest: bytes) -> tuple[tuple[bytes, ...], bool]:
        """Take in a session that moves here: the names of the blocks that are missing, and whether its rows are."""
        ...

    async def put(self, session: str, item: KvItem, name: bytes, payload: bytes) -> None:
        """Keep a block or the rows of a session that moves here."""
        ...

    async def give(self, ask: KvAsk) -> bytes:
        """What another board asks of a session here; ``MOVED`` gives it up."""
        ...

    async def close(self) -> None: ...


class HostedLanguage:
    """A ``Speaker`` over a service that was started."""

    def __init__(self, service: LanguageService) -> None:
        self.service, self._peers = service, PeerKv(service.store)
        self._homes: dict[str, tuple[int, Place]] = {}
        """Tokens in KV of each named session, and where they lie when they are not hot; the last used last."""
        self._used_s: dict[str, float] = {}
        self._talking: set[str] = set()
        self._leaving: set[str] = set()
        """Sessions that are being forgotten: no turn of theirs may begin."""
        self._coming: dict[str, Manifest] = {}
        self._going: dict[bytes, Manifest] = {}
        """By session hash."""

    async def recall(self) -> None:
        """Learn what the store holds from before this boot."""
        store = self.service.store

        def held() -> dict[str, tuple[int, Place]]:
            found = {name: store.resume(name) for name in reversed(_named(store.names()))}
            return {name: (each.tokens, Place.DISK) for name, each in found.items() if each is not None}

        self._homes = await asyncio.to_thread(held)
        self._used_s = dict.fromkeys(self._homes, time.monotonic())

    async def talk(self, turn: Turn) -> AsyncGenerator[TurnPart | TurnEnd, None]:
        if turn.session in self._leaving:
            raise RefusedError(SESSION_BUSY, turn.session, "a session that stays here", "ask again")
        parts, busy = self.service.talk(turn), turn.session in self._talking
        self._talking.add(turn.session)
        try:
            async for part in parts:
                if isinstance(part, TurnEnd) and turn.session:
                    self._note(turn.session, max(0, part.prompt_tokens + part.completion_tokens - 1), Place.RAM)
                yield part
        finally:
            await parts.aclose()
            if not busy:
                self._talking.discard(turn.session)

    def _note(self, session: str, tokens: int, place: Place) -> None:
        self._homes.pop(session, None)
        self._homes[session] = (tokens, place)
        self._used_s[session] = time.monotonic()

    async def ready(self) -> str:
        return await self.service.ready()

    def figures(self) -> Iterable[Figure]:
        return self.service.figures()

    def kv_state(self) -> KvState:
        service, kv = self.service, self.service.format
        live_bytes = sum(each.size_bytes for each in service.hot.residents() if each.live)
        restore = service.speeds.restore
        return KvState(
            model=service.card.name,
            fingerprint=kv.fingerprint,
            parked_bytes=-(-kv.block_bytes // BLOCK_TOKENS),
            hot_bytes=-(-service.hot.need_bytes(kv.window_tokens) // kv.window_tokens),
            free_bytes=max(0, service.hot.room.size_bytes - live_bytes),
            window_tokens=kv.window_tokens,
            prefill_tok_s=service.speeds.prefill,
            ram_tok_s=restore.get(Tier.RAM, 0),
            disk_tok_s=restore.get(Tier.DISK, 0),
            homes=tuple(self._told_homes()),
        )

    def _told_homes(self) -> Iterable[KvHome]:
        here = set(_named(self.service.store.names()))
        self._homes = {name: home for name, home in self._homes.items() if name in here}
        for name, (tokens, place) in list(reversed(self._homes.items()))[:MAX_HOMES]:
            hot_tokens = self.service.hot.tokens_of(name)
            yield KvHome(session_hash(name), hot_tokens or tokens, Place.HOT if hot_tokens else place)

    def sessions(self) -> list[Kept]:
        now_s, kept = time.monotonic(), []
        for name in _named(self.service.store.names()):
            tokens, place = self._homes.get(name, (0, Place.DISK))
            hot_tokens = self.service.hot.tokens_of(name)
            tier = Place.HOT if hot_tokens else place
            idle_s = int(now_s - self._used_s.get(name, now_s))
            kept.append((name, hot_tokens or tokens, self.service.store.bytes_of(name), tier.name.lower(), idle_s))
        return kept

    async def drop(self, name: str) -> bool:
        if name not in self.service.store.names():
            return False
        if name in self._talking or name in self._leaving:
            raise RefusedError(SESSION_BUSY, name, "a session that does not talk", "wait for the end of its turn")
        for resident in self.service.hot.residents():
            if resident.session == name and not resident.live:
                self.service.hot.drop(resident.slot)
        self._leaving.add(name)
        try:
            await asyncio.to_thread(self.service.store.drop, name)
        finally:
            self._leaving.discard(name)
        self._homes.pop(name, None)
        return True

    # sessions that move

    async def adopt(self, session: str, manifest: bytes) -> tuple[tuple[bytes, ...], bool]:
        coming = Manifest.decode(manifest)
        if coming.name != session:
            raise RefusedError("KV manifest", f"session {coming.name}", session)
        coming.must_fit(self.service.format)
        if session in self._talking:
            raise RefusedError(SESSION_BUSY, session, "a session that does not talk here")
        try:
            await asyncio.to_thread(self._peers.adopt, coming)
        except RefusedError:
            await self.drop(session)
            await asyncio.to_thread(self._peers.adopt, coming)
        self._coming[session] = coming
        missing = await asyncio.to_thread(self._peers.missing, coming)
        if not missing:
            await self._arrived(session)
        return missing.blocks, missing.rows

    async def put(self, session: str, item: KvItem, name: bytes, payload: bytes) -> None:
        coming = self._coming.get(session)
        if coming is None:
            raise RefusedError(f"session {session}", "KV without a manifest", "one that is moving here")
        if item is KvItem.BLOCK:
            await asyncio.to_thread(self._peers.import_block, coming, name, payload)
            return
        await asyncio.to_thread(self._peers.import_rows, coming, payload)
        await self._arrived(session)

    async def _arrived(self, session: str) -> None:
        await asyncio.to_thread(self.service.store.sync, session)
        self._note(session, self._coming.pop(session).tokens, Place.DISK)

    async def give(self, ask: KvAsk) -> bytes:
        if ask.item is KvItem.BLOCK:
            return await asyncio.to_thread(self._peers.export_block, ask.name)
        name = next((each for each in _named(self.service.store.names()) if session_hash(each) == ask.session), "")
        if not name:
            raise UnavailableError("session", "it is not here", "ask the board that has it now")
        if name in self._talking:
            raise UnavailableError(SESSION_BUSY, "it talks here now", "ask when its turn is over")
        if ask.item is KvItem.MANIFEST:
            manifest = self._going[ask.session] = await asyncio.to_thread(self._peers.export, name)
            return manifest.encode()
        going = self._going.get(ask.session)
        if going is None:
            raise UnavailableError("session", "nobody has asked for its manifest", "ask for that first")
        if ask.item is KvItem.ROWS:
            return await asyncio.to_thread(self._peers.export_rows, going)
        await self._give_up(name, self._going.pop(ask.session))
        return b""

    async def _give_up(self, name: str, going: Manifest) -> None:
        """Another board holds the session now, unless it has gone on here since."""
        held = self.service.store.resume(name)
        if held is not None and len(held.ids) * 4 != len(going.ids):
            raise UnavailableError(f"session {name}", "it has gone on here", "ask for it again")
        await self.drop(name)

    async def close(self) -> None:
        await self.service.close()


async def speaker_of(
    card: LanguageCard, folder: Path, state: Path, config: AgentConfig, engine: EngineSettings, board: Board,
    report: Callable[[str], None],
) -> tuple[ModelOffer, HostedLanguage]:  # fmt: skip
    """Bring a language model up. Raises ``RefusedError`` or ``UnavailableError`` saying why it cannot be hosted."""
    service = LanguageService(card, folder, state, config.language, engine, report)
    await service.start()
    hosted = HostedLanguage(service)
    await hosted.recall()
    busy_us = TYPICAL_TOKENS * PRIOR_TOKEN_US
    return ModelOffer(
        card.name, CHAT, card.digest(runtime_of(engine.runtime)), card.quality_permille, busy_us,
        busy_us * board.profile.active_mw // 1000, min(service.hot.room.slots, MAX_PARALLEL),
    ), hosted  # fmt: skip


def _named(names: Iterable[str]) -> list[str]:
    return [name for name in names if not name.startswith("~")]
