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
from edge_agent.language.plan import UNNAMED
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
MAX_LISTED = 4096
PLACES = {Tier.HOT: Place.HOT, Tier.RAM: Place.RAM, Tier.DISK: Place.DISK, Tier.NONE: Place.DISK}
"""A session without any KV has its ids on disk."""


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
        self._coming: dict[str, Manifest] = {}
        self._going: dict[bytes, Manifest] = {}
        """By session hash."""

    def talk(self, turn: Turn) -> AsyncGenerator[TurnPart | TurnEnd, None]:
        return self.service.talk(turn)

    async def ready(self) -> str:
        return await self.service.ready()

    def figures(self) -> Iterable[Figure]:
        return self.service.figures()

    def kv_state(self) -> KvState:
        service, kv = self.service, self.service.format
        live_bytes = sum(each.size_bytes for each in service.hot.residents() if each.live)
        speeds = service.store.speeds
        return KvState(
            model=service.card.name,
            fingerprint=kv.fingerprint,
            parked_bytes=-(-kv.block_bytes // BLOCK_TOKENS),
            hot_bytes=-(-service.hot.need_bytes(kv.window_tokens) // kv.window_tokens),
            free_bytes=max(0, service.hot.room.size_bytes - live_bytes),
            window_tokens=kv.window_tokens,
            prefill_tok_s=speeds.prefill_tok_s,
            ram_tok_s=speeds.ram_tok_s,
            disk_tok_s=speeds.disk_tok_s,
            homes=tuple(KvHome(session_hash(each.name), each.tokens, PLACES[each.tier]) for each in service.sessions(MAX_HOMES)),
        )

    def sessions(self) -> list[Kept]:
        now_s = int(time.time())
        return [
            (each.name, each.tokens, each.size_bytes, each.tier.value, max(0, now_s - each.used_s))
            for each in self.service.sessions(MAX_LISTED)
        ]

    async def drop(self, name: str) -> bool:
        return await self.service.forget(name)

    # sessions that move

    async def adopt(self, session: str, manifest: bytes) -> tuple[tuple[bytes, ...], bool]:
        coming = Manifest.decode(manifest)
        if coming.name != session:
            raise RefusedError("KV manifest", f"session {coming.name}", session)
        coming.must_fit(self.service.format)
        self.service.admitting.must_rest(session)
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
        else:
            await asyncio.to_thread(self._peers.import_rows, coming, payload)
        if not await asyncio.to_thread(self._peers.missing, coming):
            await self._arrived(session)

    async def _arrived(self, session: str) -> None:
        await asyncio.to_thread(self.service.store.sync, session)
        self._coming.pop(session, None)

    async def give(self, ask: KvAsk) -> bytes:
        if ask.item is KvItem.BLOCK:
            return await asyncio.to_thread(self._peers.export_block, ask.name)
        named = (each for each in self.service.store.names() if not each.startswith(UNNAMED))
        name = next((each for each in named if session_hash(each) == ask.session), "")
        if not name:
            raise UnavailableError("session", "it is not here", "ask the board that has it now")
        if self.service.admitting.busy(name):
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
        held = self.service.store.look(name)
        if held is not None and len(held.ids) * 4 != len(going.ids):
            raise UnavailableError(f"session {name}", "it has gone on here", "ask for it again")
        await self.drop(name)

    async def close(self) -> None:
        await self.service.close()


async def speaker_of(
    card: LanguageCard, folder: Path, state: Path, config: AgentConfig, engine: EngineSettings, board: Board,
    report: Callable[[str], None], kept_as: str = "",
) -> tuple[ModelOffer, HostedLanguage]:  # fmt: skip
    """Bring a language model up; ``kept_as`` as its service has it.

    Raises ``RefusedError`` or ``UnavailableError`` saying why it cannot be hosted.
    """
    service = LanguageService(card, folder, state, config.language, engine, report, kept_as)
    await service.start()
    busy_us = TYPICAL_TOKENS * PRIOR_TOKEN_US
    return ModelOffer(
        card.name, CHAT, card.digest(runtime_of(engine.runtime)), card.quality_permille, busy_us,
        busy_us * board.profile.active_mw // 1000, min(service.hot.room.slots, MAX_PARALLEL),
    ), HostedLanguage(service)  # fmt: skip
